"""A vocabulary of one's own: learned from texts, written in every file format, opened again and compared. No torch.

| kind          | as       | ids                                                                                |
|---------------|----------|------------------------------------------------------------------------------------|
| sentencepiece | Llama 1, 2 | `<unk>`, `<s>`, `</s>`, 256 byte pieces, what was learned by order of merging, letters |
| tiktoken      | Llama 3, 4 | 256 bytes, what was learned by order of merging, the special tokens by Meta's names     |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from herd.convert.torture import texts as hard_texts
from herd.errors import ConfigError, TokenizerError
from herd.tokenizer.files import load_tokenizer, read_vocabulary
from herd.tokenizer.gguf import tokenizer_from_gguf
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import LLAMA3_NAMED, RANKS, llama3_names, llama4_names
from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from herd.tokenizer.vocabulary import ByteVocabulary, PieceVocabulary, Settings, build_tokenizer
from herd.tokenizer.write import gguf_fields, hf_files, meta_file
from herd.tokenizer.write.gguf import F32_ARRAYS, I32_ARRAYS
from herd.train.bytepairs import count_pieces, learn_ranks
from herd.train.piecetrainer import train_pieces

__all__ = ["ByteFamily", "Kind", "Written", "learn", "special_count", "write_vocabulary"]

Kind = Literal["sentencepiece", "tiktoken"]
ByteFamily = Literal["llama3", "llama4"]
Watch = Callable[[str, int, int], None]
"""Told what is done, how far, and of how much."""

SPECIAL: dict[ByteFamily, int] = {"llama3": len(llama3_names()), "llama4": len(llama4_names())}
LEAST: dict[ByteFamily, int] = {"llama3": len(LLAMA3_NAMED), "llama4": llama4_names().index("<|image_end|>") + 1}
"""Special tokens that prompt formats use: fewer are refused."""

COMPARED = 500
"""Texts of the training text whose ids are compared, beside the hard ones."""
COMPARED_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Written:
    """Files of a vocabulary, on how many texts all forms gave equal ids, a fingerprint of all files, and what to know."""

    files: tuple[str, ...]
    compared: int
    sha256: str
    notes: tuple[str, ...]


def special_count(family: ByteFamily, vocab_size: int, asked: int | None = None) -> int:
    """How many special tokens a tiktoken vocabulary of `vocab_size` ids has. Raises ConfigError for an impossible number.

    Without `asked` Meta's number where it is at most an eighth of the ids, otherwise those that prompt formats use.
    """
    usual, least = SPECIAL[family], LEAST[family]
    count = asked if asked is not None else usual if 8 * usual <= vocab_size else least
    if not least <= count <= usual:
        raise ConfigError(
            f"{count} special tokens: {family} names {least} that prompt formats use, and {usual:,} in all"
        )
    return count


def learn(
    texts: Sequence[bytes],
    kind: Kind,
    vocab_size: int,
    *,
    family: ByteFamily = "llama3",
    special: int | None = None,
    watch: Watch = lambda what, done, total: None,
) -> Tokenizer:
    """A tokenizer of `vocab_size` ids in all, learned from UTF-8 `texts`; the same texts give the same tokenizer.

    `family` chooses regex and special tokens of the tiktoken kind, `special` how many of them. Raises ConfigError when the
    text does not give so many tokens.
    """
    if kind == "sentencepiece":
        model = train_pieces(texts, vocab_size, lambda done, total: watch("learning pieces", done, total))
        return build_tokenizer(PieceVocabulary(model=model), Settings())
    n_special = special_count(family, vocab_size, special)
    n_ranks = vocab_size - n_special
    if n_ranks < 256:
        raise ConfigError(f"{vocab_size} ids: 256 bytes and {n_special} special tokens are {256 + n_special}")
    names = (llama3_names() if family == "llama3" else llama4_names())[:n_special]
    if n_ranks in RANKS.values() and n_special != SPECIAL[family]:
        raise ConfigError(f"{n_ranks:,} ranks are known as Meta's: ask for its {SPECIAL[family]:,} special tokens, too")
    size = sum(map(len, texts))
    pieces = count_pieces(texts, family, lambda done: watch("counting pieces, bytes", done, size))
    if not pieces:
        raise ConfigError("there is no text to learn tokens from")
    ranks = learn_ranks(pieces, n_ranks, lambda done, total: watch("learning tokens", done, total))
    added = {name: n_ranks + at for at, name in enumerate(names)}
    return build_tokenizer(ByteVocabulary(ranks=ranks, family=family, added=added), Settings())


def write_vocabulary(tokenizer: Tokenizer, folder: Path, texts: Sequence[bytes] = ()) -> Written:
    """Write every form of `tokenizer` into the empty `folder`, open each again, and compare the ids of hard texts and `texts`.

    `folder` itself is what herd and transformers open; `gguf/` holds the vocabulary for llama.cpp, `meta/` Meta's file of a
    tiktoken vocabulary. Raises TokenizerError when a form gives other ids or another text back.
    """
    from herd.checkpoint.gguf import GGUFFile
    from herd.checkpoint.write.gguf import Typed, write_gguf_file

    files = hf_files(tokenizer)
    notes: list[str] = []
    own_count = isinstance(tokenizer, TiktokenTokenizer) and len(tokenizer.ranks) not in RANKS.values()
    if isinstance(tokenizer, TiktokenTokenizer):
        files["meta/tokenizer.model"] = meta_file(tokenizer, any_special=True)
        if own_count:
            notes.append(
                "meta/tokenizer.model holds no special tokens: whoever opens it alone must know them; the folder itself says all"
            )
    for name, data in files.items():
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
    gguf = folder / "gguf" / "tokenizer.gguf"
    gguf.parent.mkdir(exist_ok=True)
    fields: dict[str, Any] = {"general.architecture": "llama"}
    for key, value in gguf_fields(tokenizer).items():
        typed = "f32" if key in F32_ARRAYS else "i32" if key in I32_ARRAYS else None
        fields[key] = Typed("str", value) if value == [] else Typed(typed, value) if typed else value
    write_gguf_file(gguf, fields, (), lambda count: None)

    opened = {"the folder": load_tokenizer(folder), "tokenizer.json": load_tokenizer(folder / "tokenizer.json")}
    opened["gguf/tokenizer.gguf"] = tokenizer_from_gguf(GGUFFile(gguf).metadata)
    if isinstance(tokenizer, SentencePieceTokenizer):
        opened["tokenizer.model"] = load_tokenizer(folder / "tokenizer.model")
    else:
        _same_ranks(tokenizer, folder / "meta" / "tokenizer.model")
    compared = _chosen(texts)
    for name, other in opened.items():
        _same(tokenizer, other, name, compared)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Written(tuple(names), len(compared), _fingerprint(folder, names), tuple(notes))


def _chosen(texts: Sequence[bytes]) -> list[str]:
    step = max(1, len(texts) // COMPARED)
    return [*hard_texts(), *(text.decode("utf-8")[:COMPARED_CHARS] for text in texts[::step])]


def _same(one: Tokenizer, other: Tokenizer, name: str, texts: Sequence[str]) -> None:
    if (one.vocab_size, one.special.bos, one.special.stop) != (other.vocab_size, other.special.bos, other.special.stop):
        raise TokenizerError(f"{name} was opened with other special tokens than were written: please report this")
    for text in texts:
        ids = one.encode(text)
        if other.encode(text) != ids:
            raise TokenizerError(f"{name} gives other ids for {text[:40]!r} than were learned: please report this")
        if one.decode(ids) != other.decode(ids) or (isinstance(one, TiktokenTokenizer) and one.decode(ids) != text):
            raise TokenizerError(f"{name} gives back another text for {text[:40]!r}: please report this")


def _same_ranks(tokenizer: Tokenizer, path: Path) -> None:
    assert isinstance(tokenizer, TiktokenTokenizer)
    found = read_vocabulary(path, tokenizer.family)
    if not isinstance(found, ByteVocabulary) or list(found.ranks) != list(tokenizer.ranks):
        raise TokenizerError(f"{path.name} was opened with other ranks than were written: please report this")


def _fingerprint(folder: Path, names: Sequence[str]) -> str:
    made = hashlib.sha256()
    for name in names:
        data = (folder / name).read_bytes()
        made.update(f"{name}\0{len(data)}\0".encode())
        made.update(data)
    return made.hexdigest()
