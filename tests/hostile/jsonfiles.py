"""Hostile JSON: config.json, params.json, generation_config.json, index files, adapter_config.json and tokenizer files."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["VALUES", "damaged_bytes", "hostile_texts", "with_value"]

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31 - 1, 2**31, 2**53, 10**9, 10**15, -(2**63), 10**400, 0.5, -0.5, 1e308, 5e-324, "", "x",
    "64", "NaN", "x" * 100_000, "\x00", "../../etc/passwd", "\u202ea", "__import__('os').system('x')", [], [0], [None] * 1000,
    [-1], [[]], {}, {"a": 1}, {"__class__": "x"}, {"type": "Sequence"}, [{"id": -1}], "é" * 1000, -(10**400),
]  # fmt: skip
"""What a field may hold that its reader did not expect."""

_TEXTS: list[bytes] = [
    b"", b" ", b"{", b"}", b"[]", b"null", b"1", b'"x"', b"{}", b"nul", b"{]", b'{"a":}', b'{"a":1,}', b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}", b"{" + b'"a":[' * 50_000, b"[" * 100_000, b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    b'{"a":' + b"9" * 10_000 + b"}", b'{"a":1e999}', b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1,"a":2}', b'{"a":"\\ud800"}',
    b'{"a":"\xc0\x80"}', b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", b"<!doctype html>", b"\0" * 4096,
    b"GGUF\3\0\0\0", b"PK\3\4", b"\x80\x02cos\nsystem\n.", b'{"a":"' + b"x" * 10_000_000 + b'"}',
]  # fmt: skip


def hostile_texts() -> Iterator[tuple[str, bytes]]:
    """Whole files that are not what they should be."""
    for number, text in enumerate(_TEXTS):
        yield f"text {number}, {text[:12]!r}", text


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every field, from the outside in; long lists and objects only by their first entries."""
    if isinstance(value, Mapping):
        items: list[tuple[Any, Any]] = list(value.items())[:40]
    elif isinstance(value, list):
        items = list(enumerate(value))[:3]
    else:
        return
    for key, inner in items:
        yield (*at, key)
        yield from paths(inner, (*at, key))


def with_value(content: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    """One field of `content` is another value, is missing, or a key is new."""
    content = copy.deepcopy(content)
    place = rng.choice(list(paths(content)))
    *outer, last = place
    holder: Any = content
    for key in outer:
        holder = holder[key]
    choice = rng.randrange(10)
    if choice == 0 and isinstance(holder, dict):
        del holder[last]
        name = f"without {place}"
    elif choice == 1 and isinstance(holder, dict):
        value = rng.choice(VALUES)
        holder[f"{last}_x"] = value
        name = f"new key beside {place}"
    else:
        holder[last] = rng.choice(VALUES)
        name = f"{place} is {str(holder[last])[:20]}"
    return name, json.dumps(content).encode()


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, inserted, removed, repeated, or the end cut off."""
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(raw)) if raw else 0
        match rng.randrange(6):
            case 0 if raw:
                raw[at] = rng.randrange(256)
            case 1 if raw:
                raw[at] ^= 1 << rng.randrange(8)
            case 2:
                raw[at:at] = bytes(rng.choice(b'0123456789{}[],:"\\ \xff\0e-') for _ in range(rng.randrange(1, 9)))
            case 3:
                del raw[at : at + rng.randrange(1, 9)]
            case 4:
                other = rng.randrange(len(raw)) if raw else 0
                raw[at : at + 8] = raw[other : other + 8]
            case _ if rng.random() < 0.3:
                del raw[at:]
            case _:
                pass
    return bytes(raw)
