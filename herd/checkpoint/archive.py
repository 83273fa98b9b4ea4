"""The zip container of torch.save: where each uncompressed entry's bytes lie in the mapped file.

Own code instead of the zipfile module, because the limits come before the memory: entry count, names, compression,
encryption and overlap are checked while the directory is walked. Format: PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import struct
from typing import NoReturn

from herd.checkpoint.mapped import MappedFile, Span
from herd.errors import CheckpointError
from herd.files import short

__all__ = ["read_archive"]

MAX_ENTRIES = 100_000


def read_archive(file: MappedFile) -> dict[str, Span]:
    """Entry name -> where its data lies. Raises CheckpointError for anything torch.save would not write."""
    directory, size, count = _directory(file)
    if count > MAX_ENTRIES:
        _fail(file, f"the archive has {count} entries, more than {MAX_ENTRIES}", directory)
    entries: dict[str, Span] = {}
    at, end = directory, directory + size
    for _ in range(count):
        name, span, at = _entry(file, at, end, directory)
        if name in entries:
            _fail(file, f"the archive holds {short(name)} twice", at)
        entries[name] = span
    _refuse_overlap(file, entries)
    return entries


def _directory(file: MappedFile) -> tuple[int, int, int]:
    """(offset, size, entry count) of the central directory."""
    at = file.find_last(b"PK\x05\x06", max(0, file.size - 65_557))
    if at < 0 or at + 22 > file.size:
        _fail(file, "the zip archive has no directory at its end: is the file truncated?", file.size)
    _, _, _, count, size, offset, comment = struct.unpack("<4H2IH", file.bytes(at + 4, 18))
    if at + 22 + comment != file.size:
        _fail(file, f"{file.size - at - 22 - comment} bytes follow the end of the zip archive", at)
    if at >= 20 and file.bytes(at - 20, 4) == b"PK\x06\x07":  # zip64: the real numbers are elsewhere
        (where,) = struct.unpack("<Q", file.bytes(at - 12, 8))
        if where + 56 > file.size or file.bytes(where, 4) != b"PK\x06\x06":
            _fail(file, "the zip64 directory is not where it should be", at - 20)
        count, size, offset = struct.unpack("<3Q", file.bytes(where + 32, 24))
    if offset + size > file.size:
        _fail(file, f"the directory of {size} bytes at {offset} reaches past the end of the file", at)
    return offset, size, count


def _entry(file: MappedFile, at: int, end: int, directory: int) -> tuple[str, Span, int]:
    """(name, data span, offset of the next record) of the directory record at `at`."""
    head = file.bytes(at, 46) if at + 46 <= end else b""
    if head[:4] != b"PK\x01\x02":
        _fail(file, "the archive's directory is damaged", at)
    flags, method = struct.unpack("<HH", head[8:12])
    packed, size, name_length, extra_length, comment_length = struct.unpack("<IIHHH", head[20:34])
    (local,) = struct.unpack("<I", head[42:46])
    raw = file.bytes(at + 46, name_length)
    name = _name(file, raw, at)
    extra = file.bytes(at + 46 + name_length, extra_length)
    following = at + 46 + name_length + extra_length + comment_length
    if following > end:
        _fail(file, "the archive's directory is damaged", at)
    size, packed, local = _wide(file, extra, (size, packed, local), at)
    if flags & 0x41 or method != 0 or packed != size:
        _fail(file, f"the entry {short(name)} is compressed or encrypted, which torch.save never does", at)
    header = file.bytes(local, 30) if local + 30 <= directory else b""
    if header[:4] != b"PK\x03\x04":
        _fail(file, f"the entry {short(name)} does not start where the directory says", at)
    names, extras = struct.unpack("<HH", header[26:30])
    start = local + 30 + names + extras
    if file.bytes(local + 30, names) != raw or start + size > directory:
        _fail(file, f"the entry {short(name)} does not lie inside the file", at)
    return name, Span(start, size), following


def _name(file: MappedFile, raw: bytes, at: int) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        _fail(file, "an entry name is not UTF-8", at)
    if not name or "\\" in name or "\0" in name or name.startswith("/") or ":" in name or ".." in name.split("/"):
        _fail(file, f"the entry name {short(name)} leads outside of the archive", at)
    return name


def _wide(file: MappedFile, extra: bytes, values: tuple[int, int, int], at: int) -> tuple[int, int, int]:
    """Replace fields that say 0xFFFFFFFF by their 64-bit values from the zip64 extra field."""
    if 0xFFFFFFFF not in values:
        return values
    place, found = 0, (-1, -1, -1)
    while place + 4 <= len(extra):
        tag, length = struct.unpack("<HH", extra[place : place + 4])
        body = extra[place + 4 : place + 4 + length]
        if tag == 1:
            wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            found = (*(next(wide, -1) if v == 0xFFFFFFFF else v for v in values),)
            break
        place += 4 + length
    size, packed, local = found
    if min(found) < 0:
        _fail(file, "the archive's directory is damaged: a 64-bit size is missing", at)
    return size, packed, local


def _refuse_overlap(file: MappedFile, entries: dict[str, Span]) -> None:
    """No two entries share bytes, so together they are no larger than the file."""
    end = 0
    for name, span in sorted(entries.items(), key=lambda item: item[1]):
        if span.start < end:
            _fail(file, f"the entry {short(name)} overlaps another", span.start)
        end = span.start + span.size


def _fail(file: MappedFile, why: str, offset: int) -> NoReturn:
    raise CheckpointError(why, path=file.path, offset=offset)
