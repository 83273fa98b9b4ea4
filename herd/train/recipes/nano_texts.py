"""The texts herd-nano is pretrained on: which, in what order, cleaned how.

The model is so small that what matters is simple, fluent English. Documents are therefore ranked by readability, the modern
picture stories (African Storybook, Pratham Books) are repeated, and the simplest texts come last, when the learning rate
falls. Everything used is public domain, CC BY or CC BY-SA (see the data README); attribution goes into the model card.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.data.read import RowReport, read_rows

__all__ = ["Text", "clean", "load_texts", "readability", "validation_texts"]

PICTURE = ("global-asp/asp-source", "global-asp/pb-source")
EXTRA_BOOKS = ("The Boxcar Children", "The Secret Garden", "The Adventures of Pinocchio", "Anne of Avonlea")

_HEADING = re.compile(r"^(?:CHAPTER|LESSON|Chapter|Lesson|PART|BOOK)\b[^a-z]{0,60}$|^[IVXLC]+\.?$|^[^a-z]{3,80}$")
_NUMBERED = re.compile(r"^\d{1,2}\. (?=[\"'A-Z])")
_CREDIT = re.compile(
    r"^(?:This (?:story|book) (?:was|has been|is) (?:written|adapted|created|translated|originally|published|told)"
    r"|Illustrat|Copyright|Published|Written by|\(?Adapted from|PUBLISHERS|Publisher|Author|Translated)"
)


@dataclass(frozen=True, slots=True)
class Text:
    """One cleaned document: `grade` is its readability index, `kind` is picture, news or book."""

    text: str
    title: str
    source: str
    kind: str
    grade: float


def readability(text: str) -> float:
    """Automated readability index: about the US school grade that can read it (Smith and Senter, 1967)."""
    words = text.split()
    letters = sum(map(len, words))
    sentences = len(re.findall(r"[.!?]+", text))
    return 4.71 * letters / max(1, len(words)) + 0.5 * len(words) / max(1, sentences) - 21.43


def clean(text: str) -> str:
    """Drop headings, credits and paragraph numbers, and unify dashes and quotation marks."""
    for old, new in (("\u2019", "'"), ("\u2018", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u2014", "--"), ("_", "")):
        text = text.replace(old, new)
    kept = []
    for line in text.split("\n"):
        line = re.sub(r"[ \t]+", " ", _NUMBERED.sub("", line.strip()))
        if line and (_HEADING.match(line) or _CREDIT.match(line)):
            continue
        kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def load_texts(data: Path, report: RowReport) -> list[Text]:
    """Every candidate document of pretrain/, cleaned, in file order."""
    texts = []
    for row in read_rows(
        data / "pretrain/en_children.jsonl.zst", report, bad="skip", require=("text", "source", "license")
    ):
        if row.get("level") == "Adv":
            continue
        kind = "picture" if row["source"] in PICTURE else "news" if "level" in row else "book"
        texts.append(_text(row, kind))
    for row in read_rows(
        data / "pretrain/en_books.jsonl.zst", report, bad="skip", require=("text", "title", "license")
    ):
        if row["title"] in EXTRA_BOOKS:
            texts.append(_text(row, "book"))
    return [text for text in texts if len(text.text) > 150]


def _text(row: Mapping[str, Any], kind: str) -> Text:
    text = clean(row["text"])
    return Text(text, row.get("title", ""), row.get("source", ""), kind, readability(text))


def validation_texts(data: Path) -> list[str]:
    """Held-out children's documents of eval/lm_valid, as they are: for bits per byte only, never for training."""
    rows: Iterable[Mapping[str, Any]] = read_rows(data / "eval/lm_valid.jsonl.gz", require=("text", "set"))
    return [row["text"] for row in rows if row["set"] == "en_children"]
