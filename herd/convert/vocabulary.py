"""Two tokenizers held against each other: every piece, the special tokens, and the ids of hard texts both ways."""

from __future__ import annotations

from collections.abc import Iterator

from herd.checkpoint.vocabulary import MissingTokenizer
from herd.convert.report import Check
from herd.convert.torture import texts
from herd.errors import TokenizerError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["check_tokenizers", "same_tokenizers"]

_BATCH = 4096


def check_tokenizers(a: Tokenizer, b: Tokenizer, *, kind_b: str = "") -> Check:
    """The tokenizer check. Not made when neither side has a tokenizer; failed when only one has.

    Stop ids that B lacks are said, not failed, where B's format `kind_b` is Meta's, whose code knows them by heart.
    """
    none_a, none_b = isinstance(a, MissingTokenizer), isinstance(b, MissingTokenizer)
    if none_a and none_b:
        return Check("tokenizer", None, ("neither checkpoint has a tokenizer",))
    if none_a or none_b:
        where = "A has no tokenizer, B has one" if none_a else "B has no tokenizer, A has one"
        return Check("tokenizer", False, (where,))
    wrong = [*_pieces(a, b), *_special(a, b), *_texts(a, b), *_vocabulary_as_text(a, b)]
    said = []
    if b.special.stop != a.special.stop:
        line = f"stop ids are {sorted(a.special.stop)} in A, {sorted(b.special.stop)} in B"
        no_place = kind_b == "meta" and b.special.stop < a.special.stop
        (said if no_place else wrong).append(line + (" (Meta's format has no place for others)" if no_place else ""))
    figures = {"vocab_size": a.vocab_size, "texts": len(texts()), "special": len(a.special.ids)}
    if wrong:
        return Check("tokenizer", False, tuple(wrong + said), figures)
    found = (
        f"{a.vocab_size:,} pieces and {len(a.special.ids):,} special tokens equal, {len(texts())} hard texts and every "
        "piece as text give the same ids and come back the same"
    )
    return Check("tokenizer", True, (found, *said), figures)


def same_tokenizers(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both exist and are the same."""
    return check_tokenizers(a, b).passed is True


def _pieces(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    if a.family != b.family:
        yield f"vocabulary family {a.family} in A, {b.family} in B"
    if a.vocab_size != b.vocab_size:
        yield f"{a.vocab_size} tokens in A, {b.vocab_size} in B"
    different = [i for i in range(min(a.vocab_size, b.vocab_size)) if _bytes(a, i) != _bytes(b, i)]
    if different:
        i = different[0]
        yield f"{len(different)} pieces differ, the first is id {i}: {_bytes(a, i)!r} in A, {_bytes(b, i)!r} in B"


def _special(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    one, other = a.special, b.special
    for word in ("bos", "eos", "pad", "unk"):
        if getattr(one, word) != getattr(other, word):
            yield f"{word} is {getattr(one, word)} in A, {getattr(other, word)} in B"
    for first, second, side in ((one, other, "B"), (other, one, "A")):
        ids = {*second.ids.values(), *second.aliases.values()}
        lost = [name for name, id in first.ids.items() if id not in ids]
        if lost:
            yield f"{len(lost)} special tokens are missing in {side}: {', '.join(lost[:5])}"
    moved = [n for n, id in one.ids.items() if other.get(n) not in (None, id)]
    if moved:
        yield f"special token {moved[0]} is {one.get(moved[0])} in A, {other.get(moved[0])} in B"
    renamed = [n for n, id in one.ids.items() if other.get(n) is None and id in other.ids.values()]
    if renamed:
        yield f"{len(renamed)} special tokens have another name in B, the first is {renamed[0]}"


def _texts(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    wrong = []
    for text in texts():
        for bos in (False, True):
            ids = a.encode(text, bos=bos)
            if ids != b.encode(text, bos=bos):
                wrong.append(f"{_short(text)} has other ids in B")
                break
            if bos and a.decode(ids) != b.decode(ids):
                wrong.append(f"the ids of {_short(text)} become another text in B")
        if a.encode(text, allow_special=True) != b.encode(text, allow_special=True):
            wrong.append(f"{_short(text)} with special tokens allowed has other ids in B")
    if wrong:
        yield f"{len(wrong)} differences on {len(texts())} hard texts: {wrong[0]}"


def _vocabulary_as_text(a: Tokenizer, b: Tokenizer) -> Iterator[str]:
    """Every piece that is text by itself is encoded again: a merge that is lost shows here."""
    count = min(a.vocab_size, b.vocab_size)
    for start in range(0, count, _BATCH):
        words = ((_bytes(a, i) or b"").decode("utf-8", "ignore") for i in range(start, min(start + _BATCH, count)))
        text = "\n".join(word for word in words if word)
        if a.encode(text) != b.encode(text):
            yield f"the pieces {start} to {start + _BATCH - 1}, written as text, have other ids in B"
            return


def _bytes(tokenizer: Tokenizer, id: int) -> bytes | None:
    """None for an id that is in the middle of the vocabulary and stands for nothing."""
    try:
        return tokenizer.bytes_of(id)
    except TokenizerError:
        return None


def _short(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:37] + "...")
