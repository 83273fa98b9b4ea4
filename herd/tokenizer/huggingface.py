"""Reads Hugging Face's `tokenizer.json` and the small files beside it, and says which rule herd could not keep.

Format: huggingface/tokenizers, src/models/bpe and src/pre_tokenizers. Two schemes belong to Llama: byte-level BPE with a regex
split and `ignore_merges` (3, 4), and BPE over characters with byte fallback and "▁" for spaces (1, 2, Code). Anything that
would change ids is a TokenizerError that names the JSON field; damage is a CheckpointError.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from herd.errors import CheckpointError, TokenizerError
from herd.tokenizer.bytelevel import from_alphabet
from herd.tokenizer.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, PieceModel, byte_piece
from herd.tokenizer.released import is_llama2, llama2_scores, released_family
from herd.tokenizer.tokenizer import Family
from herd.tokenizer.vocabulary import ByteVocabulary, PieceVocabulary, Settings

__all__ = [
    "check_byte_merges",
    "family_of_regex",
    "open_tokenizer_json",
    "parse_json",
    "read_settings",
    "read_tokenizer_json",
]

MAX_JSON = 256 * 2**20
"""Larger files are refused: the released ones have 2 to 28 MB."""

_SPACE = "▁"
_MERGES = re.compile(r'(?<!\\)"merges"\s*:\s*\[')
_END_OF_MERGES = re.compile(r"\]\s*\}\s*\}\s*$")


def open_tokenizer_json(path: str | os.PathLike[str], family: Family | None = None) -> ByteVocabulary | PieceVocabulary:
    """The vocabulary in a `tokenizer.json` file. `family` overrides what the regex says.

    The merges are two thirds of a Llama 3 or 4 file and say nothing when the ranks are Meta's own, so they are parsed only
    when they are not. Raises CheckpointError for damage and TokenizerError for rules that are not Llama's.
    """
    text = _read_text(Path(path))
    merges = _MERGES.search(text)
    if merges and _END_OF_MERGES.search(text, len(text) - 64):
        try:
            vocabulary = read_tokenizer_json(json.loads(text[: merges.end()] + "]}}"), family)
        except (TokenizerError, ValueError, RecursionError):
            pass  # the whole file is read below, and says what is wrong with it
        else:
            if isinstance(vocabulary, ByteVocabulary) and released_family(vocabulary.ranks):
                return vocabulary
    return read_tokenizer_json(_parse(text, Path(path)), family)


def read_tokenizer_json(content: Mapping[str, Any], family: Family | None = None) -> ByteVocabulary | PieceVocabulary:
    """The vocabulary of a parsed `tokenizer.json`. `family` overrides what the regex says."""
    model = _mapping(content, "model")
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise TokenizerError(f"model.type is {kind!r}; Llama tokenizers are 'BPE'")
    vocab = _mapping(model, "vocab")
    if not all(isinstance(id, int) for id in vocab.values()):
        raise TokenizerError("model.vocab has ids that are not integers")
    added: dict[str, int] = {}
    visible: set[int] = set()
    for entry in content.get("added_tokens") or ():
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
        return _byte_vocabulary(content, model, vocab, added, frozenset(visible), family)
    if model.get("byte_fallback"):
        return _piece_vocabulary(content, model, vocab, added, frozenset(visible))
    raise TokenizerError("neither a ByteLevel pre_tokenizer (Llama 3, 4) nor model.byte_fallback (Llama 1, 2) is there")


def family_of_regex(pattern: str) -> Family | None:
    """Which Llama family cuts text with this regex."""
    from herd.tokenizer.tiktoken import REGEX

    return next((family for family, regex in REGEX.items() if regex == pattern), None)


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
) -> ByteVocabulary:
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
    found = family_of_regex(regex) if isinstance(regex, str) else None
    if found is None and family is None:
        raise TokenizerError(
            f"pre_tokenizer Split has the pattern {regex!r}, which is neither Llama 3's nor Llama 4's; pass family='llama3' or "
            "family='llama4' to cut text with one of theirs"
        )
    names = sorted((name for name in vocab if added.get(name) != vocab[name]), key=vocab.__getitem__)
    if [vocab[name] for name in names] != list(range(len(names))):
        gap = next(i for i, name in enumerate(names) if vocab[name] != i)
        raise TokenizerError(f"model.vocab has no single token with id {gap}; ids must count up from 0")
    ranks = from_alphabet(names)
    if released_family(ranks) is None:  # the merges of the released ranks are known: by rank
        check_byte_merges(names, model.get("merges") or ())
    return ByteVocabulary(ranks=ranks, family=family or found or "llama3", added=added, visible=visible)


def check_byte_merges(names: Sequence[str], merges: Iterable[str | Sequence[str]]) -> None:
    """Raise TokenizerError unless merging by rank and merging by this list are the same thing.

    The list must form tokens in rank order, and form every token that two others could form. (One split of each token is
    enough: a piece merges the same way inside a longer text as on its own, up to where a longer token takes part of it.)
    """
    ids = {name: id for id, name in enumerate(names)}
    formed = [ids.get(left + right, -1) for left, right in split_merges(merges)]
    if formed and min(formed) < 0:
        left, right = list(split_merges(merges))[formed.index(-1)]
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


def split_merges(merges: Iterable[str | Sequence[str]]) -> Iterator[tuple[str, str]]:
    """The two halves of each merge: written "a b" in older files, ["a", "b"] in newer ones."""
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2:
            raise TokenizerError(f"model.merges has the entry {merge!r}, which is not a pair")
        yield parts[0], parts[1]


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
    types = [_piece_type(name, unk, control) for name in names]
    formed = _scores_of_merges(names, types, model.get("merges") or ())
    # Pieces that nothing forms (single characters) never win a merge; their score only has to be low.
    scores = [formed.get(name, -float(len(names))) for name in names]
    notes: tuple[str, ...] = ()
    if is_llama2(names):
        released = llama2_scores(names)
        if _order(formed) != _order(
            {name: score for name, score in zip(names, released, strict=True) if name in formed}
        ):
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


def _scores_of_merges(
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
    for at, (left, right) in enumerate(split_merges(merges)):
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


# -- the files beside it


def parse_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file and, for broken JSON, the byte offset."""
    return _parse(_read_text(Path(path)), Path(path))


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(f"{size:,} bytes; a JSON file of a tokenizer has at most {MAX_JSON:,}", path=path)
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError("is not UTF-8", path=path, offset=error.start) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode())
        raise CheckpointError(f"line {error.lineno}: broken JSON ({error.msg})", path=path, offset=offset) from None
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"broken JSON ({type(error).__name__}: {error})", path=path) from None
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", path=path)
    return content


def read_settings(folder: str | os.PathLike[str]) -> Settings:
    """What tokenizer_config.json, chat_template.jinja, chat_template.json and generation_config.json of a folder say."""
    folder = Path(folder)
    config = _optional(folder / "tokenizer_config.json")
    generation = _optional(folder / "generation_config.json")
    added: dict[str, int] = {}
    visible: set[int] = set()
    decoder = config.get("added_tokens_decoder")
    for id, entry in (decoder if isinstance(decoder, Mapping) else {}).items():
        if not str(id).isdecimal() or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise CheckpointError(
                f"added_tokens_decoder has a broken entry {id!r}", path=folder / "tokenizer_config.json"
            )
        added[entry["content"]] = int(id)
        if not entry.get("special", False):
            visible.add(int(id))
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(id) is int and id >= 0 for id in ends):
        raise CheckpointError(f"eos_token_id is {ends!r}, not token ids", path=folder / "generation_config.json")
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, Mapping) else eos
    chat_format = config.get("chat_format")
    return Settings(
        template=_template(folder, config),
        chat_format=chat_format if isinstance(chat_format, str) else None,
        stop_ids=frozenset(ends),
        stop_names=frozenset([eos] if isinstance(eos, str) else []),
        added=added,
        visible=frozenset(visible),
    )


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, where transformers looks for it: its own files first, then tokenizer_config.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError("is not UTF-8", path=jinja, offset=error.start) from None
    for source in (_optional(folder / "chat_template.json"), config):
        found = source.get("chat_template")
        if isinstance(found, list):  # several named templates; "default" is the one for chat
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def _optional(path: Path) -> dict[str, Any]:
    return parse_json(path) if path.is_file() else {}


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    if not isinstance(value, Mapping):
        raise TokenizerError(f"{key} is missing or not an object")
    return value
