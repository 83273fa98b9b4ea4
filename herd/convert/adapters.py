"""LoRA adapters in another format, with their own proof: every factor, every scale, and every change B A as a whole."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from herd.adapters.lora import LoraAdapter
from herd.checkpoint.adapter import AdapterKind as Kind
from herd.checkpoint.adapter import adapter_kind
from herd.checkpoint.gguf import GGUFFile
from herd.checkpoint.gguf_lora import one_scale, read_gguf_lora, write_gguf_lora
from herd.checkpoint.mapped import same_bytes
from herd.checkpoint.open import open_store, run_folder
from herd.checkpoint.peft import CONFIG, read_peft, write_peft
from herd.checkpoint.resolve import resolve
from herd.convert.report import Check, FileEntry, Report, Side, TensorResult
from herd.convert.versions import versions
from herd.errors import CheckpointError, ConfigError
from herd.model.config import ModelConfig

__all__ = ["Kind", "adapter_kind", "compare_adapters", "open_adapter", "write_adapter"]

SCALED = 2.0**-22
"""Relative error of a change whose scale was multiplied into B: two roundings to float32, and float64 products."""


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter with its place and the config of its base."""

    path: Path
    kind: Kind
    adapter: LoraAdapter
    config: ModelConfig


def open_adapter(path: Path, base: str | os.PathLike[str] | None) -> OpenedAdapter:
    """The adapter at `path` on its base: `base`, or else the model that its file names. Raises HerdErrors."""
    kind = adapter_kind(path)
    if kind is None:
        why = run_folder(path) or "is no LoRA adapter: expected a folder with adapter_config.json or a GGUF adapter"
        raise CheckpointError(why, path=path)
    if base is None:
        base = _named_base(path, kind)
    config = open_store(resolve(base)).config
    return OpenedAdapter(path, kind, _read(path, kind, config), config)


def write_adapter(source: OpenedAdapter, new: Path, to: Kind, tick: Callable[[int], None]) -> list[str]:
    """Write the adapter to the new folder (peft) or file (gguf) `new`; what had to be decided, in words."""
    adapter, notes = source.adapter, []
    if to == "peft":
        write_peft(adapter, new, source.config, tick)
    else:
        if one_scale(adapter) is None:
            notes.append("GGUF has one alpha for all matrices: the scales were multiplied into B, in float32")
        elif adapter.rslora:
            notes.append("GGUF knows no rank-stabilised scaling: alpha was chosen so that alpha / r is the same scale")
        write_gguf_lora(adapter, new, source.config, tick)
    return notes


def compare_adapters(a: OpenedAdapter, path: Path, kind: Kind, *, notes: tuple[str, ...], shown_as: str) -> Report:
    """The report on adapter `a` and the one of `kind` at `path`: factors bit for bit, or the changes where a scale moved."""
    b = OpenedAdapter(path, kind, _read(path, kind, a.config), a.config)
    one, other = a.adapter, b.adapter
    tensors: list[TensorResult] = []
    worst = 0.0
    for name in [*one.factors, *(n for n in other.factors if n not in one.factors)]:
        alone = (
            one.factors.get(name)
            if name not in other.factors
            else other.factors[name]
            if name not in one.factors
            else None
        )
        if alone is not None:
            if not bool(alone.b.any()):  # half of what PEFT adapts as one parameter
                tensors.append(TensorResult(name, alone.shape, "-", "-", "exact"))
                continue
            why = "is missing in B" if name in one.factors else "is in B, but not in A"
            tensors.append(TensorResult(name, (), "-", "-", "failed", math.inf, why=why))
            continue
        left, right = one.factors[name], other.factors[name]
        moved = not math.isclose(one.scale(name), other.scale(name), rel_tol=1e-12)
        change, found = one.delta(name, torch.float64), other.delta(name, torch.float64)
        size = float(change.abs().max())
        error = float((change - found).abs().max()) / size if size else float(found.abs().max())
        worst = max(worst, error)
        if left.rank != right.rank and left.a.ndim == 3:  # gate and up side by side: the same change of a larger rank
            status = "within" if error <= SCALED else "failed"
            tensors.append(
                TensorResult(name, left.shape, _word(left.a), _word(right.a), status, error * size, SCALED * size)
            )
            continue
        for part, x, y in (("lora_a", left.a, right.a), ("lora_b", left.b, right.b)):
            expected = x.float() * (one.scale(name) / other.scale(name)) if moved and part == "lora_b" else x
            tensors.append(_compare(f"{name}.{part}", x, expected, y, moved=expected is not x))
        if left.magnitude is not None or right.magnitude is not None:
            tensors.append(_magnitudes(name, left.magnitude, right.magnitude))
    tensors += [
        _compare(name, x, x, other.whole[name], moved=False) for name, x in one.whole.items() if name in other.whole
    ]
    lost = [name for name in one.whole if name not in other.whole] + [n for n in other.whole if n not in one.whole]
    checks = [
        Check(
            "changes",
            worst <= SCALED and not lost,
            (f"scale * B A of {len(one.factors)} matrices: largest relative difference {worst:.3g}", *lost),
            {"largest_relative_difference": worst},
        ),
        Check("base", True, (f"{a.adapter.base or 'not named'}; every factor fits its shapes",)),
    ]
    title = f"convert adapter to {kind}"
    return Report(title, _side(a), _side(b, shown_as), tuple(tensors), tuple(checks), notes, versions=versions())


def _magnitudes(name: str, x: Tensor | None, y: Tensor | None) -> TensorResult:
    if x is None or y is None:
        why = "is missing in B" if y is None else "is in B, but not in A"
        return TensorResult(f"{name}.magnitude", (), "-", "-", "failed", math.inf, why=why)
    return _compare(f"{name}.magnitude", x, x, y, moved=False)


def _compare(name: str, x: Tensor, expected: Tensor, y: Tensor, *, moved: bool) -> TensorResult:
    shape, one, other = tuple(x.shape), _word(x), _word(y)
    if x.shape != y.shape:
        return TensorResult(name, shape, one, other, "failed", math.inf, why=f"has shape {tuple(y.shape)} in B")
    if same_bytes(expected, y) and not moved:
        return TensorResult(name, shape, one, other, "exact")
    error = float((expected.double() - y.double()).abs().max())
    bound = SCALED * float(expected.abs().max())
    if moved and error <= bound:
        return TensorResult(name, shape, one, other, "within", error, bound)
    return TensorResult(name, shape, one, other, "failed", error, why=f"differs by {error:.3g}")


def _read(path: Path, kind: Kind, config: ModelConfig) -> LoraAdapter:
    return read_peft(path, config) if kind == "peft" else read_gguf_lora(path, config)


def _named_base(path: Path, kind: Kind) -> str:
    from herd.files import read_json

    folder = path if path.is_dir() else path.parent
    if kind == "peft":
        named = read_json(folder / CONFIG).get("base_model_name_or_path")
    else:
        named = GGUFFile(path).metadata.get("general.base_model.0.name")
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{path}: the adapter does not name its base model: give it with --base")
    try:
        resolve(named)
    except Exception as error:
        raise ConfigError(
            f"{path}: its base model {named[:200]!r} is not here ({error}): give it with --base"
        ) from error
    return named


def _side(opened: OpenedAdapter, shown_as: str | None = None) -> Side:
    pairs = opened.adapter.factors.values()
    tensors = [t for pair in pairs for t in (pair.a, pair.b, pair.magnitude) if t is not None]
    tensors += opened.adapter.whole.values()
    stored: dict[str, int] = {}
    for tensor in tensors:
        word = _word(tensor)
        stored[word] = stored.get(word, 0) + 1
    files = sorted(opened.path.iterdir()) if opened.path.is_dir() else [opened.path]
    entries = tuple(FileEntry(f.name, f.stat().st_size) for f in files if f.is_file())
    count, nbytes = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
    return Side(shown_as or str(opened.path), f"{opened.kind} adapter", count, nbytes, stored, entries)


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
