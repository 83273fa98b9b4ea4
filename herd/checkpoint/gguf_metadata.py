"""The metadata of a GGUF file: a mapping from keys to plain values, decoded when asked for.

Opening a file walks over all values once to find their ends, which proves that they lie inside the file; a vocabulary of
128,000 strings is walked in some 15 ms and only becomes Python strings when a tokenizer wants it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from herd.errors import CheckpointError

__all__ = ["Cursor", "Metadata"]

HEADER = 24
"""Bytes before the metadata: where the error about an absent key points."""
BOOL, STRING, ARRAY = 7, 8, 9
_FORMATS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    BOOL: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_NUMBERS = {kind: np.dtype(word) for kind, word in _FORMATS.items()}
"""Value types of the format that have a fixed size."""
MAX_STRINGS = 1 << 21
"""Strings that all arrays of a file may hold together: three times Llama 4's tokens and merges, walked in 0.2 s."""

_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from


class Cursor:
    """A position in `data` that only moves forward and never past the end. Every failure names the field and its byte."""

    def __init__(self, data: memoryview, path: Path, at: int = 0) -> None:
        self.data, self.path, self.at = data, path, at

    def fail(self, why: str, offset: int | None = None, tensor: str | None = None) -> NoReturn:
        """Raise a CheckpointError at `offset`, by default here."""
        raise CheckpointError(why, path=self.path, tensor=tensor, offset=self.at if offset is None else offset)

    def skip(self, nbytes: int, field: str, tensor: str | None = None) -> int:
        """Step over `nbytes`; returns where they start."""
        start = self.at
        if nbytes > len(self.data) - start:
            self.fail(
                f"{field} reaches past the end of the file ({len(self.data)} bytes): is it truncated?", None, tensor
            )
        self.at = start + nbytes
        return start

    def u32(self, field: str, tensor: str | None = None) -> int:
        """An unsigned 32-bit integer."""
        return _u32(self.data, self.skip(4, field, tensor))[0]

    def u64(self, field: str, tensor: str | None = None) -> int:
        """An unsigned 64-bit integer."""
        return _u64(self.data, self.skip(8, field, tensor))[0]

    def text(self, field: str, limit: int | None = None) -> str:
        """A string of at most `limit` bytes."""
        start, length = self.at, self.u64(f"the length of {field}")
        if limit is not None and length > limit:
            self.fail(f"{field} is {length} bytes long: at most {limit} are allowed", start)
        begin = self.skip(length, field)
        return decode(self.data[begin : self.at], self.path, begin, field)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value is: type, first byte of the value (of an array: of its elements), element type and count of an array."""

    kind: int
    at: int
    element: int = -1
    count: int = 0


class Metadata(Mapping[str, Any]):
    """Key -> int, float, bool, str or list of those, in file order. Reading a damaged string raises CheckpointError."""

    def __init__(self, cursor: Cursor, count: int, max_key: int) -> None:
        self._data, self.path = cursor.data, cursor.path
        self._places: dict[str, _Place] = {}
        self._keys_at: dict[str, int] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self._values: dict[str, Any] = {}
        self._strings = 0
        for index in range(count):
            start = cursor.at
            key = cursor.text(f"metadata key {index}", max_key)
            if not key:
                cursor.fail(f"metadata key {index} is empty", start)
            if key in self._places:
                cursor.fail(f"metadata key {key!r} is given twice", start)
            self._keys_at[key], begin = start, cursor.at
            self._places[key] = self._walk(cursor, f"metadata key {key!r}")
            self._spans[key] = begin, cursor.at

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            self._values[key] = self._decode(self._places[key], key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def offset(self, key: str) -> int:
        """The byte at which `key` is written."""
        return self._keys_at[key]

    def size(self, key: str) -> int | None:
        """The number of elements of an array, without decoding it; None for a single value."""
        place = self._places[key]
        return place.count if place.kind == ARRAY else None

    def encoded(self, key: str) -> bytes:
        """The type and value of `key` as the file holds them."""
        begin, end = self._spans[key]
        return bytes(self._data[begin:end])

    def fail(self, key: str, why: str) -> NoReturn:
        """Raise a CheckpointError about `key`, at its place in the file when it is there."""
        raise CheckpointError(f"{key!r} {why}", path=self.path, offset=self._keys_at.get(key, HEADER))

    def _walk(self, cursor: Cursor, field: str) -> _Place:
        """Step over one value."""
        start, kind = cursor.at, cursor.u32(f"the type of {field}")
        if kind in _NUMBERS:
            at = cursor.skip(_NUMBERS[kind].itemsize, field)
            if kind == BOOL and cursor.data[at] > 1:
                cursor.fail(f"{field} is a bool of value {cursor.data[at]}", at)
            return _Place(kind, at)
        if kind == STRING:
            at = cursor.at
            cursor.skip(cursor.u64(f"the length of {field}"), field)
            return _Place(kind, at)
        if kind != ARRAY:
            cursor.fail(f"{field} has the unknown value type {kind}", start)
        start, element = cursor.at, cursor.u32(f"the element type of {field}")
        if element == ARRAY:
            cursor.fail(f"{field} is an array of arrays, which no Llama file uses", start)
        if element not in _NUMBERS and element != STRING:
            cursor.fail(f"{field} has the unknown array element type {element}", start)
        start, count = cursor.at, cursor.u64(f"the element count of {field}")
        at = cursor.at
        if element == STRING:
            self._walk_strings(cursor, count, field, start)
        else:
            cursor.skip(count * _NUMBERS[element].itemsize, f"{field} with {count} elements")
        return _Place(ARRAY, at, element, count)

    def _walk_strings(self, cursor: Cursor, count: int, field: str, start: int) -> None:
        data, at, end = cursor.data, cursor.at, len(cursor.data)
        if count > (end - at) // 8:  # each takes at least its length
            cursor.fail(f"{field} with {count} elements reaches past the end of the file ({end} bytes)", start)
        self._strings += count
        if self._strings > MAX_STRINGS:
            cursor.fail(f"{field} has {count} elements: more than {MAX_STRINGS} strings in one file", start)
        last, before = end - 8, at
        for index in range(count):  # 0.1 us each: nothing but the lengths is looked at
            if at > last:
                cursor.fail(f"element {index} of {field} begins past the end of the file ({end} bytes)", before)
            before = at
            at += 8 + _u64(data, at)[0]
        if at > end:
            cursor.fail(f"element {count - 1} of {field} reaches past the end of the file ({end} bytes)", before)
        cursor.at = at

    def _decode(self, place: _Place, key: str) -> Any:
        if place.kind == STRING:
            return Cursor(self._data, self.path, place.at).text(repr(key))
        if place.kind != ARRAY:
            value = np.frombuffer(self._data, _NUMBERS[place.kind], 1, place.at)[0].item()
            return bool(value) if place.kind == BOOL else value
        if place.element == STRING:
            return self._decode_strings(place, key)
        values = np.frombuffer(self._data, _NUMBERS[place.element], place.count, place.at)
        if place.element != BOOL:
            return values.tolist()
        if values.size and values.max() > 1:
            self.fail(key, "is an array of bools with a value above 1")
        return values.astype(bool).tolist()

    def _decode_strings(self, place: _Place, key: str) -> list[str]:
        data, at, found = self._data, place.at, []
        try:
            for _ in range(place.count):
                (length,) = _u64(data, at)
                found.append(str(data[at + 8 : at + 8 + length], "utf-8"))
                at += 8 + length
        except UnicodeDecodeError:
            Cursor(data, self.path, at).text(f"element {len(found)} of {key!r}")  # raises with the exact byte
        return found


def decode(raw: memoryview, path: Path, offset: int, field: str) -> str:
    """UTF-8 bytes found at `offset` as text. Raises CheckpointError at the first bad byte."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{field} is not UTF-8", path=path, offset=offset + error.start) from error
