"""TensorBoard's event files: scalars and texts, written without TensorBoard.

A file is a row of records, each length (8 bytes), masked CRC-32C of it, content, masked CRC-32C of that; little-endian. A record
holds an `Event` in protocol-buffer wire form: wall_time = 1 (double), step = 2 (varint), file_version = 3, summary = 5,
session_log = 7. A summary has values with tag = 1 and simple_value = 2 (float), or, for a text, tensor = 8 and metadata = 9.
Source: tensorboard/compat/proto/event.proto, summary.proto, and the TFRecord format of TensorFlow's documentation.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["EventFile", "crc32c"]

VERSION = "brain.Event:2"
_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed."""


def _table() -> tuple[int, ...]:
    made = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
        made.append(byte)
    return tuple(made)


_TABLE = _table()


def crc32c(content: bytes) -> int:
    """CRC-32C of `content` (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


class EventFile:
    """One event file in `folder`; every record is on its way to the disk when a method returns. Raises OSError.

    With `begin_after`, readers forget what earlier files hold of later steps: they were lost with a run that was killed, and are
    written again.
    """

    def __init__(self, folder: Path, begin_after: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname()) or "host"
        name, number = f"events.out.tfevents.{int(now):010d}.{host}.{os.getpid()}", 0
        while (folder / f"{name}.{number}").exists():
            number += 1
        self.path = folder / f"{name}.{number}"
        self._write(now, 0, _field(3, VERSION.encode()))
        if begin_after:
            self._write(now, begin_after + 1, _field(7, _varint_field(1, 1)))  # SessionLog.START

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of several curves."""
        parts = (_field(1, tag.encode()) + _float_field(2, value) for tag, value in values.items())
        self._write(time.time(), step, _field(5, b"".join(_field(1, part) for part in parts)))

    def text(self, step: int, tag: str, text: str) -> None:
        """A text (Markdown) under `tag`."""
        # TensorProto: dtype = 1 (DT_STRING is 7), tensor_shape = 2 (one dimension of size 1), string_val = 8
        tensor = _varint_field(1, 7) + _field(2, _field(2, _varint_field(1, 1))) + _field(8, text.encode())
        metadata = _field(1, _field(1, b"text"))
        value = _field(1, tag.encode()) + _field(8, tensor) + _field(9, metadata)
        self._write(time.time(), step, _field(5, _field(1, value)))

    def _write(self, wall: float, step: int, rest: bytes) -> None:
        event = b"\x09" + struct.pack("<d", wall) + _varint_field(2, step) + rest
        length = struct.pack("<Q", len(event))
        with open(self.path, "ab") as file:  # not held open: a run may end anywhere
            file.write(length + _masked(length) + event + _masked(event))


def _masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def _varint_field(key: int, number: int) -> bytes:
    return _varint(key << 3) + _varint(number)


def _float_field(key: int, value: float) -> bytes:
    return _varint(key << 3 | 5) + struct.pack("<f", _single(value))


def _field(key: int, content: bytes) -> bytes:
    return _varint(key << 3 | 2) + _varint(len(content)) + content


def _single(value: float) -> float:
    """What does not fit into single precision becomes an infinity instead of an error."""
    try:
        struct.pack("<f", value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return value
