"""The merge list that `tokenizer.json` and GGUF files want, made from what the vocabulary itself says.

Llama's own files have no merge list: tiktoken merges by rank, SentencePiece by score. `herd.tokenizer.merges` reads the other
way. Every split of a token into two others is listed, as released files do: whichever two halves a text happens to form, they
merge with the priority of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from herd.errors import TokenizerError
from herd.tokenizer.bytelevel import to_alphabet
from herd.tokenizer.pieces import NORMAL, UNUSED, PieceModel

__all__ = ["merges_of_pieces", "merges_of_ranks"]

_SPACE = "▁"


def merges_of_ranks(ranks: Sequence[bytes]) -> list[tuple[str, str]]:
    """The merges of a byte-BPE vocabulary in the byte-level alphabet, by rank of the token they form."""
    ids = {token: id for id, token in enumerate(ranks)}
    names = to_alphabet(ranks)
    merges: list[tuple[str, str]] = []
    for token in ranks:
        pairs = [
            (ids[token[:cut]], ids[token[cut:]])
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        merges += [(names[left], names[right]) for left, right in sorted(pairs)]
    return merges


def merges_of_pieces(model: PieceModel) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary, best score first; only normal pieces take part.

    Pieces of equal score stay together, except runs of spaces, which merge longest part first: the run at the left grows, as
    in SentencePiece. Raises TokenizerError for a vocabulary whose ids no merge list reproduces.
    """
    ids = {piece: id for id, piece in enumerate(model.pieces) if model.types[id] == NORMAL}
    _refuse_unlistable(model, ids)
    merges: list[tuple[float, int, int, int, str, str]] = []
    for piece, id in ids.items():
        group = -1 if not piece.strip(_SPACE) else id
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-model.scores[id], group, -len(left), -len(right), left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _refuse_unlistable(model: PieceModel, ids: dict[str, int]) -> None:
    for id, piece in enumerate(model.pieces):
        kind = model.types[id]
        if kind == NORMAL and len(piece) > 1 and not ids.keys() >= set(piece):
            odd = next(char for char in piece if char not in ids)
            raise TokenizerError(
                f"piece {id}, {piece!r}, contains {odd!r}, which is not a piece itself: no merge list can form it"
            )
        if kind == UNUSED and any(piece[:cut] in ids and piece[cut:] in ids for cut in range(1, len(piece))):
            raise TokenizerError(
                f"piece {id}, {piece!r}, is unused but merges on the way to others: no merge list can say that"
            )
