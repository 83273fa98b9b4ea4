"""A part of one tensor of a checkpoint, copied into its place: what one of many ranks holds of it.

A part may be cut along several dimensions (tensor parallel and FSDP at once), through heads and through blocks: what is read is
the least that contains it, a few rows at a time.
"""

from __future__ import annotations

from torch import Tensor

from herd.checkpoint.mapped import slices
from herd.checkpoint.store import KeepsBlocks, ReadsParts, Releases, TensorStore
from herd.model.late import Index
from herd.quant.scheme import QuantTensor

__all__ = ["copy_portion"]

PIECE = 8 << 20
"""Bytes of rows that are read at a time: passing copies are made of some formats (heads that are paired anew, files of several
ranks that are joined)."""
_HEADS = (".wq.weight", ".wk.weight")


def copy_portion(store: TensorStore, name: str, index: Index, out: Tensor) -> None:
    """Copy the part `index` of the tensor `name` into `out`, of the part's shape and any dtype and device."""
    if not out.numel():
        return
    raw = store.raw(name) if isinstance(store, KeepsBlocks) else None
    for rows in slices(out, PIECE):
        count = len(range(*rows.indices(len(out))))
        first = index[0].start + rows.start
        here = (slice(first, first + count), *index[1:])
        if isinstance(raw, QuantTensor):
            _copy_blocks(raw, here, out[rows])
        else:
            out[rows].copy_(_read(store, name, here))
        if isinstance(store, Releases):
            store.release(name)


def _copy_blocks(raw: QuantTensor, index: Index, out: Tensor) -> None:
    """Rows of blocks as numbers; of a part of each row, the whole rows are decoded, some at a time."""
    blocks = raw.blocks[index[:-1]]
    for rows in slices(out):
        part = blocks[rows]
        values = QuantTensor(part, raw.type, (*part.shape[:-1], raw.shape[-1])).dequantize(out.dtype)
        out[rows].copy_(values[..., index[-1]])


def _read(store: TensorStore, name: str, index: Index) -> Tensor:
    """The part as `read` gives it, from no more of the file than the format makes necessary."""
    shape = store.info(name).shape
    cut = [dim for dim, part in enumerate(index) if (part.start, part.stop) != (0, shape[dim])]
    if not cut or not isinstance(store, ReadsParts):
        return store.read(name)[index]
    dim = cut[0]
    start, stop = index[dim].start, index[dim].stop
    if dim == 0 and name.endswith(_HEADS):  # parts of heads are whole heads
        width = store.config.head_dim
        start, stop = start // width * width, min(-(-stop // width) * width, shape[0])
    read = store.read_part(name, dim, start, stop - start)
    own = slice(index[dim].start - start, index[dim].stop - start)
    return read[(*index[:dim], own, *index[dim + 1 :])]
