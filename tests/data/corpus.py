"""Small files of every kind that is trained on, and the embedded vocabulary to read them with."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import herd
from herd.chat.format import ChatFormat
from herd.chat.formats import detect
from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.tokenizer import Tokenizer

TEXT = "the cat a dog went to see saw big small tree house and but then ran home with its friend who said yes no why"
WORDS = TEXT.split()


@cache
def tokenizer() -> Tokenizer:
    """The vocabulary of herd-nano: 4096 ids."""
    return load_tokenizer(Path(herd.__file__).parent / "embedded/nano")


@cache
def chat_format() -> ChatFormat:
    """The prompt format of herd-nano."""
    return detect(tokenizer())


def sentence(rng: random.Random, least: int = 2, most: int = 30) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most))).capitalize() + "."


def texts(count: int, seed: int = 0, most: int = 60) -> list[dict[str, Any]]:
    """Rows with a text."""
    rng = random.Random(seed)
    return [{"text": sentence(rng, 2, most), "id": i} for i in range(count)]


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with conversations of one to three exchanges."""
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": role, "content": sentence(rng, 2, 12)}
                for _ in range(rng.randint(1, 3))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(count)
    ]


def completions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a prompt and how it goes on."""
    rng = random.Random(seed)
    return [{"prompt": sentence(rng), "completion": " " + sentence(rng)} for _ in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
