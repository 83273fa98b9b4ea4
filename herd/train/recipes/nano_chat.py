"""The conversations that herd-nano learns from: facts, small talk, several turns, and questions it had better not answer.

All texts were written for herd-nano, except the questions of Dolly, which are met with "I do not know".
"""

from __future__ import annotations

import random
import re
from pathlib import Path

from herd.data.read import read_rows
from herd.data.records import ChatRecord
from herd.train.recipes.nano_facts import UNKNOWN
from herd.train.recipes.nano_questions import all_facts, held_out
from herd.train.recipes.nano_talk import small_talk
from herd.train.recipes.nano_wording import expand, vary

__all__ = ["NO_IDEA", "chat_rows"]

NO_IDEA = (
    "I do not know that. I am a very small model.",
    "I am sorry, I do not know that. I am only a very small model.",
    "I do not know. I am a very small model, and I know only a few simple things.",
)


def _hard_questions(data: Path) -> list[str]:
    """Short questions of sft/dolly_subset that ask for facts, without those that touch what is taught here."""
    taught = re.compile(
        r"colou?r|capital|animal|name |list |legs|many (days|months)|season|\bfruit|story|write|poem|are you", re.I
    )
    found = []
    for row in read_rows(data / "sft/dolly_subset.jsonl.gz", require=("messages",)):
        text = row["messages"][0]["content"].strip().rstrip("?.").strip()
        plain = text.isascii() and "\n" not in text and 15 <= len(text) <= 60
        if plain and re.match(r"(what|who|when|where|which|how|why)\b", text, re.I) and not taught.search(text):
            found.append(text[:1].lower() + text[1:])
    return found[::2]


def chat_rows(seed: int, data: Path, repeat: int = 2) -> list[ChatRecord]:
    """Training conversations: every fact `repeat` times per phrasing that is not held out, small talk, and several turns.

    The questions (not the answers) of Dolly, written by people, serve as things that a small model had better not know.
    """
    rng = random.Random(seed)
    single: list[tuple[str, str]] = []
    for fact in all_facts():
        times = 1 if fact.kind in ("plus", "minus", "compare") else repeat
        for i, question in enumerate(fact.questions):
            if not held_out(fact, i):
                single += [(vary(question, rng), rng.choice(fact.answers)) for _ in range(times)]
    for _ in range(150):
        a, b = rng.randrange(21, 1000), rng.randrange(21, 1000)
        ask = rng.choice(
            (
                f"what is {a} plus {b}",
                f"what is {a} times {b}",
                f"how much is {a} minus {b}",
                f"{a} + {b}",
                f"what is {a} divided by {b}",
            )
        )
        single.append(
            (vary(ask, rng), rng.choice(("I do not know that. I can only work with small numbers.", NO_IDEA[0])))
        )
    for template in UNKNOWN:
        single += [(vary(expand(template, rng), rng), rng.choice(NO_IDEA)) for _ in range(14)]
    single += [(vary(question, rng), rng.choice(NO_IDEA)) for question in _hard_questions(data)]
    rows = [ChatRecord.pairs(q, a, source="herd") for q, a in single]
    talk = [small_talk(rng) for _ in range(1800 * repeat)]
    rows += [ChatRecord.pairs(*texts, source="herd") for texts in talk]
    for _ in range(2500):
        parts = [rng.choice(single) for _ in range(rng.choice((2, 2, 3)))]
        if rng.random() < 0.5:
            parts.insert(rng.choice((0, len(parts))), small_talk(rng, turns=1))  # type: ignore[arg-type]
        rows.append(ChatRecord.pairs(*(text for pair in parts for text in pair), source="herd"))
    rng.shuffle(rows)
    return rows
