"""What herd-nano learns from, as files that `herd train` reads: texts by kind, conversations, and what it is measured on.

books.jsonl      children's books and school readers up to a readability index of 8
simple.jsonl     those up to 6, which are read more often in the last part of pretraining
pictures.jsonl   picture stories of African Storybook and Pratham Books
news.jsonl       OneStopEnglish, elementary and intermediate level
stories.jsonl    conversations: a story is asked for and told
talk.jsonl       conversations: facts, small talk, several turns, what it does not know
held-out.jsonl   children's documents that are never trained on
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from herd.checkpoint.write.atomic import new_folder
from herd.data.read import RowReport
from herd.data.records import ChatRecord
from herd.errors import TokenizerError
from herd.tokenizer.tokenizer import Tokenizer
from herd.train.recipes.nano_chat import chat_rows
from herd.train.recipes.nano_stories import story_rows
from herd.train.recipes.nano_texts import Text, load_texts, validation_texts
from herd.train.tokenizer import learn, write_vocabulary

__all__ = ["HELD_OUT", "VOCAB_SIZE", "make_vocabulary", "write_data"]

VOCAB_SIZE = 4096
SPECIAL = 32
"""Special tokens in Llama 3's order: the named ones, then reserved ones."""
HARDEST, SIMPLE = 8.0, 6.0
"""Readability indices of books: what is read at all, and what is read more often at the end."""
HELD_OUT = "held-out.jsonl"
SEED = 23
"""Of the wording of conversations."""


def write_data(collection: Path, folder: Path, tell: Callable[[str], None] = print) -> None:
    """Make the files of this module's table out of a data collection, unless `folder` is there already.

    The same collection gives the same bytes. Raises DataError for rows of it that cannot be read.
    """
    if folder.exists():
        return
    report = RowReport()
    texts = [text for text in load_texts(collection, report) if text.kind != "book" or text.grade <= HARDEST]
    report.check()
    kinds = {"books": "book", "pictures": "picture", "news": "news"}
    files: dict[str, list[dict[str, Any]]] = {
        f"{name}.jsonl": [_text(text) for text in texts if text.kind == kind] for name, kind in kinds.items()
    }
    files["simple.jsonl"] = [_text(text) for text in texts if text.kind == "book" and text.grade <= SIMPLE]
    files["stories.jsonl"] = [_chat(record) for record in story_rows(texts, SEED)]
    files["talk.jsonl"] = [_chat(record) for record in chat_rows(SEED, collection, repeat=3)]
    files[HELD_OUT] = [{"text": text} for text in validation_texts(collection)]
    with new_folder(folder) as place:
        for name, rows in files.items():
            _write(place / name, rows)
            tell(f"{name}: {len(rows):,} rows, {(place / name).stat().st_size / 1e6:.1f} MB")


def make_vocabulary(data: Path, folder: Path, tell: Callable[[str], None] = print) -> None:
    """Learn the vocabulary from the texts in `data` by what `herd tokenizer train --special 32` learns with, unless it is there.

    Picture stories count three times: their words are those that it will use.
    """
    if folder.exists():
        return
    rows = {name: _rows(data / f"{name}.jsonl") for name in ("books", "news", "pictures")}
    read = [row for name in rows for row in rows[name] if row["grade"] <= HARDEST] + 2 * rows["pictures"]
    texts = [row["text"].encode() for row in read]
    made: Tokenizer = learn(texts, "tiktoken", VOCAB_SIZE, special=SPECIAL)
    if made.vocab_size != VOCAB_SIZE:
        raise TokenizerError(f"{made.vocab_size} ids were learned, not {VOCAB_SIZE}: please report this")
    with new_folder(folder) as place:
        written = write_vocabulary(made, place, texts)
    tell(
        f"vocabulary of {made.vocab_size:,} ids from {sum(map(len, texts)) / 1e6:.1f} MB, sha256 {written.sha256[:16]}"
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _text(text: Text) -> dict[str, Any]:
    return {"text": text.text, "title": text.title, "source": text.source, "grade": text.grade}


def _chat(record: ChatRecord) -> dict[str, Any]:
    messages = [{"role": turn.role, "content": turn.text.strip()} for turn in record.messages]
    return {"messages": messages, "source": record.source}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
