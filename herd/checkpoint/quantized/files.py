"""Quantized modules behind the names that plain weights would have: what a store opens instead of the files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from herd.checkpoint.mapped import MappedFile, Span
from herd.checkpoint.names import Cell, Home, shapes
from herd.checkpoint.quantized.experts import Plain, Stacked
from herd.checkpoint.quantized.fp8 import FbgemmScheme
from herd.checkpoint.quantized.module import Module, Packed
from herd.checkpoint.quantized.recognise import Scheme
from herd.checkpoint.store import TensorFile, TensorInfo
from herd.model.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from herd.checkpoint.quantized.module import Stored

__all__ = ["PackedFile", "rearranged", "unpacked"]

_RUNTIME = re.compile(
    r".*\.((input|output|q|k|v|kv|prob)_(scale|zero_point|global_scale)|input_scale_ub|(k_cache|v_cache)\.(scale|zero_point))"
)
"""Scales of activations and of the cache: what runtimes that round those need."""

_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class PackedFile:
    """A TensorFile of one tensor: a quantized module as the float32 weight that it stands for."""

    def __init__(self, name: str, packed: Packed) -> None:
        self.name, self.packed = name, packed
        first, _ = packed.parts()[0]
        self.path, self.map = first.path, cast("MappedFile", first.map)

    def names(self) -> Iterable[str]:
        """The weight's name."""
        return (self.name,)

    def describe(self, name: str) -> TensorInfo:
        """Shape of the weight, the form it is stored in, bytes of all its parts."""
        return TensorInfo(self.packed.shape, "float32", self.packed.word, self.packed.nbytes)

    def tensor(self, name: str) -> torch.Tensor:
        """The values in float32."""
        return self.packed.values()

    def span(self, name: str) -> Span | None:
        """None: the values are nowhere in the file."""
        return None

    def packed_tensor(self, name: str) -> Packed | None:
        """The module in its quantized form."""
        return self.packed

    def release(self, name: str) -> None:
        """Let go of the file pages behind the parts."""
        self.packed.release()


def unpacked(
    scheme: Scheme,
    files: Mapping[str, TensorFile],
    homes: Mapping[str, tuple[str, Home]],
    config: ModelConfig,
    where: str | os.PathLike[str],
) -> tuple[dict[str, TensorFile], dict[str, tuple[str, Home]]]:
    """(tensor name -> file, canonical name -> home) with every quantized module of `files` behind the name of its weight, and
    without tensors that only runtimes need. Raises CheckpointError when the tensors of a module do not go together."""
    found: dict[str, TensorFile] = {}
    gone: set[str] = set()
    placed = dict(homes)
    for canonical, shape in shapes(config).items():
        if len(shape) < 2:
            continue
        foreign, home = homes[canonical]
        packed = None
        if ".experts." in canonical:
            holder, _, part = foreign.rpartition(".")
            single = f"{holder}.{_EXPERT[canonical.rpartition('.')[2]]}"
            if foreign in files:
                if isinstance(scheme, FbgemmScheme) and foreign not in found:
                    module = Module(holder, _fused_shape(shape, part), files, where)
                    packed = scheme.fused(module, part)
            elif any(name.startswith(f"{holder}.0.") for name in files):
                packed = Stacked(
                    [
                        _one(scheme, f"{holder}.{e}.{single.rpartition('.')[2]}", shape[1:], files, where)
                        for e in range(shape[0])
                    ]
                )
                foreign = f"{single}.weight"
                placed[canonical] = (foreign, Home(canonical, foreign, Cell(foreign), home.shard))
        else:
            packed = scheme.open(Module(foreign.removesuffix(".weight"), shape, files, where))
        if packed is not None:
            found[foreign] = PackedFile(foreign, packed)
            gone.update(name for _, name in packed.parts())
    rest = {name: file for name, file in files.items() if name not in gone and not _RUNTIME.fullmatch(name)}
    return rest | found, placed


def rearranged(stored: Stored, home: Home, config: ModelConfig) -> Stored:
    """A quantized matrix in canonical layout. Rows may move (queries and keys); nothing else does in the forms that are held."""
    from herd.quant.fp8 import Fp8Tensor

    if not home.cell.steps:
        return stored
    if isinstance(stored, Fp8Tensor):
        import torch

        weight = home.read(stored.weight.view(torch.uint8), config).contiguous()
        return Fp8Tensor(weight.view(torch.float8_e4m3fn), home.read(stored.scale, config).contiguous())
    return replace(stored, blocks=home.read(stored.blocks, config).contiguous())


def _one(
    scheme: Scheme, name: str, shape: tuple[int, ...], files: Mapping[str, TensorFile], where: str | os.PathLike[str]
) -> Packed:
    module = Module(name, shape, files, where)
    return scheme.open(module) or Plain(module)


def _fused_shape(shape: tuple[int, ...], part: str) -> tuple[int, ...]:
    """Canonical [E, out, in] -> the file's [E, in, out], two matrices wide for gate and up."""
    experts, out, inner = shape
    return (experts, inner, 2 * out if part == "gate_up_proj" else out)
