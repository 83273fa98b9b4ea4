"""Meta's `tokenizer.model` of Llama 3 and 4: one line per token, its bytes in base64 and its rank.

Read in one pass over the whole file; only when something is wrong is it read again line by line to say where.
"""

from __future__ import annotations

import binascii
import os
from functools import partial
from typing import NoReturn

from herd.errors import CheckpointError

__all__ = ["parse_ranks"]

_decode = partial(binascii.a2b_base64, strict_mode=True)


def parse_ranks(data: bytes, path: str | os.PathLike[str] | None = None) -> list[bytes]:
    """The bytes of every rank, in rank order. Raises CheckpointError with line and byte offset for any damage."""
    words = data.split()
    try:
        ranks = list(map(_decode, words[::2]))
        sound = list(map(int, words[1::2])) == list(range(len(ranks)))
    except ValueError:  # covers binascii.Error
        sound, ranks = False, []
    if not sound or len(set(ranks)) != len(ranks):
        _report_damage(data, path)
    if not ranks:
        raise CheckpointError("the file is empty; expected lines of base64 and rank", path=path)
    singles = {token for token in ranks if len(token) == 1}
    if len(singles) != 256:
        raise CheckpointError(
            f"only {len(singles)} of the 256 single bytes are there; the file is cut off or not a Llama vocabulary",
            path=path,
        )
    return ranks


def _report_damage(data: bytes, path: str | os.PathLike[str] | None) -> NoReturn:
    offset = expected = 0
    seen: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        words = line.split()
        problem = None
        if words and len(words) != 2:
            problem = f"{len(words)} words; expected base64 and rank"
        elif words:
            try:
                token = _decode(words[0])
            except ValueError as error:
                problem, token = f"broken base64 ({error})", b""
            if problem is None and words[1] != str(expected).encode():
                problem = f"rank {words[1][:20].decode('ascii', 'replace')} where {expected} belongs"
            elif problem is None and token in seen:
                problem = f"the same bytes as line {seen[token]}"
            seen[token] = number
            expected += 1
        if problem is not None:
            raise CheckpointError(f"line {number}: {problem}", path=path, offset=offset)
        offset += len(line) + 1
    raise CheckpointError("not a list of base64 tokens and ranks", path=path)
