"""GGUF LoRA adapters, as llama.cpp applies them: `<base tensor>.lora_a` [r, in] and `.lora_b` [out, r], one alpha for all.

llama.cpp scales every matrix by alpha / r with its own rank r; other scales are put into B when the file is written. The
embedding's factors lie the other way: lora_a [vocab, r], lora_b [dim, r]. Rows are those of `llama` files, as Meta's. Routed
experts are three tensors, as in the model's file, and their factors have the expert in front: [E, r, in] and [E, out, r].
Sources: llama.cpp src/llama-adapter.cpp, src/llama-graph.cpp (build_lora_mm_id), convert_lora_to_gguf.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.adapters.lora import Factors, LoraAdapter
from herd.checkpoint.gguf import GGUFFile
from herd.checkpoint.names import homes, shapes
from herd.checkpoint.write.gguf import write_gguf_file
from herd.checkpoint.write.gguf_config import architecture
from herd.checkpoint.write.planned import Planned, Tick
from herd.errors import CheckpointError
from herd.files import short
from herd.model.config import ModelConfig

__all__ = ["one_scale", "read_gguf_lora", "write_gguf_lora"]

_FACTOR = re.compile(r"(?P<tensor>.+)\.lora_(?P<word>[ab])")
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_gguf_lora(path: str | os.PathLike[str], base: ModelConfig) -> LoraAdapter:
    """The adapter in the file `path`, for a base of config `base`; plain tensors are views of the file, blocks become float32.

    Raises CheckpointError naming key or tensor: another kind of file, other architecture, a tensor of no parameter of the base.
    """
    file = GGUFFile(path)
    meta = file.metadata
    for key, wanted in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", architecture(base)),
    ):
        if meta.get(key) != wanted:
            meta.fail(key, f"is {short(meta.get(key))}: a LoRA adapter for this base has {wanted!r}")
    alpha = meta.get("adapter.lora.alpha")
    if type(alpha) is not float:
        meta.fail("adapter.lora.alpha", f"is {short(alpha)}: expected a number")
    if meta.get("adapter.alora.invocation_tokens"):
        meta.fail("adapter.alora.invocation_tokens", "makes an adapter that switches itself on, which herd does not do")
    canonical = {home.name: name for name, home in homes(base, "gguf").items()}
    low: dict[str, dict[str, Tensor]] = {}
    for foreign in file.names():
        match = _FACTOR.fullmatch(foreign)
        name = None if match is None else canonical.get(match["tensor"])
        if match is None or name is None:
            raise CheckpointError("is no LoRA factor of a tensor of the base model", path=path, tensor=foreign[:200])
        tensor = file.tensor(foreign)
        word = match["word"]
        if name == _EMBEDDING:
            word, tensor = ("b", tensor) if word == "a" else ("a", tensor.T)
        low.setdefault(name, {})[word] = tensor
    factors = {}
    for name, pair in low.items():
        if len(pair) != 2:
            raise CheckpointError(f"has no lora_{'b' if 'a' in pair else 'a'}", path=path, tensor=name)
        factors[name] = Factors(pair["a"], pair["b"], _alpha(alpha, pair["a"]))
    ranks = [pair.rank for pair in factors.values()]
    if not ranks:
        raise CheckpointError("holds no LoRA factors", path=path)
    named = meta.get("general.base_model.0.name")
    rank = max(set(ranks), key=ranks.count)
    adapter = LoraAdapter(
        factors, rank, _alpha(alpha, torch.empty(rank, 1)), base=named if isinstance(named, str) else None
    )
    adapter.check(shapes(base), path)
    return adapter


def write_gguf_lora(
    adapter: LoraAdapter, path: str | os.PathLike[str], base: ModelConfig, tick: Tick, *, name: str | None = None
) -> None:
    """Write the file `path`. Tensors keep their dtype; where `one_scale` is None the scales are put into B, in float32.

    Raises CheckpointError for what GGUF adapters cannot hold: whole weights, DoRA, the output of a tied model.
    """
    adapter.check(shapes(base))
    if adapter.whole:
        why = "is replaced as a whole, and a GGUF adapter holds LoRA factors only: merge the adapter into the model instead"
        raise CheckpointError(why, tensor=next(iter(adapter.whole)))
    if adapter.dora:
        why = "has a magnitude (DoRA), and a GGUF adapter holds LoRA factors only: merge the adapter into the model instead"
        raise CheckpointError(why, tensor=next(iter(adapter.factors)))
    found = homes(base, "gguf")
    alpha = one_scale(adapter)
    planned: list[Planned] = []
    for parameter, pair in adapter.factors.items():
        home = found.get(parameter)
        if home is None or len(shapes(base)[parameter]) < 2:
            raise CheckpointError("is no matrix of its own in GGUF: LoRA cannot be stored for it", tensor=parameter)
        a, b = pair.a, pair.b
        if alpha is None:
            b = b.float() * adapter.scale(parameter)
        if parameter == _EMBEDDING:
            a, b = b, a.T
        planned += [_plan(f"{home.name}.lora_a", a), _plan(f"{home.name}.lora_b", b)]
    metadata: dict[str, Any] = {
        "general.architecture": architecture(base),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0 if alpha is None else float(alpha),
        "general.file_type": 0,
    }
    metadata |= _named(adapter, name or Path(path).stem)
    write_gguf_file(path, metadata, planned, tick)


def one_scale(adapter: LoraAdapter) -> float | None:
    """The alpha that gives every matrix its scale as alpha / r, exactly in float32; None when there is none.

    llama.cpp takes an alpha of 0 for "not scaled", so 0 is never the answer.
    """
    alphas = {adapter.scale(name) * pair.rank for name, pair in adapter.factors.items()}
    if len(alphas) != 1 or (alpha := alphas.pop()) == 0 or float(torch.tensor(alpha, dtype=torch.float32)) != alpha:
        return None
    return alpha


def _alpha(alpha: float, a: Tensor) -> float:
    """An alpha of 0 means that the factors are not scaled."""
    return float(a.shape[-2]) if alpha == 0 else alpha


def _named(adapter: LoraAdapter, name: str) -> Mapping[str, Any]:
    keys: dict[str, Any] = {"general.name": name}
    if adapter.base:
        keys |= {"general.base_model.count": 1, "general.base_model.0.name": adapter.base}
    return keys


def _plan(name: str, tensor: Tensor) -> Planned:
    values = tensor if tensor.dtype in _WORDS else tensor.float()
    return Planned(name, tuple(values.shape), _WORDS[values.dtype], partial(Tensor.contiguous, values))
