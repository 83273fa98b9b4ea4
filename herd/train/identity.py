"""What must be the same for a run to go on exactly: model, data, settings, ranks, threads. Differences are told one by one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from herd.adapters.apply import trained
from herd.kernels import native
from herd.model.llama import Llama
from herd.parallel.mesh import Mesh
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from herd.quant.matrix import Matrix
from herd.quant.nf4 import Nf4Matrix
from herd.train.config import TrainConfig

__all__ = ["differences", "identity"]

SAMPLES = 256
"""Values of each frozen tensor that go into its digest: enough to tell two models apart, and nothing beside reading all."""

NEUTRAL = ("log_every", "save", "evaluate")
"""Fields of TrainConfig that change no weight."""

HARD = ("model", "trained")
"""Where these differ the checkpoint does not fit at all; other differences are the user's choice."""

CONTENT = "facts.digest"
"""The fingerprint of all rows in their order (`herd.data.open.DataReport`)."""

PIPELINE = "parts of a pipeline"
_HALF = 1 << 32
"""A sum over ranks is taken in two halves, which do not overflow."""


def identity(model: Llama, config: TrainConfig, mesh: Mesh, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What this run is, JSON-able. `facts` are the caller's: vocabulary, data, method."""
    settings = asdict(config)
    for name in NEUTRAL:
        del settings[name]
    if not config.exact_accumulation:  # as checkpoints from before there was such a setting
        del settings["exact_accumulation"]
    shape = asdict(model.config)
    layers = [str(layer) for layer in shape.pop("layers")]
    shape["layers"] = [f"{layers.count(kind)} x {kind}" for kind in dict.fromkeys(layers)]
    return _plain(
        {
            "model": shape,
            "trained": _trained(model, mesh),
            "frozen": _frozen(model, mesh),
            "train": settings,
            "parallel": asdict(mesh.part),
            "world": mesh.world,
            "threads": torch.get_num_threads(),
            "machine": {"torch": torch.__version__, "device": _device(mesh), "kernels": _kernels(mesh)},
            "facts": dict(facts),
        }
    )


def differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], bool]:
    """(a line for each difference, whether the checkpoint fits in spite of them)."""
    lines: list[str] = []
    fits = True
    if PIPELINE in (kept.get("trained"), now.get("trained")):  # each rank knows a part of the names
        kept, now = ({key: value for key, value in part.items() if key != "trained"} for part in (kept, now))
    old, new = dict(_flat(kept, "")), dict(_flat(now, ""))
    other = [key for key in dict.fromkeys((*old, *new)) if old.get(key, "nothing") != new.get(key, "nothing")]
    for key in other:
        name = "rows of the data and their order" if key == CONTENT else key.removeprefix("facts.")
        lines.append(
            f"{name}: {_short(old.get(key, 'nothing'))} in the checkpoint, {_short(new.get(key, 'nothing'))} now"
        )
        fits = fits and not key.startswith(HARD)
    return lines, fits


def _short(value: Any) -> Any:
    """A digest by its beginning: nobody reads 64 letters."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value) else value


def _trained(model: nn.Module, mesh: Mesh) -> dict[str, str] | str:
    if mesh.part.pp > 1:
        return PIPELINE
    return {name: f"{_word(t.dtype)} {list(t.shape)}" for name, t in trained(model).items()}


def _flat(part: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, part


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _frozen(model: Llama, mesh: Mesh) -> str:
    """A digest of what does not train: names, sizes, types and a sample of the values; the same on all ranks of a pipeline.

    Each tensor has a digest of its own, and they are added up, so that it does not matter which rank holds which.
    """
    total = 0
    tied = model.config.tie_embeddings  # the last stage's output is the first one's embedding
    for name, weight in model.named_parameters():
        if not weight.requires_grad and not (tied and name.startswith("output.")):
            whole = not isinstance(weight, DTensor)  # a rank's part says little, and another part on another rank
            facts = f"{name} {_word(weight.dtype)} {list(weight.shape)}"
            total += _number(facts, _sample(weight.detach()) if whole else b"")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts) and not (tied and name == "output"):
            for at, matrix in enumerate(module.matrices()):
                if mesh.part.tp > 1:  # parts that no DTensor tells
                    total += _number(f"{name} {at} {matrix.type.name}", b"")
                else:
                    facts = f"{name} {at} {matrix.type.name} {matrix.rows} {matrix.columns}"
                    total += _number(facts, _sample(_stored(matrix)))
    if mesh.part.pp > 1:
        both = torch.tensor([total % _HALF, total // _HALF % _HALF], device=mesh.device)
        dist.all_reduce(both, group=mesh.group("pp"))
        total = int(both[0]) + int(both[1]) * _HALF
    return f"{total % _HALF**2:016x}"


def _number(facts: str, sample: bytes) -> int:
    return int.from_bytes(hashlib.sha256(facts.encode() + sample).digest()[:8], "big")


def _stored(matrix: Matrix) -> torch.Tensor:
    """The bytes that a quantized matrix is made of, or most of them."""
    if isinstance(matrix, Nf4Matrix):
        return matrix.stored.codes
    if matrix.blocks is not None:
        return matrix.blocks
    assert matrix.panels is not None  # one of both is always there
    return matrix.panels.storage


def _sample(values: torch.Tensor) -> bytes:
    flat = values.reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step].float().cpu().numpy().tobytes()


def _kernels(mesh: Mesh) -> str:
    """Who computes the small steps and attention: sums have another order."""
    return "torch" if mesh.device.type == "cuda" else native.isa() or "torch"


def _device(mesh: Mesh) -> str:
    if mesh.device.type == "cuda":
        return torch.cuda.get_device_name(mesh.device)
    return f"{mesh.device.type} {torch.backends.cpu.get_cpu_capability()}"
