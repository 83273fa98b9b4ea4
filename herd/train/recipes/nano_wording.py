"""Turning templates into texts: choices, articles, and the many ways a question is typed."""

from __future__ import annotations

import random
import re

__all__ = ["cap", "expand", "vary", "with_article"]


def expand(template: str, rng: random.Random) -> str:
    """Replace every {a|b|c} by one of its alternatives, innermost first."""
    inner = re.compile(r"\{([^{}]*)\}")
    while match := inner.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    return template


def cap(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """`noun` with "a" or "an" in front, by its first letter."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def vary(question: str, rng: random.Random) -> str:
    """Dress a bare question as people type it: capital or not, question mark or not, a polite word now and then."""
    asks = re.match(r"(what|which|how|who|where|when|why|can|is|are|do|does|did|with|will)\b", question) is not None
    text = question
    if asks and rng.random() < 0.06:
        text = rng.choice(["please tell me, ", "hi, ", "hello, ", "i have a question: ", "ok, ", "and ", "so, "]) + text
    elif (asks or question.startswith(("tell", "name", "write", "give", "say"))) and rng.random() < 0.05:
        text = text + rng.choice([", please", " please"])
    if rng.random() < 0.12:
        text = re.sub(r"\bwhat is\b", "what's", text, count=1)
    text = cap(text) if rng.random() < 0.75 else text
    end = "?" if asks else "."
    return text + (end if rng.random() < 0.75 and text[-1] not in ".!?" else "")
