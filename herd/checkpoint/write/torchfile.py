"""Writer of torch.save files, made by hand: a zip archive with a small pickle that describes tensors, and their bytes.

Nothing is pickled: the program in data.pkl is put together from the few opcodes that such a description needs. Entries are
stored, data starts at multiples of 64 bytes, and `torch.load(weights_only=True, mmap=True)` reads the result. The optional
record `.format_version` is left out: it would promise torch.save's exact spacing between entries.
Sources: torch/serialization.py, torch/csrc caffe2/serialize/inline_container.cc, PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from herd.checkpoint.write.pieces import pieces
from herd.checkpoint.write.planned import Planned, Tick
from herd.errors import CheckpointError
from herd.quant.scheme import QuantTensor

__all__ = ["TorchFileWriter", "write_torch_file"]

ALIGN = 64
_STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F64": "DoubleStorage"}
_WIDE = 0xFFFFFFFF
"""Sizes and places from here on stand in zip64 fields."""


def write_torch_file(
    path: str | os.PathLike[str], planned: Sequence[Planned], tick: Tick, same: Mapping[str, str] | None = None
) -> None:
    """Write the file `path`: a dict of `planned` in order, then the names of `same`, each sharing another tensor's storage.

    `tick` is told the bytes of tensor data written. The file is on the disk on return. Raises CheckpointError for a name given
    twice or a type that torch files cannot hold, and OSError as the system does.
    """
    with TorchFileWriter(path, planned, same) as writer:
        for plan in planned:
            writer.add(plan.make(), tick)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A finished entry of the archive."""

    name: bytes
    crc: int
    size: int
    start: int


class TorchFileWriter:
    """A file that takes its tensors one at a time, so that several (Meta's ranks) can be written side by side.

    A context manager; `add` is called once for each of `planned`, in order, whose `make` is not used.
    """

    def __init__(
        self, path: str | os.PathLike[str], planned: Sequence[Planned], same: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        program = _program(self.path, planned, same or {})
        self._planned = tuple(planned)
        self._root = self.path.name.rpartition(".")[0] or "archive"
        self._entries: list[_Entry] = []
        self._file = open(self.path, "wb")  # noqa: SIM115  closed by __exit__
        self._added = 0
        try:
            self._small("data.pkl", program)
            self._small("byteorder", b"little")
        except BaseException:
            self._file.close()
            raise

    def add(self, tensor: Tensor | QuantTensor, tick: Tick) -> None:
        """Write the next tensor. Raises OSError as the system does."""
        plan = self._planned[self._added]
        start, crc, size = self._begin(f"data/{self._added}", plan.nbytes), 0, 0
        for piece in pieces(plan, tensor):
            crc = zlib.crc32(piece, crc)
            size += len(piece)
            tick(self._file.write(piece))
        assert size == plan.nbytes, plan.name
        self._end(f"data/{self._added}", start, crc, size)
        self._added += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is not None:
                return
            assert self._added == len(self._planned), f"{self._added} of {len(self._planned)} tensors"
            self._small("version", b"3\n")
            self._directory()
            self._file.flush()
            os.fsync(self._file.fileno())

    def _small(self, name: str, data: bytes) -> None:
        start = self._begin(name, len(data))
        self._file.write(data)
        self._end(name, start, zlib.crc32(data), len(data))

    def _begin(self, name: str, size: int) -> int:
        """The local header, with room for the checksum; returns where it starts. The data is aligned."""
        start, raw = self._file.tell(), self._name(name)
        wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= _WIDE else b""
        fill = -(start + 30 + len(raw) + len(wide) + 4) % ALIGN
        extra = wide + struct.pack("<2sH", b"FB", fill) + b"Z" * fill
        self._file.write(_local(0, size, len(raw), len(extra)) + raw + extra)
        return start

    def _end(self, name: str, start: int, crc: int, size: int) -> None:
        self._entries.append(_Entry(self._name(name), crc, size, start))
        end = self._file.tell()
        self._file.seek(start + 14)
        self._file.write(struct.pack("<I", crc))
        self._file.seek(end)

    def _name(self, name: str) -> bytes:
        return f"{self._root}/{name}".encode()

    def _directory(self) -> None:
        start = self._file.tell()
        for entry in self._entries:
            self._file.write(_central(entry))
        size, count = self._file.tell() - start, len(self._entries)
        if start + size >= _WIDE or count >= 0xFFFF:
            where = self._file.tell()
            self._file.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start))
            self._file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, where, 1))
        few = min(count, 0xFFFF)
        self._file.write(
            struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, few, few, min(size, _WIDE), min(start, _WIDE), 0)
        )


def _local(crc: int, size: int, name: int, extra: int) -> bytes:
    few = min(size, _WIDE)
    return struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *_KIND, crc, few, few, name, extra)


def _central(entry: _Entry) -> bytes:
    wide = [value for value in (entry.size, entry.size, entry.start) if value >= _WIDE]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    few = min(entry.size, _WIDE)
    head = struct.pack("<4sH", b"PK\x01\x02", 45)
    head += struct.pack("<HHHHHIII", *_KIND, entry.crc, few, few)
    head += struct.pack("<HHHHHII", len(entry.name), len(extra), 0, 0, 0, 0, min(entry.start, _WIDE))
    return head + entry.name + extra


_KIND = (45, 0x0800, 0, 0, 0x0021)
"""Version needed (zip64), flags (UTF-8 names), method (stored), time, date (1 January 1980)."""


def _program(path: Path, planned: Sequence[Planned], same: Mapping[str, str]) -> bytes:
    """The pickle: one dict from names to tensors."""
    numbers: dict[str, int] = {}
    for number, plan in enumerate(planned):
        if plan.name in numbers:
            raise CheckpointError("this tensor would be written twice", path=path, tensor=plan.name)
        if plan.stored not in _STORAGES:
            why = f"torch files hold no {plan.stored} blocks: choose a dtype, or write GGUF"
            raise CheckpointError(why, path=path, tensor=plan.name)
        numbers[plan.name] = number
    names = list(numbers.items())
    names += [(name, numbers[other]) for name, other in same.items()]
    items = b"".join(_text(name) + _tensor(planned[number], number) for name, number in names)
    return b"\x80\x02}(" + items + b"u."  # protocol 2, an empty dict, a mark, the items, set them, stop


def _tensor(plan: Planned, key: int) -> bytes:
    """A call of torch's _rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    strides, step = [], 1
    for n in reversed(plan.shape):
        strides.append(step)
        step *= n
    reference = b"(" + _text("storage") + _global("torch", _STORAGES[plan.stored]) + _text(str(key)) + _text("cpu")
    storage = reference + _number(step) + b"tQ"
    arguments = storage + _number(0) + _sizes(plan.shape) + _sizes(tuple(reversed(strides)))
    no_hooks = _global("collections", "OrderedDict") + b")R"
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"\x89" + no_hooks + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<cI", b"X", len(raw)) + raw


def _number(value: int) -> bytes:
    if value < 1 << 8:
        return struct.pack("<cB", b"K", value)
    if value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return struct.pack("<BB", 0x8A, len(raw)) + raw


def _sizes(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"
