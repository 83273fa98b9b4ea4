"""Opens the tokenizer of a checkpoint folder or a single file, whatever its format, by looking at the content.

`tokenizer.model` is the authority (Meta's own file), `tokenizer.json` is used where there is none. When a folder holds both,
their vocabularies are compared and a difference is reported as a TokenizerFilesWarning.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from herd.errors import CheckpointError, TokenizerError, TokenizerFileError
from herd.tokenizer.gguf import tokenizer_from_gguf
from herd.tokenizer.huggingface import open_tokenizer_json
from herd.tokenizer.pieces import NORMAL, PieceModel
from herd.tokenizer.ranks import parse_ranks
from herd.tokenizer.settings import read_file, read_settings
from herd.tokenizer.special import INFILL_PIECES, RANKS, STEP_PIECE
from herd.tokenizer.tokenizer import Family, Tokenizer
from herd.tokenizer.vocabulary import ByteVocabulary, PieceVocabulary, Settings, TokenizerFilesWarning, build_tokenizer

__all__ = ["TokenizerFilesWarning", "load_tokenizer", "read_vocabulary", "tokenizer_from_gguf"]

MAX_MODEL = 64 * 2**20
"""Larger `tokenizer.model` files are refused: the released ones have 0.5 to 3.6 MB."""

_NATIVE = ("tokenizer.model", "original/tokenizer.model")
_RENUMBERED = re.compile(r"<\|(\w*reserved_special_token_\d+|image)\|>")  # names that move between releases


def load_tokenizer(path: str | os.PathLike[str], *, family: Family | None = None) -> Tokenizer:
    """Open the tokenizer in a folder or file.

    A folder may hold Meta's files, Hugging Face's or both; a file may be a `tokenizer.model` (either kind) or a
    `tokenizer.json`. `family` overrides what the content says, for vocabularies of Llama's scheme that herd does not know.
    Raises CheckpointError for missing or damaged files and TokenizerError for a vocabulary whose rules are not Llama's.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, family)
    return _build(path, read_vocabulary(path, family), Settings())


def read_vocabulary(path: str | os.PathLike[str], family: Family | None = None) -> ByteVocabulary | PieceVocabulary:
    """The vocabulary in one `tokenizer.model` or `tokenizer.json` file, recognised by its content."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("no such file", path=path)
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise CheckpointError("the file is empty", path=path)
    if head.startswith(b"GGUF"):
        raise CheckpointError("is a GGUF file: open it as a checkpoint, its vocabulary comes with it", path=path)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError("is a Git LFS pointer, not the file itself; run `git lfs pull`", path=path)
    try:
        if head.lstrip().startswith(b"{"):
            return open_tokenizer_json(path, family)
        data = read_file(path, MAX_MODEL)
        if all(byte in b"\t\n\r" or 0x20 <= byte < 0x7F for byte in head):
            return _native_ranks(parse_ranks(data, path), path, family)
        return PieceVocabulary(model=PieceModel.parse(data, path))
    except TokenizerError as error:
        raise TokenizerFileError(str(error), path=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None


def _native_ranks(ranks: list[bytes], path: Path, family: Family | None) -> ByteVocabulary:
    found: Family | None = family
    if len(ranks) in RANKS.values():
        found = "llama3" if len(ranks) == RANKS["llama3"] else "llama4"
    if found is None:
        raise CheckpointError(
            f"{len(ranks):,} ranks; Llama 3 has {RANKS['llama3']:,} and Llama 4 {RANKS['llama4']:,}. Either the file is cut off "
            "or it is another vocabulary: pass family='llama3' or family='llama4' if it follows that scheme",
            path=path,
        )
    return ByteVocabulary(ranks=ranks, family=family or found)


def _load_folder(folder: Path, family: Family | None) -> Tokenizer:
    files = [folder / name for name in (*_NATIVE, "tokenizer.json") if (folder / name).is_file()]
    if not files:
        hint = "; it holds a GGUF file, open that" if any(folder.glob("*.gguf")) else ""
        raise CheckpointError(f"no tokenizer.model, original/tokenizer.model or tokenizer.json here{hint}", path=folder)
    chosen, *others = files
    vocabulary = read_vocabulary(chosen, family)
    settings = read_settings(folder)
    for other in others:
        try:
            second = read_vocabulary(other, family)
        except (CheckpointError, TokenizerError) as error:
            _warn(f"{error}. Using {chosen}")
            continue
        if difference := _difference(vocabulary, second):
            _warn(f"{other} disagrees with {chosen}: {difference}. Using {chosen}")
            continue
        settings = _merge(settings, second)
    tokenizer = _build(chosen, vocabulary, settings)
    _report_renamed(tokenizer, settings.added, folder, chosen)
    return tokenizer


def _build(path: Path, vocabulary: ByteVocabulary | PieceVocabulary, settings: Settings) -> Tokenizer:
    for note in vocabulary.notes:
        _warn(f"{path}: {note}")
    try:
        return build_tokenizer(vocabulary, settings)
    except TokenizerError as error:
        raise TokenizerFileError(str(error), path=path) from None


def _merge(settings: Settings, second: ByteVocabulary | PieceVocabulary) -> Settings:
    """`settings` with the added tokens of a second file."""
    return Settings(
        template=settings.template,
        chat_format=settings.chat_format,
        stop_ids=settings.stop_ids,
        stop_names=settings.stop_names,
        added={**settings.added, **second.added},
        visible=settings.visible | second.visible,
    )


def _difference(first: ByteVocabulary | PieceVocabulary, second: ByteVocabulary | PieceVocabulary) -> str | None:
    """What would make two vocabularies give different ids, in words; None when they agree."""
    if isinstance(first, ByteVocabulary) and isinstance(second, ByteVocabulary):
        if first.family != second.family:
            return f"it cuts text as {second.family}, not as {first.family}"
        if len(first.ranks) != len(second.ranks):
            return f"it has {len(second.ranks):,} ranks, not {len(first.ranks):,}"
        if first.ranks != second.ranks:
            at = next(i for i, (a, b) in enumerate(zip(first.ranks, second.ranks, strict=True)) if a != b)
            return f"id {at} is {second.ranks[at]!r}, not {first.ranks[at]!r}"
        return None
    if isinstance(first, PieceVocabulary) and isinstance(second, PieceVocabulary):
        a, b = first.model, second.model
        if len(a.pieces) != len(b.pieces):
            return f"it has {len(b.pieces):,} pieces, not {len(a.pieces):,}"
        at = next((i for i, (x, y) in enumerate(zip(a.pieces, b.pieces, strict=True)) if x != y), None)
        if at is not None:
            return f"id {at} is {b.pieces[at]!r}, not {a.pieces[at]!r}"
        if a.dummy_prefix != b.dummy_prefix:
            return f"it puts {'a' if b.dummy_prefix else 'no'} space before the text"
        if _order(a) != _order(b) and _order(a, formed_only=True) != _order(b, formed_only=True):
            return "it merges in another order"
        return None
    return "one is a byte-BPE vocabulary, the other a SentencePiece one"


def _order(model: PieceModel, *, formed_only: bool = False) -> list[int]:
    """Ids of the longer pieces, best score first; `formed_only`: only those that a merge of two others gives."""
    special = {*INFILL_PIECES, STEP_PIECE}  # never formed from text, whatever type a file gives them
    longer = [
        id
        for id, piece in enumerate(model.pieces)
        if len(piece) > 1 and model.types[id] == NORMAL and piece not in special
    ]
    if formed_only:
        known = set(model.pieces)
        splits = {id: range(1, len(model.pieces[id])) for id in longer}
        longer = [
            id for id in longer if any({model.pieces[id][:at], model.pieces[id][at:]} <= known for at in splits[id])
        ]
    return sorted(longer, key=lambda id: -model.scores[id])


def _report_renamed(tokenizer: Tokenizer, added: Mapping[str, int], folder: Path, chosen: Path) -> None:
    for name, id in added.items():
        ours = tokenizer.special.ids.get(name, id)
        if ours != id and not _RENUMBERED.fullmatch(name):
            _warn(
                f"the Hugging Face files in {folder} give {name} the id {id}, {chosen.name} gives it {ours}. Using {ours}"
            )


def _warn(message: str) -> None:
    warnings.warn(message, TokenizerFilesWarning, stacklevel=4)
