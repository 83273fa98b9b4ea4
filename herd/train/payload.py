"""The tensors of a training checkpoint on the disk. One process writes one safetensors file; with several ranks
`herd.parallel.checkpoint` stands in here. Whether a checkpoint is whole is not decided here, see `herd.train.state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from herd.checkpoint.safetensors import SafetensorsFile
from herd.checkpoint.write.planned import Planned
from herd.checkpoint.write.safetensors import FORMAT, write_safetensors
from herd.errors import CheckpointError
from herd.parallel.checkpoint import Sharded, local, own_part

__all__ = ["OneFile", "Payload", "Ranks", "Read"]

FILE = "tensors.safetensors"

_STORED = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


Read = Callable[[Mapping[str, Tensor]], None]
"""Fills the tensors of these names in place. Raises CheckpointError."""


class Payload(Protocol):
    """Tensors by name into a folder and back. Every rank calls both, with the same names in the same order."""

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write this rank's files into `folder`, which exists; they are on the disk on return. Raises OSError."""
        ...

    def read(self, folder: Path, targets: Mapping[str, Tensor]) -> None:
        """Fill `targets` in place from what `write` left, whatever the number of ranks was. Raises CheckpointError."""
        ...

    def opened(self, folder: Path) -> Read:
        """`read` of `folder` again and again, with some of the tensors each time. Raises CheckpointError."""
        ...


class OneFile:
    """A payload of one process. Tensors are streamed from where they are: nothing is held twice."""

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        write_safetensors(
            folder / FILE, [_planned(name, t) for name, t in tensors.items()], FORMAT, lambda nbytes: None
        )

    def read(self, folder: Path, targets: Mapping[str, Tensor]) -> None:
        self.opened(folder)(targets)

    def opened(self, folder: Path) -> Read:
        file = SafetensorsFile(folder / FILE)

        def read(targets: Mapping[str, Tensor]) -> None:
            missing = sorted(set(targets) - set(file.names()))
            if missing:
                raise CheckpointError(f"lacks {len(missing)} tensors, {missing[0]} among them", path=file.path)
            with torch.no_grad():
                for name, target in targets.items():
                    target.copy_(_kept(file, name, target))
                    file.release(name)

        return read


class Ranks:
    """A payload of a run on any number of ranks: several write what each holds, one writes one file; each reads what either
    wrote. `tied` as for `herd.parallel.checkpoint.Sharded`."""

    def __init__(self, world: int, *, tied: bool = False) -> None:
        self.world, self.sharded = world, Sharded(tied=tied)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        (OneFile() if self.world == 1 else self.sharded).write(folder, tensors)

    def read(self, folder: Path, targets: Mapping[str, Tensor]) -> None:
        self.opened(folder)(targets)

    def opened(self, folder: Path) -> Read:
        if not (folder / FILE).exists():
            return self.sharded.opened(folder)
        return OneFile().opened(folder) if self.world == 1 else self._cut(folder)

    def _cut(self, folder: Path) -> Read:
        """Each rank takes its part of one tensor after the other."""
        file = SafetensorsFile(folder / FILE)

        def read(targets: Mapping[str, Tensor]) -> None:
            with torch.no_grad():
                for name, target in self.sharded.named(targets).items():
                    if name not in file.names():
                        raise CheckpointError("is missing", path=file.path, tensor=name)
                    local(target).copy_(own_part(_kept(file, name, target), target))
                    file.release(name)

        return read


def _kept(file: SafetensorsFile, name: str, target: Tensor) -> Tensor:
    """The tensor of a file, mapped. Raises CheckpointError when it is not of the (whole) target's dtype and shape."""
    kept = file.tensor(name)
    if target.dtype not in _STORED and kept.dtype == torch.int8:
        kept = kept.view(target.dtype)
    if kept.dtype != target.dtype or kept.shape != target.shape:
        why = f"is {kept.dtype} {list(kept.shape)}, and {target.dtype} {list(target.shape)} is wanted"
        raise CheckpointError(why, path=file.path, tensor=name)
    return kept


def _planned(name: str, tensor: Tensor) -> Planned:
    stored = _STORED.get(tensor.dtype)
    if stored is not None:
        return Planned(name, tuple(tensor.shape), stored, lambda: tensor.detach().cpu())
    # Bytes, booleans, 8-bit floats: the writer knows one type of one byte.
    assert tensor.element_size() == 1, tensor.dtype
    return Planned(name, tuple(tensor.shape), "I8", lambda: tensor.detach().cpu().contiguous().view(torch.int8))
