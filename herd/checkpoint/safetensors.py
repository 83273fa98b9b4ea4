"""Reader for safetensors files: 8 bytes of header length, a JSON header, then raw little-endian data.

The rules are those of the format's own implementation (github.com/huggingface/safetensors): a header of at most 100 MB,
offsets that tile the data exactly, sizes that follow from dtype and shape. Nothing is allocated before they hold. One rule is
stricter: a name given twice is refused, where that implementation keeps the last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from herd.checkpoint.mapped import MappedFile, Span
from herd.checkpoint.store import TensorInfo
from herd.errors import CheckpointError
from herd.files import parse_json, short
from herd.quant.numbers import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["Entry", "SafetensorsFile"]

MAX_HEADER = 100_000_000
_WORD = 1 << 64  # sizes are unsigned 64-bit in the format

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

NUMBERS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32",
    "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
"""The format's word -> the torch dtype's name. The formats narrower than a byte have no dtype."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file: the format's dtype word, shape, and byte range from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An opened and validated file: `entries` by tensor name in file order, `metadata` strings. Raises CheckpointError."""

    kind = "safetensors"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.map = MappedFile(path)
        self.path = self.map.path
        header, data_start = self._header()
        self.metadata: dict[str, str] = self._metadata(header)
        self.entries: dict[str, Entry] = self._entries(header, data_start)

    def names(self) -> Iterable[str]:
        """Names in file order."""
        return self.entries

    def describe(self, name: str) -> TensorInfo:
        """Shape, dtype and size from the header. Raises CheckpointError for dtypes torch does not have."""
        entry = self.entries[name]
        return TensorInfo(entry.shape, self._number(name), entry.dtype, entry.stop - entry.start)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, a view of the file. Raises CheckpointError for dtypes torch does not have."""
        entry = self.entries[name]
        return self.map.tensor(entry.start, torch_dtype(self._number(name)), entry.shape)

    def span(self, name: str) -> Span:
        """Where the bytes of `name` lie."""
        entry = self.entries[name]
        return Span(entry.start, entry.stop - entry.start)

    def release(self, name: str) -> None:
        """Drop the memory behind a tensor that has been copied."""
        entry = self.entries[name]
        self.map.release(entry.start, entry.stop - entry.start)

    def _number(self, name: str) -> str:
        number = NUMBERS.get(self.entries[name].dtype)
        if number is None:
            raise CheckpointError(f"dtype {self.entries[name].dtype} cannot be read", path=self.path, tensor=name)
        return number

    def _header(self) -> tuple[dict[str, Any], int]:
        size = self.map.size
        if size < 8:
            self._fail(f"{size} bytes are too few for a safetensors file", 0)
        length = int.from_bytes(self.map.bytes(0, 8), "little")
        if length > MAX_HEADER:
            self._fail(f"header length {length} is above the format's limit of {MAX_HEADER}", 0)
        if 8 + length > size:
            self._fail(f"header length {length} reaches past the end of the file ({size} bytes): is it truncated?", 0)
        return parse_json(self.map.bytes(8, length), self.path, 8), 8 + length

    def _metadata(self, header: dict[str, Any]) -> dict[str, str]:
        metadata = header.pop("__metadata__", None)
        if metadata is None:
            return {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._fail("__metadata__ is not a map from strings to strings", 8)
        return metadata

    def _entries(self, header: dict[str, Any], data_start: int) -> dict[str, Entry]:
        parsed = sorted(
            ((name, *self._one(name, info)) for name, info in header.items()), key=lambda item: (item[3], item[4])
        )
        entries, expected = {}, 0
        for name, dtype, shape, start, stop in parsed:
            if start != expected or stop < start:
                self._fail(f"data_offsets [{start}, {stop}] leave a gap or overlap: expected {expected}", 8, name)
            bits = BITS[dtype]
            for n in shape:
                bits *= n
                if bits >= _WORD:
                    self._fail(f"shape {short(list(shape))} overflows", 8, name)
            if bits % 8 or stop - start != bits // 8:
                self._fail(f"{dtype} of shape {short(list(shape))} is not {stop - start} bytes", 8, name)
            entries[name] = Entry(dtype, shape, data_start + start, data_start + stop)
            expected = stop
        if data_start + expected != self.map.size:
            self._fail(f"{self.map.size} bytes, but the header describes {data_start + expected}: is it truncated?", 8)
        return entries

    def _one(self, name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
        """(dtype, shape, start, stop) of one header entry, relative to the data."""
        if isinstance(info, list) and len(info) == 3:  # the format's own reader takes the three fields in order, too
            dtype, shape, offsets = info
        elif isinstance(info, dict):
            dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
        else:
            self._fail("header entry is not an object", 8, name)
        if not isinstance(dtype, str) or dtype not in BITS:
            self._fail(f"unknown dtype {short(dtype)}", 8, name)
        if not isinstance(shape, list) or not all(map(_size, shape)):
            self._fail(f"shape {short(shape)} is not a list of sizes", 8, name)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_size, offsets)):
            self._fail(f"data_offsets {short(offsets)} are not two sizes", 8, name)
        return dtype, tuple(shape), offsets[0], offsets[1]

    def _fail(self, why: str, offset: int, tensor: str | None = None) -> NoReturn:
        raise CheckpointError(why, path=self.path, tensor=None if tensor is None else tensor[:200], offset=offset)


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _WORD
