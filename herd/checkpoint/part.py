"""One rank's part of a checkpoint: a TensorStore that reads only what that rank holds.

To `fill` it is a checkpoint of a smaller model (`Part.config`), so every form that weights can have is made of the part alone.
Rows that are cut stay views of the file; columns are copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from herd.checkpoint.mapped import slices
from herd.checkpoint.store import KeepsBlocks, ReadsInto, ReadsParts, Releases, TensorInfo, TensorStore, packed_of
from herd.errors import CheckpointError
from herd.parallel.part import Part
from herd.quant.scheme import QuantTensor, block_type

if TYPE_CHECKING:
    import torch

__all__ = ["PartStore"]


class PartStore:
    """`part` of `store`. Raises CheckpointError for matrices in a form that is not cut: what GPTQ and its like made."""

    def __init__(self, store: TensorStore, part: Part) -> None:
        self.kind, self.path, self.config, self.part = store.kind, store.path, part.config, part
        self.skipped: tuple[str, ...] = getattr(store, "skipped", ()) if part.rank == 0 else ()
        self._store = store
        for name in store.names():
            if (packed := packed_of(store, name)) is not None:
                raise CheckpointError(
                    f"is quantized as {packed.word}, which is not shared by several ranks: herd convert makes a GGUF file of it, "
                    "which is",
                    path=store.path,
                    tensor=name,
                )

    def names(self) -> Iterable[str]:
        """Canonical names present, the tied output excluded."""
        return self._store.names()

    def info(self, name: str) -> TensorInfo:
        """As of the whole, with this part's shape and share of the bytes."""
        info = self._store.info(name)
        cut = self.part.cut(name, info.shape)
        if cut is None:
            return info
        dim, _, count = cut
        shape = (*info.shape[:dim], count, *info.shape[dim + 1 :])
        return replace(info, shape=shape, nbytes=info.nbytes * math.prod(shape) // max(1, math.prod(info.shape)))

    def read(self, name: str) -> torch.Tensor:
        """This part of the tensor: a view of the file for whole rows, where its layout allows one."""
        info = self._store.info(name)
        cut = self.part.cut(name, info.shape)
        if cut is None:
            return self._store.read(name)
        if (kind := block_type(info.stored)) is not None and kind.dtype is None:
            import torch

            out = torch.empty(self.info(name).shape, dtype=info.dtype)
            self.read_into(name, out)
            return out
        if isinstance(self._store, ReadsParts):
            return self._store.read_part(name, *cut).contiguous()
        return self._store.read(name).narrow(*cut).contiguous()

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Decode or copy this part into `out`, a few rows at a time."""
        cut = self.part.cut(name, self._store.info(name).shape)
        if cut is None and isinstance(self._store, ReadsInto):
            self._store.read_into(name, out)
            return
        whole = self._store.raw(name) if isinstance(self._store, KeepsBlocks) else None
        if not isinstance(whole, QuantTensor):
            source = self.read(name)
            for rows in slices(out):
                out[rows].copy_(source[rows])
                self.release(name)
            return
        dim, start, count = cut or (0, 0, whole.shape[0])
        blocks = whole.blocks.narrow(dim, start, count) if dim < len(whole.shape) - 1 else whole.blocks
        for rows in slices(out):
            part = QuantTensor(blocks[rows], whole.type, (*blocks[rows].shape[:-1], whole.shape[-1]))
            values = part.dequantize(out.dtype)
            out[rows].copy_(values if dim < len(whole.shape) - 1 else values.narrow(dim, start, count))
            self.release(name)

    def raw(self, name: str) -> torch.Tensor | QuantTensor:
        """As `read`, but quantized blocks as they are. Raises CheckpointError where a cut would go through a block."""
        whole = self._store.raw(name) if isinstance(self._store, KeepsBlocks) else None
        if not isinstance(whole, QuantTensor):
            return self.read(name)
        cut = self.part.cut(name, whole.shape)
        if cut is None:
            return whole
        dim, start, count = cut
        shape, kind = self.info(name).shape, whole.type
        if dim < len(whole.shape) - 1:
            return QuantTensor(whole.blocks.narrow(dim, start, count).contiguous(), kind, shape)
        if start % kind.values or count % kind.values:
            raise CheckpointError(
                f"has rows of {whole.shape[-1]:,} numbers in {kind.name} blocks of {kind.values}: {self.part.ranks} ranks would "
                f"get {count:,} each, which are not whole blocks. Use weights='int8' or 'plain', or another number of ranks",
                path=self.path,
                tensor=name,
            )
        cut_bytes = (start // kind.values * kind.nbytes, count // kind.values * kind.nbytes)
        return QuantTensor(whole.blocks.narrow(dim, *cut_bytes).contiguous(), kind, shape)

    def release(self, name: str) -> None:
        """The file pages behind `name` may leave memory."""
        if isinstance(self._store, Releases):
            self._store.release(name)

    def metadata(self) -> Mapping[str, Any]:
        """That of the whole."""
        return self._store.metadata()
