"""Reads Hugging Face's `tokenizer.json`, and says which rule of it is not Llama's.

Format: huggingface/tokenizers, src/models/bpe and src/pre_tokenizers. Two schemes belong to Llama: byte-level BPE with a regex
split and `ignore_merges` (3, 4), and BPE over characters with byte fallback and "▁" for spaces (1, 2, Code). Anything that
would change ids is a TokenizerError that names the JSON field; damage is a CheckpointError.

Two things are read as Llama was trained, not as the file's own engine would: SentencePiece puts its space before every text,
also before one that begins with a space (Metaspace does not), and no text becomes an added token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herd.errors import CheckpointError, TokenizerError
from herd.tokenizer.bytelevel import from_alphabet
from herd.tokenizer.merges import check_byte_merges, scores_of_merges
from herd.tokenizer.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, PieceModel, byte_piece
from herd.tokenizer.released import LLAMA2_PIECES, is_llama2, llama2_scores, released_family
from herd.tokenizer.settings import MAX_JSON, parse_json, read_file
from herd.tokenizer.tokenizer import Family
from herd.tokenizer.vocabulary import ByteVocabulary, PieceVocabulary

__all__ = ["open_tokenizer_json", "read_tokenizer_json"]

_SPACE = "▁"
_MERGES = re.compile(rb'"merges"\s*:\s*\[')
_END_OF_MERGES = re.compile(rb"\]\s*\}\s*\}\s*$")


def open_tokenizer_json(path: str | os.PathLike[str], family: Family | None = None) -> ByteVocabulary | PieceVocabulary:
    """The vocabulary in a `tokenizer.json` file. `family` overrides what the regex says.

    The merges are two thirds of a Llama 3 or 4 file and say nothing when the ranks are Meta's own, so they are parsed only
    when they are not. Raises CheckpointError for damage and TokenizerError for rules that are not Llama's.
    """
    path = Path(path)
    data = read_file(path, MAX_JSON)
    if head := _without_merges(data):
        try:
            content = parse_json(head, path)
        except CheckpointError:
            content = {}  # the whole file is read below, and says what is wrong with it
        if _has_byte_level(content):
            vocabulary = read_tokenizer_json(content, family, check_merges=False)
            if isinstance(vocabulary, ByteVocabulary) and released_family(vocabulary.ranks):
                return vocabulary
    return read_tokenizer_json(parse_json(data, path), family)


def _without_merges(data: bytes) -> bytes | None:
    """A `tokenizer.json` with an empty merge list, when the list stands at its end as `tokenizers` writes it."""
    at = data.find(b'"merges"')
    while at >= 0:
        found = _MERGES.match(data, at)
        if found and data[at - 1 : at] != b"\\" and _END_OF_MERGES.search(data, max(0, len(data) - 64)):
            return data[: found.end()] + b"]}}"
        at = data.find(b'"merges"', at + 1)
    return None


def read_tokenizer_json(
    content: Mapping[str, Any], family: Family | None = None, *, check_merges: bool = True
) -> ByteVocabulary | PieceVocabulary:
    """The vocabulary of a parsed `tokenizer.json`: see `open_tokenizer_json`."""
    model = _mapping(content, "model")
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise TokenizerError(f"model.type is {kind!r}; Llama tokenizers are 'BPE'")
    vocab = _mapping(model, "vocab")
    if not set(map(type, vocab.values())) <= {int}:
        raise TokenizerError("model.vocab has ids that are not integers")
    added: dict[str, int] = {}
    visible: set[int] = set()
    listed = content.get("added_tokens") or []
    if not isinstance(listed, list):
        raise TokenizerError("added_tokens is not a list")
    for entry in listed:
        if (
            not isinstance(entry, Mapping)
            or not isinstance(entry.get("content"), str)
            or type(entry.get("id")) is not int
        ):
            raise TokenizerError("added_tokens has an entry without content and id")
        added[entry["content"]] = entry["id"]
        if not entry.get("special", False):
            visible.add(entry["id"])
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(f"model.{key} is {model[key]!r}; Llama tokenizers have none")
    if _has_byte_level(content):
        return _byte_vocabulary(content, model, vocab, added, frozenset(visible), family, check_merges)
    if model.get("byte_fallback"):
        return _piece_vocabulary(content, model, vocab, added, frozenset(visible))
    raise TokenizerError("neither a ByteLevel pre_tokenizer (Llama 3, 4) nor model.byte_fallback (Llama 1, 2) is there")


# -- byte level: Llama 3 and 4


def _steps(content: Mapping[str, Any], key: str, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre_tokenizer or decoder, with Sequence unrolled."""
    step = content.get(key)
    if step is None:
        return []
    if not isinstance(step, Mapping):
        raise TokenizerError(f"{key} is not an object")
    if step.get("type") != "Sequence":
        return [step]
    steps = step.get(inner)
    if not isinstance(steps, list) or not all(isinstance(s, Mapping) for s in steps):
        raise TokenizerError(f"{key}.{inner} is not a list of objects")
    return steps


def _has_byte_level(content: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(content, "pre_tokenizer", "pretokenizers"))


def _byte_vocabulary(
    content: Mapping[str, Any],
    model: Mapping[str, Any],
    vocab: Mapping[str, int],
    added: Mapping[str, int],
    visible: frozenset[int],
    family: Family | None,
    check_merges: bool,
) -> ByteVocabulary:
    from herd.tokenizer.tiktoken import REGEX

    if normalizers := _steps(content, "normalizer", "normalizers"):
        raise TokenizerError(f"normalizer is {normalizers[0].get('type')!r}; Llama 3 and 4 have none")
    if model.get("ignore_merges") is not True:
        raise TokenizerError(
            "model.ignore_merges is not true; Llama 3 and 4 take a piece that is in the vocabulary whole. Set it to true or "
            "use Meta's tokenizer.model"
        )
    if model.get("byte_fallback"):
        raise TokenizerError("model.byte_fallback is true in a byte-level vocabulary")
    steps = _steps(content, "pre_tokenizer", "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if kinds != ["Split", "ByteLevel"]:
        raise TokenizerError(f"pre_tokenizer is {' + '.join(map(str, kinds))}; Llama 3 and 4 have Split + ByteLevel")
    split, level = steps
    if str(split.get("behavior")).lower() != "isolated" or split.get("invert"):
        raise TokenizerError("pre_tokenizer Split is not 'Isolated' without invert, as in Llama 3 and 4")
    if level.get("add_prefix_space") or level.get("use_regex", True):
        raise TokenizerError(
            "pre_tokenizer ByteLevel must have add_prefix_space and use_regex false, as in Llama 3 and 4"
        )
    pattern = split.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    found: Family | None = next((name for name, known in REGEX.items() if known == regex), None)
    if found is None and family is None:
        raise TokenizerError(
            f"pre_tokenizer Split has the pattern {regex!r}, which is neither Llama 3's nor Llama 4's; pass family='llama3' or "
            "family='llama4' to cut text with one of theirs"
        )
    listed_twice = {name for name, id in added.items() if vocab.get(name) == id}
    names = sorted(vocab.keys() - listed_twice if listed_twice else vocab, key=vocab.__getitem__)
    if [vocab[name] for name in names] != list(range(len(names))):
        gap = next(i for i, name in enumerate(names) if vocab[name] != i)
        raise TokenizerError(f"model.vocab has no single token with id {gap}; ids must count up from 0")
    ranks = from_alphabet(names)
    if check_merges and released_family(ranks) is None:  # the merges of the released ranks are known: by rank
        check_byte_merges(names, model.get("merges") or ())
    return ByteVocabulary(ranks=ranks, family=family or found or "llama3", added=added, visible=visible)


# -- pieces: Llama 1, 2 and Code Llama


def _piece_vocabulary(
    content: Mapping[str, Any],
    model: Mapping[str, Any],
    vocab: Mapping[str, int],
    added: Mapping[str, int],
    visible: frozenset[int],
) -> PieceVocabulary:
    if model.get("ignore_merges"):
        raise TokenizerError("model.ignore_merges is true; Llama 1 and 2 merge every piece")
    unk = model.get("unk_token") or "<unk>"
    names = sorted(vocab, key=vocab.__getitem__)
    if [vocab[name] for name in names] != list(range(len(names))):
        raise TokenizerError("model.vocab has a gap or a double id; ids must count up from 0")
    control = {name for name, id in added.items() if vocab.get(name) == id and id not in visible} | {"<s>", "</s>"}
    types = [
        USER_DEFINED if id in visible and name in added else _piece_type(name, unk, control)
        for id, name in enumerate(names)
    ]
    formed = scores_of_merges(names, types, model.get("merges") or ())
    # Pieces that nothing forms (single characters) never win a merge; their score only has to be low.
    scores = [formed.get(name, -float(len(names))) for name in names]
    notes: tuple[str, ...] = ()
    if is_llama2(names):
        released = llama2_scores(names)
        known = {name: score for name, score in zip(names[:LLAMA2_PIECES], released, strict=False) if name in formed}
        if _order({name: formed[name] for name in known}) != _order(known):
            scores = released
            notes = ("model.merges are not in Llama 2's order, though the tokens are Llama 2's. Using Llama 2's order",)
    return PieceVocabulary(
        model=PieceModel(pieces=names, scores=scores, types=types, dummy_prefix=_dummy_prefix(content)),
        added={name: id for name, id in added.items() if id >= len(names)},
        visible=visible,
        notes=notes,
    )


def _order(scores: Mapping[str, float]) -> list[str]:
    """Pieces by score, best first; pieces of equal score in a fixed order."""
    return sorted(scores, key=lambda piece: (-scores[piece], piece))


def _piece_type(name: str, unk: str, control: set[str]) -> int:
    if name == unk:
        return UNKNOWN
    if byte_piece(name) is not None:
        return BYTE
    return CONTROL if name in control else NORMAL


def _dummy_prefix(content: Mapping[str, Any]) -> bool:
    """Whether text gets a leading space; raises TokenizerError when spaces are treated in another way than Llama's."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    normalizers = _steps(content, "normalizer", "normalizers")
    splitters = _steps(content, "pre_tokenizer", "pretokenizers")
    if not splitters and normalizers in ([prepend, replace], [replace]):
        return len(normalizers) == 2
    if not normalizers and len(splitters) == 1 and splitters[0].get("type") == "Metaspace":
        metaspace = splitters[0]
        scheme = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
        if metaspace.get("replacement") == _SPACE and metaspace.get("split", True) is False:
            return scheme != "never"
    raise TokenizerError(
        "normalizer and pre_tokenizer do not write spaces as Llama 1 and 2 do: either Prepend('▁') + Replace(' ', '▁') and no "
        "pre_tokenizer, or Metaspace with split false and no normalizer"
    )


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    if not isinstance(value, Mapping):
        raise TokenizerError(f"{key} is missing or not an object")
    return value
