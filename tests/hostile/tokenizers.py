"""Hostile vocabularies: tokenizer.model of both kinds, tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

from tests.hostile.cases import Case
from tests.hostile.jsonfiles import damaged_bytes, hostile_texts, with_value

__all__ = ["tokenizer_cases"]


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


def _ranks(count: int) -> bytes:
    tokens = [bytes([i]) for i in range(256)] + [b"a%d" % i for i in range(count - 256)]
    return b"".join(b"%b %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens))


def structural(pieces: bytes) -> Iterator[tuple[str, str, bytes]]:
    """(name, file, content): each wrong in one way."""
    ranks = _ranks(300)
    lines = ranks.splitlines(keepends=True)
    piece = _field(1, _field(1, b"x") + b"\x15" + struct.pack("<f", float("nan")))
    broken: list[bytes] = [
        ranks, b"".join(lines[:255]), b"".join(lines[1:]), ranks.replace(b" 7\n", b" 8\n"), ranks.replace(b" 7\n", b" -7\n"),
        ranks.replace(b" 7\n", b" 99999999999999999999\n"), ranks.replace(b" 7\n", b"\n"), b"".join([*lines, lines[5]]),
        ranks[:-3], ranks.replace(b"==", b"="), b"QQ== 0\n" * 1000, b"A" * 1_000_000, b"\n" * 1_000_000,
        b"QQ== " + b"9" * 100_000, ranks.replace(b"\n", b" "),
        pieces[:1], pieces[:-1], pieces[: len(pieces) // 2], pieces + b"\x0a", pieces + pieces, piece, piece * 1000, b"\x0a\xff",
        b"\x0a" + b"\xff" * 9 + b"\x01", b"\x0a" + b"\xff" * 20, b"\x08\x80" * 1000, b"\x12" * 1000, b"\x0b" * 64,
        b"\x0a\x80\x80\x80\x80\x08" + b"a" * 100, _field(2, b"\x18\x01") + pieces, pieces.replace(b"<unk>", b"<unq>", 1),
        pieces.replace(b"<0x0A>", b"<0x0B>", 1), pieces.replace(b"</s>", b"<\xff>\xff", 1),
    ]  # fmt: skip
    for number, data in enumerate(broken):
        yield f"tokenizer.model {number}", "tokenizer.model", data
    for name, text in hostile_texts():
        yield f"tokenizer.json, {name}", "tokenizer.json", text


def tokenizer_cases(
    pieces: bytes, contents: list[dict[str, Any]], config: dict[str, Any], mutants: int
) -> Iterator[Case]:
    """The structural ones, then `mutants` random ones in turn of every kind."""
    for name, file, data in structural(pieces):
        yield Case(name, {file: data}, must_fail=file == "tokenizer.json")
        if file == "tokenizer.model":
            yield Case(f"{name}, opened as a file", {file: data}, file)
    for name, text in hostile_texts():
        yield Case(f"tokenizer_config.json, {name}", {"tokenizer.model": pieces, "tokenizer_config.json": text})
    whole = [json.dumps(content).encode() for content in contents]
    for number in range(mutants):
        rng = random.Random(f"tokenizer {number}")
        kind, content = number % 6, contents[number % len(contents)]
        if kind in (0, 1):
            yield Case(f"mutant {number} of pieces", {"tokenizer.model": damaged_bytes(pieces, rng)})
        elif kind == 2:
            yield Case(
                f"mutant {number} of ranks", {"tokenizer.model": damaged_bytes(_ranks(260), rng)}, "tokenizer.model"
            )
        elif kind == 3:
            name, data = with_value(content, rng)
            yield Case(f"tokenizer.json {number}: {name}", {"tokenizer.json": data})
        elif kind == 4:
            data = damaged_bytes(whole[number % len(whole)], rng)
            yield Case(f"mutant {number} of tokenizer.json", {"tokenizer.json": data})
        else:
            name, data = with_value(config, rng)
            files = {"tokenizer.json": whole[number % len(whole)], "tokenizer_config.json": data}
            yield Case(f"tokenizer_config.json {number}: {name}", files)
