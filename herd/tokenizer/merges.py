"""The merge list of a `tokenizer.json` or GGUF file, held against what the vocabulary itself says.

Llama's own files have no merge list: tiktoken merges by rank, SentencePiece by score. A list agrees with that or it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from herd.errors import TokenizerError
from herd.tokenizer.pieces import NORMAL

__all__ = ["check_byte_merges", "scores_of_merges"]

_SPACE = "▁"


def check_byte_merges(names: Sequence[str], merges: Iterable[str | Sequence[str]]) -> None:
    """Raise TokenizerError unless merging by rank and merging by this list are the same thing.

    The list must form tokens in rank order, and form every token that two others could form. (One split of each token is
    enough: a piece merges the same way inside a longer text as on its own, up to where a longer token takes part of it.)
    """
    ids = {name: id for id, name in enumerate(names)}
    formed = [ids.get(left + right, -1) for left, right in _split(merges)]
    if formed and min(formed) < 0:
        left, right = list(_split(merges))[formed.index(-1)]
        raise TokenizerError(f"model.merges joins {left!r} and {right!r} to a token that is not in the vocabulary")
    if formed != sorted(formed):
        at = next(i for i in range(1, len(formed)) if formed[i] < formed[i - 1])
        raise TokenizerError(
            f"model.merges is not in rank order: entry {at} forms token {formed[at]} after {formed[at - 1]}"
        )
    for id in sorted(set(range(len(names))).difference(formed)):
        name = names[id]
        for cut in range(1, len(name)):
            if name[:cut] in ids and name[cut:] in ids:
                raise TokenizerError(
                    f"model.merges never forms token {id}, {name!r}, though {name[:cut]!r} and the rest could"
                )


def _split(merges: Iterable[str | Sequence[str]]) -> Iterator[tuple[str, str]]:
    """The two halves of each merge: written "a b" in older files, ["a", "b"] in newer ones."""
    if not isinstance(merges, Sequence) or isinstance(merges, str):
        raise TokenizerError("model.merges is not a list")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise TokenizerError(f"model.merges has the entry {str(merge)[:100]!r}, which is not a pair")
        yield parts[0], parts[1]


def scores_of_merges(
    names: Sequence[str], types: Sequence[int], merges: Iterable[str | Sequence[str]]
) -> dict[str, float]:
    """SentencePiece scores that merge in the order of `merges`: 0, -1, -2, ... by first appearance.

    Runs of spaces may take turns in the list; they have equal scores in Llama's own file. Raises TokenizerError for any other
    list that no scores reproduce, and for one that leaves out a pair which SentencePiece would join.
    """
    ids = {name: id for id, name in enumerate(names) if types[id] == NORMAL}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    listed: dict[str, int] = {}
    for at, (left, right) in enumerate(_split(merges)):
        piece = left + right
        if piece in ids and left in ids and right in ids:
            first.setdefault(piece, at)
            last[piece] = at
            listed[piece] = listed.get(piece, 0) + 1
        elif piece not in names or left not in names or right not in names:
            raise TokenizerError(f"model.merges joins {left!r} and {right!r}, but not all three are in the vocabulary")
    for piece in ids:
        pairs = sum(piece[:cut] in ids and piece[cut:] in ids for cut in range(1, len(piece)))
        if pairs != listed.get(piece, 0):
            raise TokenizerError(f"model.merges lists {listed.get(piece, 0)} of the {pairs} pairs that form {piece!r}")
    scores: dict[str, float] = {}
    rank, until, group = 0, -1, ""
    for piece, begin in first.items():  # in order of first appearance
        spaces = bool(group) and not (piece + group).strip(_SPACE)
        if begin < until and not spaces:
            raise TokenizerError(
                f"model.merges returns to {group!r} after {piece!r}: no order of scores merges that way"
            )
        if not spaces:
            rank, group = rank + 1, piece
        until = max(until, last[piece])
        scores[piece] = 1.0 - rank
    return scores
