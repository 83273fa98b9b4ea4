"""Meta's base64 file: read fast, and every damage named with its line and byte."""

from __future__ import annotations

import base64
import time

import pytest

from herd.errors import CheckpointError
from herd.tokenizer.ranks import parse_ranks
from tests.tokenizer.conftest import model_path


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


GOOD = [line(bytes((b,)), b) for b in range(256)] + [line(b"ab", 256), line(b"abc", 257)]


def slow_parse(data: bytes) -> list[bytes]:
    """The format as plainly as it can be read."""
    table = {}
    for row in data.splitlines():
        token, rank = row.split()
        table[int(rank)] = base64.b64decode(token, validate=True)
    return [table[rank] for rank in range(len(table))]


def test_released_files(family: str) -> None:
    data = model_path(family).read_bytes()
    assert parse_ranks(data) == slow_parse(data)


def test_reading_is_fast() -> None:
    data = model_path("llama3").read_bytes()
    start = time.thread_time()
    parse_ranks(data)
    assert time.thread_time() - start < 0.3


@pytest.mark.parametrize(
    "variant", [b"".join(GOOD).rstrip(), b"".join(GOOD) + b"\n\n", b"".join(GOOD).replace(b"\n", b"\r\n")]
)
def test_line_ends_do_not_matter(variant: bytes) -> None:
    assert parse_ranks(variant)[256:] == [b"ab", b"abc"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*GOOD[:9], b"AB\n", *GOOD[10:]], "line 10: 1 words"),
        ([*GOOD[:9], b"!!!! 9\n", *GOOD[10:]], "line 10: broken base64"),
        ([*GOOD[:9], b"CQ 9\n", *GOOD[10:]], "line 10: broken base64"),
        ([*GOOD[:9], b"CQ== 9 9\n", *GOOD[10:]], "line 10: 3 words"),
        ([*GOOD[:9], b"CQ== nine\n", *GOOD[10:]], "line 10: rank nine where 9 belongs"),
        ([*GOOD[:9], b"CQ== -9\n", *GOOD[10:]], "line 10: rank -9 where 9 belongs"),
        ([*GOOD[:9], *GOOD[10:]], "line 10: rank 10 where 9 belongs"),
        ([*GOOD[:10], *GOOD[9:]], "line 11: rank 9 where 10 belongs"),
        ([*GOOD, line(b"ab", 258)], "line 259: the same bytes as line 257"),
        ([*GOOD[:-1], GOOD[-1][:3]], "line 258: "),
        ([*GOOD[:9], b"CQ== " + b"9" * 9000 + b"\n", *GOOD[10:]], "line 10: rank 9999"),
        ([*GOOD[:9], b"\xff\xfe 9\n", *GOOD[10:]], "line 10: broken base64"),
        (GOOD[:200], "200 of the 256 single bytes"),
        ([b"\n", b"  \n"], "the file is empty"),
        ([b"one two three\n"], "line 1: 3 words"),
    ],
)
def test_damage_is_named(rows: list[bytes], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_ranks(b"".join(rows), "tokenizer.model")
    assert str(caught.value).startswith("tokenizer.model")


def test_damage_has_an_offset() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_ranks(b"".join([*GOOD[:9], b"?\n"]))
    assert caught.value.offset == sum(map(len, GOOD[:9]))
