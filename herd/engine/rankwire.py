"""What rank 0 of a model over several processes tells the others: frames over a socket pair, steps as plain integers.

    kind (1 byte)   length (4 bytes)   payload

J: an object of JSON. S: the rows of a step. C: blocks to copy. Nothing that comes in can become anything else, and both ends are
processes of one user.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from herd.engine.pack import RaggedBatch

__all__ = ["Wire", "batch_of", "pairs_of", "step_of"]

_HEAD = struct.Struct("<cI")
_SIZES = struct.Struct("<5q")


class Wire:
    """One end. `send` and `tell` from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")
        self._lock = threading.Lock()

    def tell(self, **what: Any) -> None:
        """Send an object."""
        self.send(b"J", json.dumps(what).encode())

    def send(self, kind: bytes, payload: bytes) -> None:
        """Raises OSError when the other end is gone."""
        with self._lock:
            self._connection.sendall(_HEAD.pack(kind, len(payload)) + payload)

    def receive(self) -> tuple[bytes, Any] | None:
        """The next frame, objects as such; None when the other end is gone."""
        try:
            head = self._file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return None
            kind, length = _HEAD.unpack(head)
            payload = self._file.read(length)
        except OSError:
            return None
        if len(payload) < length:
            return None
        return kind, json.loads(payload) if kind == b"J" else payload

    def deaf(self) -> None:
        """Nothing more is received: for the thread that did."""
        self._file.close()

    def close(self) -> None:
        """The other end sees that nobody is here."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def step_of(batch: RaggedBatch) -> bytes:
    """A batch without adapters as bytes."""
    n, width = batch.tables.shape
    sizes = _SIZES.pack(len(batch.tokens), len(batch.spans), len(batch.logit_rows), n, width)
    wide = torch.cat([batch.tokens, batch.positions, batch.slots, batch.spans.flatten(), batch.logit_rows])
    return sizes + _bytes(wide) + _bytes(batch.tables.int())


def batch_of(payload: bytes, device: torch.device) -> RaggedBatch:
    """The batch that `step_of` made bytes of."""
    rows, spans, wanted, n, width = _SIZES.unpack_from(payload)
    sizes = [rows, rows, rows, 4 * spans, wanted]
    data = bytearray(payload)
    wide = torch.frombuffer(data, dtype=torch.int64, offset=_SIZES.size, count=sum(sizes))
    known = wide[3 * rows : 3 * rows + 4 * spans].view(-1, 4).tolist()
    tables = torch.frombuffer(data, dtype=torch.int32, offset=_SIZES.size + wide.nbytes, count=n * width)
    tokens, positions, slots, flat, logit_rows = wide.to(device).split(sizes)
    return RaggedBatch(
        tokens,
        positions,
        slots,
        flat.view(-1, 4),
        tables.view(n, width).to(device),
        logit_rows,
        known=tuple((a, b, c, d) for a, b, c, d in known),
    )


def pairs_of(payload: bytes) -> Sequence[tuple[int, int]]:
    """The copies of a C frame: pairs of int64."""
    flat = torch.frombuffer(bytearray(payload), dtype=torch.int64).view(-1, 2).tolist()
    return [(a, b) for a, b in flat]


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().cpu().numpy().tobytes()
