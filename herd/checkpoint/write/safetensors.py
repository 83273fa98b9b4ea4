"""Writer of safetensors files: 8 bytes of header length, a JSON header, then the raw tensors one after another.

Source: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from herd.checkpoint.write.large import LargeFile
from herd.checkpoint.write.pieces import pieces
from herd.checkpoint.write.planned import Planned, Tick
from herd.errors import CheckpointError
from herd.quant.scheme import block_type

__all__ = ["FORMAT", "safetensors_header", "write_safetensors"]

FORMAT = {"format": "pt"}
"""The metadata without which transformers refuses a file."""

ALIGN = 8


def write_safetensors(
    path: str | os.PathLike[str], planned: Sequence[Planned], metadata: Mapping[str, str], tick: Tick
) -> None:
    """Write the file `path`: `planned` in the order given, wider numbers first, so that every tensor is aligned.

    `tick` is told the bytes of tensor data written. The file is on the disk on return. Raises CheckpointError for a name given
    twice or a type the format does not have, and OSError as the system does.
    """
    ordered = sorted(planned, key=_narrowness)
    header = safetensors_header(path, ordered, metadata)
    with LargeFile(path) as file:
        file.write(header)
        for plan in ordered:
            _write(file, plan, tick)
        file.sync()


def _write(file: LargeFile, plan: Planned, tick: Tick) -> None:
    """One tensor; nothing of it is held when the next is made."""
    for piece in pieces(plan, plan.make()):
        tick(file.write(piece))


def safetensors_header(path: str | os.PathLike[str], ordered: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the data starts at a multiple of 8. Raises CheckpointError."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for plan in ordered:
        if plan.name in described:
            raise CheckpointError("this tensor would be written twice", path=path, tensor=plan.name)
        kind = block_type(plan.stored)
        if kind is None or kind.number is None:
            why = f"safetensors files hold no {plan.stored} blocks: choose a dtype, or write GGUF"
            raise CheckpointError(why, path=path, tensor=plan.name)
        stop = start + plan.nbytes
        described[plan.name] = {"dtype": plan.stored, "shape": list(plan.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def _narrowness(plan: Planned) -> int:
    kind = block_type(plan.stored)
    return 0 if kind is None else -kind.nbytes
