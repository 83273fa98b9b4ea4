"""Where Meta's encoder cuts long text before it is tokenized (llama-models, models/llama3/tokenizer.py).

Text is cut into slices of 400,000 characters, and a slice wherever 25,000 whitespace or 25,000 other characters have followed
one another. The parts are encoded on their own, so every cut is a token boundary. The cuts also keep the regex engine's stack
and the merge loop small, whatever the text.
"""

from __future__ import annotations

import re

__all__ = ["MAX_RUN", "MAX_SLICE", "cut"]

MAX_SLICE = 400_000
MAX_RUN = 25_000

# Every run longer than MAX_RUN covers at least one window of this length that starts at a multiple of it.
_WINDOW = MAX_RUN // 2
# On str, \s is exactly str.isspace(), which is what the limit counts.
_SPACE, _OTHER, _RUNS = re.compile(r"\s"), re.compile(r"\S"), re.compile(r"\s+|\S+")


def cut(text: str) -> list[str]:
    """The parts of `text` in order; joined they are `text`."""
    if len(text) <= MAX_RUN:
        return [text]
    parts: list[str] = []
    for start in range(0, len(text), MAX_SLICE):
        piece = text[start : start + MAX_SLICE]
        if _may_hold_long_run(piece):
            parts.extend(_cut_runs(piece))
        else:
            parts.append(piece)
    return parts


def _may_hold_long_run(text: str) -> bool:
    """False only when no run is longer than MAX_RUN. Looks for the first space and the first other character of each
    window, so it costs next to nothing."""
    windows = ((start, start + _WINDOW) for start in range(0, len(text) - _WINDOW + 1, _WINDOW))
    return not all(_SPACE.search(text, *window) and _OTHER.search(text, *window) for window in windows)


def _cut_runs(text: str) -> list[str]:
    parts: list[str] = []
    start = 0
    for run in _RUNS.finditer(text):
        for end in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            parts.append(text[start:end])
            start = end
    parts.append(text[start:])
    return parts
