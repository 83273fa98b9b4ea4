"""GGUF v3 files, little endian: header, typed metadata, tensor descriptions, then aligned data, one tensor at a time.

Source: ggml docs/gguf.md; limits: ggml.h and gguf.cpp, which `herd.checkpoint.gguf` enforces when it reads.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from herd.checkpoint.write.large import LargeFile
from herd.checkpoint.write.pieces import pieces
from herd.checkpoint.write.planned import Planned, Tick
from herd.errors import CheckpointError
from herd.quant.scheme import block_type

__all__ = ["Encoded", "Typed", "encoded", "encoded_metadata", "write_gguf_file"]

VERSION = 3
ALIGNMENT = 32
MAX_NAME = 63
"""Bytes: ggml keeps names in 64 with a closing zero."""
MAX_DIMS = 4

_NUMBERS = {
    "u8": (0, "<u1"),
    "i8": (1, "<i1"),
    "u16": (2, "<u2"),
    "i16": (3, "<i2"),
    "u32": (4, "<u4"),
    "i32": (5, "<i4"),
    "f32": (6, "<f4"),
    "bool": (7, "<u1"),
    "u64": (10, "<u8"),
    "i64": (11, "<i8"),
    "f64": (12, "<f8"),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Typed:
    """A value, or a list of values, of the type `kind`: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64 or str."""

    kind: str
    value: Any


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as another file holds it: its type and its bytes."""

    data: bytes


def write_gguf_file(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    planned: Sequence[Planned],
    tick: Tick,
    alignment: int = ALIGNMENT,
) -> None:
    """Write the file `path`: metadata in the order given, then each tensor when its turn comes.

    Values of `metadata`: bool, int (u32), float (f32), str, lists of those (ints: i32), Typed or Encoded. `tick` is told the
    bytes of tensor data written. An alignment other than 32 is added to the metadata. The file is on the disk on return.
    Raises CheckpointError naming key or tensor, and OSError as the system does.
    """
    assert alignment in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096), alignment
    place = Path(path)
    keys = dict(metadata)
    if alignment != ALIGNMENT:
        keys["general.alignment"] = alignment
    _check_names(place, planned)
    with LargeFile(place) as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", VERSION, len(planned), len(keys)))
        file.write(encoded_metadata(keys, place))
        offset = 0
        for plan in planned:
            file.write(_description(plan, offset))
            offset = _aligned(offset + plan.nbytes, alignment)
        _pad(file, alignment)
        for plan in planned:
            for piece in pieces(plan, plan.make()):
                tick(file.write(piece))
            _pad(file, alignment)
        file.sync()


def encoded_metadata(metadata: Mapping[str, Any], path: Path) -> bytes:
    """All keys and values, as `write_gguf_file` puts them into the file `path`. Raises CheckpointError naming the key."""
    return b"".join(_text(key) + _value(path, key, value) for key, value in metadata.items())


def encoded(value: Any) -> bytes:
    """Type and bytes of one metadata value, as they stand in a file. Raises ValueError for what GGUF cannot hold."""
    if isinstance(value, Encoded):
        return value.data
    if isinstance(value, Typed) and value.kind == "str":
        return struct.pack("<IIQ", _ARRAY, _STRING, 0) if value.value == [] else encoded(value.value)
    if isinstance(value, Typed):
        number, word = _NUMBERS[value.kind]
        data = _numbers(value.value, value.kind, word)
        if isinstance(value.value, list | tuple):
            return struct.pack("<IIQ", _ARRAY, number, len(value.value)) + data
        return struct.pack("<I", number) + data
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list | tuple):
        return _list(value)
    return encoded(Typed(_kind(value, "u32"), value))


def _list(values: Sequence[Any]) -> bytes:
    if not values:
        raise ValueError("an empty list has no type: say which with Typed")
    if all(isinstance(v, str) for v in values):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + _strings(values)
    kinds = {_kind(v, "i32") for v in values}
    if len(kinds) > 1:
        raise ValueError(f"a list of {' and '.join(sorted(kinds))}: its values must be of one type")
    return encoded(Typed(kinds.pop(), values))


def _kind(value: Any, whole: str) -> str:
    kind = {bool: "bool", int: whole, float: "f32"}.get(type(value))
    if kind is None:
        raise ValueError(
            f"a value of type {type(value).__name__}: GGUF holds numbers, bools, strings and lists of them"
        )
    return kind


def _numbers(values: Any, kind: str, word: str) -> bytes:
    given = np.asarray(values)
    if kind in ("f32", "f64"):
        with np.errstate(over="ignore"):
            stored = given.astype(word)
        if not np.isfinite(stored[np.isfinite(given.astype(np.float64))]).all():
            raise ValueError(f"a number too large for {kind}")
        return stored.tobytes()
    if kind == "bool":
        return given.astype(bool).astype(word).tobytes()
    if given.dtype.kind not in "iu" and given.size:
        raise ValueError(f"not whole numbers that fit {kind}")
    limits = np.iinfo(word)
    if given.size and not limits.min <= int(given.min()) <= int(given.max()) <= limits.max:
        raise ValueError(f"a number outside {limits.min} to {limits.max}, the range of {kind}")
    return given.astype(word).tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _strings(texts: Iterable[str]) -> bytes:
    return b"".join(map(_text, texts))


def _value(path: Path, key: str, value: Any) -> bytes:
    try:
        return encoded(value)
    except ValueError as error:  # also UnicodeEncodeError: half a surrogate pair
        raise CheckpointError(f"key {key!r} cannot be written: {error}", path=path) from error


def _check_names(path: Path, planned: Sequence[Planned]) -> None:
    seen: set[str] = set()
    for plan in planned:
        if plan.name in seen:
            raise CheckpointError("this tensor would be written twice", path=path, tensor=plan.name)
        seen.add(plan.name)
        if not 1 <= len(plan.name.encode()) <= MAX_NAME:
            raise CheckpointError(f"GGUF names have 1 to {MAX_NAME} bytes", path=path, tensor=plan.name)
        if not 1 <= len(plan.shape) <= MAX_DIMS:
            raise CheckpointError(
                f"{len(plan.shape)} dimensions: GGUF tensors have 1 to {MAX_DIMS}", path=path, tensor=plan.name
            )


def _description(plan: Planned, offset: int) -> bytes:
    kind = block_type(plan.stored)
    assert kind is not None, plan.stored
    dims = plan.shape[::-1]  # the file lists the innermost dimension first
    return _text(plan.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind.id, offset)


def _pad(file: LargeFile, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
