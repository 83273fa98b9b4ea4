"""Reader for GGUF files, versions 2 and 3, little endian: header, metadata, tensor descriptions, then aligned data.

Nothing in the file is believed before it is checked: every count, length, offset and size is compared with the bytes that
are there, so that no damaged or hostile file makes herd allocate, loop or read beyond it. Every refusal is a CheckpointError
naming the field and its byte. Sources: ggml docs/gguf.md; limits on names and dimensions: ggml.h and gguf.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from herd.checkpoint.gguf_metadata import Cursor, Metadata
from herd.checkpoint.mapped import MappedFile
from herd.checkpoint.store import TensorInfo
from herd.errors import CheckpointError
from herd.files import short
from herd.quant.scheme import BlockType, QuantTensor, block_type

if TYPE_CHECKING:
    import torch

__all__ = ["Entry", "GGUFFile"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEY = 1024
MAX_NAME = 64
MAX_DIMS = 4
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 15
MAX_ALIGNMENT = 1 << 21
"""A huge page: more serves no reader. The format's default is 32."""

_KEY_BYTES = 8 + 1 + 4 + 1  # the shortest possible metadata entry: key length, key, type, value
_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # and tensor description: name length, name, dimensions, size, type, offset


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: type, shape (outermost dimension first, as in torch), byte range from the start of the file."""

    type: BlockType
    shape: tuple[int, ...]
    start: int
    stop: int


class GGUFFile:
    """An opened and validated file: `metadata` by key, `entries` by tensor name in file order. Raises CheckpointError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.map = MappedFile(path)
        self.path = self.map.path
        cursor = Cursor(self.map.view(), self.path)
        self.version, tensors, keys = _header(cursor)
        self.metadata = Metadata(cursor, keys, MAX_KEY)
        self.alignment = _alignment(self.metadata)
        found = _tensors(cursor, tensors)
        self.data_start = _aligned(cursor.at, self.alignment)
        self.entries = _place(cursor, found, self.data_start, self.alignment)

    def names(self) -> Iterable[str]:
        """Tensor names in file order."""
        return self.entries

    def describe(self, name: str) -> TensorInfo:
        """Shape and stored type; the dtype is that of the values: float32 for quantized blocks."""
        entry = self.entries[name]
        return TensorInfo(entry.shape, entry.type.number or "float32", entry.type.name, entry.stop - entry.start)

    def tensor(self, name: str) -> torch.Tensor:
        """The values: a view of the file for plain types, dequantized to float32 otherwise. Raises CheckpointError."""
        stored = self.raw(name)
        if not isinstance(stored, QuantTensor):
            return stored
        if not stored.type.decodable:
            raise CheckpointError(f"herd cannot dequantize {stored.type.name} blocks", path=self.path, tensor=name)
        return stored.dequantize()

    def raw(self, name: str) -> torch.Tensor | QuantTensor:
        """What the file holds, as a view of it: a tensor of a plain type, or quantized blocks."""
        import torch

        entry = self.entries[name]
        if entry.type.dtype is not None:
            return self.map.tensor(entry.start, entry.type.dtype, entry.shape)
        stored = (*entry.shape[:-1], entry.type.row_bytes(entry.shape[-1]))
        return QuantTensor(self.map.tensor(entry.start, torch.uint8, stored), entry.type, entry.shape)

    def release(self, name: str) -> None:
        """Let go of the memory behind a tensor that has been copied."""
        entry = self.entries[name]
        self.map.release(entry.start, entry.stop - entry.start)


def _header(cursor: Cursor) -> tuple[int, int, int]:
    """(version, tensor count, key count)."""
    magic = bytes(cursor.data[:4])
    if magic != MAGIC:
        cursor.fail(f"does not start with the letters GGUF but with {magic!r}: it is not a GGUF file", 0)
    cursor.skip(4, "magic")
    version = cursor.u32("version")
    if version not in VERSIONS:
        cursor.fail(_version_trouble(version), 4)
    size = len(cursor.data)
    counts = []
    for field, limit, each in (("tensor", MAX_TENSORS, _TENSOR_BYTES), ("metadata key", MAX_KEYS, _KEY_BYTES)):
        start, count = cursor.at, cursor.u64(f"the {field} count")
        if count >= 1 << 63:
            cursor.fail(f"the {field} count is {count - (1 << 64)}: it cannot be negative", start)
        if count > limit:
            cursor.fail(f"the {field} count is {count}: herd reads at most {limit}", start)
        if count * each > size - start:
            cursor.fail(f"the {field} count is {count}, too many for a file of {size} bytes: is it truncated?", start)
        counts.append(count)
    return version, counts[0], counts[1]


def _version_trouble(version: int) -> str:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if 1 <= swapped <= max(VERSIONS):
        return "a big-endian GGUF file: convert it again for little-endian machines"
    if version == 1:
        return "GGUF version 1 is no longer readable: convert the model again with a current llama.cpp"
    return f"GGUF version {version} is unknown: herd reads versions {VERSIONS[0]} and {VERSIONS[-1]}"


def _alignment(metadata: Metadata) -> int:
    key = "general.alignment"
    value = metadata.get(key, 32)
    if type(value) is not int:
        metadata.fail(key, f"is {short(value)}: expected an integer")
    if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        metadata.fail(key, f"is {value}: expected a power of two between 8 and {MAX_ALIGNMENT}")
    return value


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor description before its place is known. `at` is the byte of its offset field."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    at: int


def _tensors(cursor: Cursor, count: int) -> list[_Found]:
    found, names = [], set()
    for index in range(count):
        start = cursor.at
        name = cursor.text(f"the name of tensor {index}", MAX_NAME)
        if not name:
            cursor.fail(f"the name of tensor {index} is empty", start)
        if name in names:
            cursor.fail("this tensor name is given twice", start, name)
        names.add(name)
        found.append(_tensor(cursor, name))
    return found


def _tensor(cursor: Cursor, name: str) -> _Found:
    start, n_dims = cursor.at, cursor.u32("the dimension count", name)
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"{n_dims} dimensions: expected 1 to {MAX_DIMS}", start, name)
    sizes, values, shape_at = [], 1, cursor.at
    for _ in range(n_dims):
        start, size = cursor.at, cursor.u64("the shape", name)
        if not 1 <= size < 1 << 63:
            size = size if size < 1 << 63 else size - (1 << 64)
            cursor.fail(f"a dimension of size {size}: sizes are positive", start, name)
        sizes.append(size)
        values *= size
        if values >= 1 << 63:
            cursor.fail(f"shape {sizes[::-1]} overflows", shape_at, name)
    start, number = cursor.at, cursor.u32("the type", name)
    kind = block_type(number)
    if kind is None:
        cursor.fail(f"unknown tensor type {number}", start, name)
    try:
        nbytes = values // sizes[0] * kind.row_bytes(sizes[0])  # the file lists the innermost dimension first
    except ValueError as error:
        raise CheckpointError(str(error), path=cursor.path, tensor=name, offset=shape_at) from error
    start, offset = cursor.at, cursor.u64("the data offset", name)
    return _Found(name, kind, tuple(reversed(sizes)), offset, nbytes, start)


def _place(cursor: Cursor, found: list[_Found], data_start: int, alignment: int) -> dict[str, Entry]:
    """Check that every tensor lies inside the file, aligned, and on its own."""
    size, entries = len(cursor.data), {}
    for t in found:
        start = data_start + t.offset
        if t.offset % alignment:
            cursor.fail(f"data offset {t.offset} is not a multiple of the alignment {alignment}", t.at, t.name)
        if start + t.nbytes > size:
            cursor.fail(
                f"{t.nbytes} bytes of {t.type.name} data at byte {start} reach past the end of the file ({size} bytes): "
                "is it truncated?",
                t.at,
                t.name,
            )
        entries[t.name] = Entry(t.type, t.shape, start, start + t.nbytes)
    order = sorted(found, key=lambda t: t.offset)
    for before, after in pairwise(order):
        if before.offset + before.nbytes > after.offset:
            cursor.fail(f"data overlaps that of tensor {before.name!r}", after.at, after.name)
    return entries


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
