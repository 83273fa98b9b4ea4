"""Hostile .pth and .bin files: the zip container, the pickle inside it, and what both say of the data."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Iterator

import torch

from tests.hostile.jsonfiles import damaged_bytes

__all__ = ["structural", "torch_mutants"]


def _parts(valid: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(valid)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _zip(parts: dict[str, bytes], *, deflate: bool = False, names: dict[str, str] | None = None) -> bytes:
    made = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(made, "w", kind) as archive:
        for name, data in parts.items():
            archive.writestr((names or {}).get(name, name), data)
    return made.getvalue()


def structural(valid: bytes) -> Iterator[tuple[str, bytes]]:
    """Files no reader may accept, each wrong in one way."""
    parts = _parts(valid)
    program = next(name for name in parts if name.endswith("/data.pkl"))
    root = program.rpartition("/")[0]
    storages = [name for name in parts if "/data/" in name]
    yield "deflated", _zip(parts, deflate=True)
    bomb = {**parts, storages[0]: bytes(50 << 20)}
    yield "a bomb", _zip(bomb, deflate=True)
    yield "no pickle", _zip({k: v for k, v in parts.items() if k != program})
    yield "two pickles", _zip({**parts, "other/data.pkl": parts[program]})
    yield "empty pickle", _zip({**parts, program: b""})
    yield "big endian", _zip({**parts, f"{root}/byteorder": b"big"})
    for name in storages:
        yield f"without {name}", _zip({k: v for k, v in parts.items() if k != name})
        yield f"{name} shorter", _zip({**parts, name: parts[name][:-1]})
        yield f"{name} empty", _zip({**parts, name: b""})
    for size in (0, 1, 21, 22, 100, len(valid) // 2, len(valid) - 1, len(valid) - 22):
        yield f"cut at {size}", valid[:size]
    end = valid.rfind(b"PK\5\6")
    for field, width in ((8, 2), (10, 2), (12, 4), (16, 4)):
        for value in (0, 1, 0xFF, (1 << 8 * width) - 2):
            raw = bytearray(valid)
            before = bytes(raw[end + field : end + field + width])
            raw[end + field : end + field + width] = value.to_bytes(width, "little")
            if bytes(raw[end + field : end + field + width]) != before:
                yield f"end of directory, field {field} is {value}", bytes(raw)
    at = valid.find(b"PK\1\2")
    count = 0
    while at >= 0 and count < 6:
        for field, width, label in ((10, 2, "method"), (20, 4, "packed size"), (24, 4, "size"), (42, 4, "place")):
            raw = bytearray(valid)
            old = int.from_bytes(raw[at + field : at + field + width], "little")
            raw[at + field : at + field + width] = (old + 8).to_bytes(width, "little")
            yield f"entry {count}: {label}", bytes(raw)
        at = valid.find(b"PK\1\2", at + 4)
        count += 1
    yield "local name differs from the directory's", valid.replace(program.encode(), b"x" * len(program), 1)
    made = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, made, _use_new_zipfile_serialization=False)
    yield "cut legacy file", made.getvalue()[:-3]


def torch_mutants(valid: bytes, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Damage to the pickle (packed again), to the directory, or anywhere; some of these stay valid."""
    parts = _parts(valid)
    program = next(name for name in parts if name.endswith("/data.pkl"))
    directory = valid.find(b"PK\1\2")
    for number in range(count):
        rng = random.Random(f"torch {seed} {number}")
        kind = number % 4
        if kind == 0:
            yield f"pickle mutant {number}", _zip({**parts, program: damaged_bytes(parts[program], rng)})
        elif kind == 1:
            yield f"pickle number mutant {number}", _zip({**parts, program: _other_number(parts[program], rng)})
        elif kind == 2:
            tail = damaged_bytes(valid[directory:], rng)
            yield f"directory mutant {number}", valid[:directory] + tail
        else:
            yield f"mutant {number}", damaged_bytes(valid, rng)


def _other_number(program: bytes, rng: random.Random) -> bytes:
    """Another BININT1, BININT2 or BININT in the pickle: sizes, strides, offsets, storage lengths."""
    sizes = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
    raw = bytearray(program)
    places = [i for i, byte in enumerate(raw) if byte in sizes and i + sizes[byte] < len(raw)]
    at = rng.choice(places)
    width = sizes[raw[at]]
    value = rng.choice([0, 1, 2, 127, 255, (1 << 8 * width) - 1, rng.getrandbits(8 * width)])
    raw[at + 1 : at + 1 + width] = struct.pack("<I", value)[:width] if value < 1 << 8 * width else b"\xff" * width
    return bytes(raw)
