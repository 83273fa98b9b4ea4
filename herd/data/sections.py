"""Files of named arrays that are mapped, and whose bytes are checked before they are used. No torch.

Layout, little-endian: a head of 32 bytes (magic, version, length and CRC-32 of the header), the header (JSON: what the file is,
and of each array its dtype, length and place), the arrays, each at a multiple of ALIGN, and the CRC-32 of every BLOCK bytes of
what stands between header and checks. A block is checked when it is first read: opening a file costs nothing, and a damaged
one is refused with the place of the damage and never trained on.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from herd.errors import CheckpointError, DataError
from herd.files import parse_json, whole_file

__all__ = ["Sections", "content_of", "write_sections"]

MAGIC = b"HERDROWS"
VERSION = 1
HEAD = struct.Struct("<8sIII12x")
ALIGN = 64
BLOCK = 1 << 16
MAX_HEADER = 16 << 20
TYPES = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64, "i4": np.int32, "i8": np.int64}

Array = NDArray[Any]


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def content_of(arrays: Mapping[str, Array]) -> str:
    """SHA-256 of names, types and values of `arrays`, by name."""
    digest = sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.size}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_sections(path: Path, about: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write one file, whole or not at all, flushed to the disk. The same arguments give the same bytes.

    `about` are JSON values that come back as `Sections.about`; every array has one dimension. Raises DataError when the disk
    refuses, saying how much is needed.
    """
    places: dict[str, dict[str, Any]] = {}
    at = 0
    for name, array in arrays.items():
        kind = next(key for key, dtype in TYPES.items() if array.dtype == dtype)
        assert array.ndim == 1
        places[name] = {"type": kind, "count": int(array.size), "at": at}
        at = _aligned(at + array.nbytes)
    body = bytearray(at)
    for name, array in arrays.items():
        start = places[name]["at"]
        body[start : start + array.nbytes] = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
    checks = struct.pack(
        f"<{-(-at // BLOCK)}I", *(zlib.crc32(memoryview(body)[i : i + BLOCK]) for i in range(0, at, BLOCK))
    )
    header = {
        "about": dict(about),
        "arrays": places,
        "body": at,
        "content": content_of(arrays),
        "checks": zlib.crc32(checks),
    }
    text = json.dumps(header, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (_aligned(HEAD.size + len(text)) - HEAD.size - len(text))
    try:
        with whole_file(path, size=HEAD.size + len(text) + at + len(checks)) as file:
            for part in (HEAD.pack(MAGIC, VERSION, len(text), zlib.crc32(text)), text, body, checks):
                file.write(part)
    except CheckpointError as error:
        raise DataError(str(error)) from error


class Sections:
    """One file of arrays, open for reading. Raises DataError, naming file and byte, for anything that is not as it was written.

    `about` is what the writer said, `content` the SHA-256 of the arrays, `counts` how many values each has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(HEAD.size)
                size = os.fstat(file.fileno()).st_size
                if len(head) < HEAD.size or head[: len(MAGIC)] != MAGIC:
                    self._refuse(0, "this is no file of tokenized data")
                _, version, length, crc = HEAD.unpack(head)
                if version != VERSION:
                    self._refuse(8, f"format {version}; this herd reads format {VERSION}")
                if length > min(MAX_HEADER, size):
                    self._refuse(12, f"a header of {length} bytes in a file of {size}")
                text = file.read(length)
                if len(text) != length or zlib.crc32(text) != crc:
                    self._refuse(HEAD.size, "the header is damaged")
                self._read_header(parse_json(text, path, HEAD.size), HEAD.size + length, size)
                file.seek(self._start + self._body)
                raw = file.read(4 * self._blocks)
                if zlib.crc32(raw) != self._crc:
                    self._refuse(self._start + self._body, "the list of checksums is damaged")
                self._checks = np.frombuffer(raw, "<u4")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        except CheckpointError as error:
            raise DataError(str(error)) from error
        self._map: Array = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        self._seen = np.zeros(self._blocks, bool)

    def _refuse(self, at: int, why: str) -> NoReturn:
        raise DataError(f"{self.path}, byte {at}: {why}; delete the file and build it again")

    def _read_header(self, header: dict[str, Any], start: int, size: int) -> None:
        try:
            self.about: dict[str, Any] = header["about"]
            self.content = str(header["content"])
            self._body, self._crc, self._start = int(header["body"]), int(header["checks"]), start
            self._places = {
                name: (np.dtype(TYPES[place["type"]]), int(place["count"]), int(place["at"]))
                for name, place in header["arrays"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._refuse(HEAD.size, f"the header lacks what belongs there ({error!r})")
        self._blocks = -(-self._body // BLOCK)
        if self._body < 0 or start + self._body + 4 * self._blocks != size:
            self._refuse(size, f"the file has {size} bytes where {start + self._body + 4 * self._blocks} were written")
        for name, (dtype, count, at) in self._places.items():
            if count < 0 or at < 0 or at % ALIGN or at + count * dtype.itemsize > self._body:
                self._refuse(HEAD.size, f"{name} lies outside of the file")

    @property
    def counts(self) -> dict[str, int]:
        """How many values each array has."""
        return {name: count for name, (_, count, _) in self._places.items()}

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of the array `name`."""
        return self._places[name][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Values start..stop of the array `name`: a view of the mapped file whose bytes have been checked."""
        dtype, count, at = self._places[name]
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise IndexError(f"{self.path}: {name}[{start}:{stop}] of {count}")
        first, last = at + start * dtype.itemsize, at + stop * dtype.itemsize
        self._check(first, last, name)
        return self._map[self._start + first : self._start + last].view(dtype)

    def verify(self) -> None:
        """Check every byte now."""
        self._check(0, self._body, "the data")
        found = content_of({name: self.read(name) for name in self._places})
        if found != self.content:
            self._refuse(self._start, "the content is not what its SHA-256 says")

    def _check(self, first: int, last: int, name: str) -> None:
        for block in range(first // BLOCK, -(-last // BLOCK)):
            if self._seen[block]:
                continue
            at = self._start + block * BLOCK
            end = self._start + min((block + 1) * BLOCK, self._body)
            if zlib.crc32(self._map[at:end].data) != int(self._checks[block]):
                self._refuse(at, f"the checksum of this block ({name}) differs, the data is damaged")
            self._seen[block] = True
