"""Keys and values of a prompt on disk: a long system prompt is read once, not at every start.

The file is safetensors: `tokens` [S] int32, and for each layer i `k.i` and `v.i` [S, Hkv, Dh] (with int8 also `k_scale.i` and
`v_scale.i` [S, Hkv]), S positions from 0 on. Its metadata says which model made it; another one is refused. Blocks of another
size are no obstacle.

Letters: S positions, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from herd.checkpoint.safetensors import SafetensorsFile
from herd.checkpoint.write.atomic import new_file
from herd.checkpoint.write.planned import Planned
from herd.checkpoint.write.safetensors import write_safetensors
from herd.engine.blocks import BlockPool
from herd.engine.paged import PagedCache
from herd.errors import CheckpointError, ConfigError
from herd.model.llama import Llama
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear

__all__ = ["fingerprint", "load_prompt", "save_prompt"]

FORMAT, VERSION = "herd prompt cache", "1"
SAMPLED = 16
"""Rows of each matrix that the fingerprint looks at: a finetuned model differs in all of them, and 8B need no second."""

_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}


def fingerprint(model: Llama) -> str:
    """What tells a model's keys and values from another's: its geometry, and SAMPLED rows of every weight as stored.

    The same on every machine. A change that leaves all of those rows as they are is not seen.
    """
    digest = hashlib.blake2b(repr(model.config).encode(), digest_size=32)
    for name, kind, rows in _rows(model):
        digest.update(f"\n{name} {kind} {tuple(rows.shape)}\n".encode())
        digest.update(rows.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def save_prompt(
    path: str | os.PathLike[str],
    tokens: Sequence[int],
    cache: PagedCache,
    pool: BlockPool,
    model: str,
    *,
    salt: str = "",
    overwrite: bool = False,
) -> int:
    """Write what `pool` knows of the prefix of `tokens` to the file `path`; returns how many tokens that are (full blocks).

    `model` is the fingerprint. Between two steps of an engine, in its thread. Prompts under a LoRA adapter are not saved. Raises
    ConfigError when nothing of it is in the cache, CheckpointError for a destination that cannot be used.
    """
    blocks, _ = pool.lookup(tokens, salt=salt)
    if not blocks:
        raise ConfigError(
            f"nothing of this prompt of {len(tokens)} tokens is in the cache, which keeps full blocks of {pool.block_size}: run "
            "it first, with prefix_cache on"
        )
    count = len(blocks) * pool.block_size
    known = torch.tensor(list(tokens[:count]), dtype=torch.int32)
    held = torch.tensor(blocks, device=cache.device)
    plans = [_plan("tokens", known)]
    for name, tensor in _layers(cache):
        shape = (count, *tensor.shape[2:])
        plans.append(Planned(name, shape, _STORED[tensor.dtype], partial(_flat, tensor, held)))
    metadata = {"format": FORMAT, "version": VERSION, "model": model, "dtype": _name(cache.dtype)}
    with new_file(path, size=sum(plan.nbytes for plan in plans), overwrite=overwrite) as new:
        write_safetensors(new, plans, metadata, lambda nbytes: None)
    return count


def load_prompt(
    path: str | os.PathLike[str], cache: PagedCache, pool: BlockPool, model: str, *, salt: str = ""
) -> list[int]:
    """Put the prompt of a file into the cache, as if it had just run; returns its tokens that are in there now (full blocks).

    Between two steps of an engine, in its thread. Raises CheckpointError for a file of another kind, another model or another
    dtype of keys and values, or a damaged one; ConfigError when the pool has too few blocks free.
    """
    file = SafetensorsFile(path)
    _check_header(file, cache, model)
    tokens = file.tensor("tokens").tolist()
    size = pool.block_size
    tokens = tokens[: len(tokens) // size * size]
    held, digests = pool.lookup(tokens, salt=salt)
    pool.share(held)  # or they might be given up for the others
    try:
        missing = len(tokens) // size - len(held)
        if missing > pool.available:
            raise ConfigError(
                f"{path}: a prompt of {len(tokens)} tokens needs {missing} more blocks of {size}, and {pool.available} are free"
            )
        new = pool.allocate(missing)
        first = len(held)
        held += new
        if new:
            _fill(file, cache, torch.tensor(new, device=cache.device), slice(first * size, len(tokens)))
        for i in range(first, len(held)):
            digests.append(pool.seal(held[i], digests, tokens[i * size : (i + 1) * size], salt=salt))
    finally:
        pool.free(held)
    return tokens


def _fill(file: SafetensorsFile, cache: PagedCache, blocks: Tensor, positions: slice) -> None:
    for name, tensor in _layers(cache):
        values = file.tensor(name)[positions].to(tensor.device)
        tensor[blocks] = values.unflatten(0, (len(blocks), cache.block_size))


def _check_header(file: SafetensorsFile, cache: PagedCache, model: str) -> None:
    """Kind, version, model and dtype first, then that every tensor is there with its shape and the ids are ids."""
    meta, path = file.metadata, file.path
    if meta.get("format") != FORMAT:
        raise CheckpointError("is not a prompt cache of herd", path=path)
    if meta.get("version") != VERSION:
        raise CheckpointError("was written by another version of herd: save the prompt again", path=path)
    if meta.get("model") != model:
        raise CheckpointError("was made with another model or other weights: save the prompt again", path=path)
    if meta.get("dtype") != _name(cache.dtype):
        said = str(meta.get("dtype"))[:20]
        raise CheckpointError(
            f"keeps keys and values as {said}, and this cache as {_name(cache.dtype)}: choose the same, or save it again",
            path=path,
        )
    if "tokens" not in file.entries:
        raise CheckpointError("the tensor is missing: save the prompt again", path=path, tensor="tokens")
    info = file.describe("tokens")
    count = info.shape[0] if len(info.shape) == 1 else -1
    expected: dict[str, tuple[tuple[int, ...], str]] = {"tokens": ((count,), "I32")}
    for name, tensor in _layers(cache):
        expected[name] = ((count, *tensor.shape[2:]), _STORED[tensor.dtype])
    for name, (shape, stored) in expected.items():
        if name not in file.entries:
            raise CheckpointError("the tensor is missing: save the prompt again", path=path, tensor=name)
        info = file.describe(name)
        if (info.shape, info.stored) != (shape, stored):
            why = f"is {info.stored} {list(info.shape)}, expected {stored} {list(shape)}"
            raise CheckpointError(why, path=path, tensor=name)
    if extra := sorted(set(file.entries) - set(expected)):
        raise CheckpointError("does not belong into a prompt cache", path=path, tensor=extra[0])
    ids = file.tensor("tokens")
    if count and not bool(((ids >= 0) & (ids < cache.config.vocab_size)).all()):
        raise CheckpointError("has ids outside the model's vocabulary", path=path, tensor="tokens")


def _layers(cache: PagedCache) -> Iterator[tuple[str, Tensor]]:
    """Names in the file and tensors of the cache."""
    kinds = {"k": cache.k, "v": cache.v, "k_scale": cache.k_scale, "v_scale": cache.v_scale}
    for kind, tensors in kinds.items():
        for i, tensor in enumerate(tensors):
            yield f"{kind}.{i}", tensor


def _flat(tensor: Tensor, blocks: Tensor) -> Tensor:
    return tensor[blocks].flatten(0, 1).cpu()


def _plan(name: str, tensor: Tensor) -> Planned:
    return Planned(name, tuple(tensor.shape), _STORED[tensor.dtype], lambda: tensor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Name, type and sampled rows of every weight, whatever holds it."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            for i, matrix in enumerate(module.matrices()):
                rows = matrix.look_up(_spread(matrix.rows), torch.float32)
                yield f"{name}.{i}", matrix.type.name, rows
        for own, weight in module.named_parameters(recurse=False):
            flat = weight[None] if weight.ndim == 1 else weight.flatten(0, -2)
            yield f"{name}.{own}", _name(weight.dtype), flat[_spread(len(flat)).to(flat.device)]


def _spread(rows: int) -> Tensor:
    """Up to SAMPLED row numbers from the first to the last."""
    n = min(rows, SAMPLED)
    return torch.tensor([i * (rows - 1) // max(n - 1, 1) for i in range(n)])
