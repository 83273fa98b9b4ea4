"""The catalog: every released model of the family, and how to find one by any of its names. Imports no torch.

A checkpoint's own config file always wins over these numbers: community copies and first uploads differ in places.
"""

from __future__ import annotations

import difflib
import re
from functools import cache

from herd.errors import UnknownModelError
from herd.model.presets_early import EARLY
from herd.model.presets_guard import GUARDS
from herd.model.presets_late import LATE
from herd.model.release import Release

__all__ = ["RELEASES", "find"]

RELEASES: tuple[Release, ...] = EARLY + LATE + GUARDS

_QUANT = re.compile(r"-(i?q\d[\w-]*|fp16|bf16|f16|f32)$")
_TUNED = re.compile(r"-?(instruct|chat|text|it)$")


def find(name: str) -> Release:
    """The release called `name`, whatever the case.

    Understands catalog ids (`llama-3.2-1b`), Hugging Face ids with or without the organisation, Meta's names
    (`Llama3.2-1B-Instruct`) and Ollama tags with their endings (`llama3.2`, `llama3.1:8b-instruct-q4_K_M`,
    `llama3:latest`). Raises UnknownModelError with the nearest names.
    """
    names = _names()
    for spelling in _spellings(name):
        if spelling in names:
            return names[spelling]
    near = _nearest(_plain(name))
    hint = f"the nearest are {', '.join(near)}" if near else "a name looks like llama3.2:1b or llama-3.1-8b"
    raise UnknownModelError(f"there is no model called {name[:80]!r} in the catalog: {hint}", near=near)


def _nearest(plain: str) -> tuple[str, ...]:
    """The closest spelling of each of the up to three closest releases."""
    names = _names()
    best: dict[str, str] = {}
    for spelling in difflib.get_close_matches(plain, names, n=12, cutoff=0.5):
        best.setdefault(names[spelling].id, spelling)
    return tuple(best.values())[:3]


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _spellings(name: str) -> list[str]:
    """`name` as written, then as an Ollama tag without its endings."""
    plain = _plain(name)
    family, _, tag = plain.removeprefix("library/").partition(":")
    tag = _TUNED.sub("", _QUANT.sub("", tag))
    return [plain, f"{family}:{tag or 'latest'}"]


@cache
def _names() -> dict[str, Release]:
    """Every known spelling in lower case -> its release. A spelling that would mean two releases is a mistake here."""
    names: dict[str, Release] = {}
    for release in RELEASES:
        spellings = {release.id, release.name, *release.tags}
        for name in (*release.repos, *release.native):
            spellings |= {name, name.rpartition("/")[2]}
        for spelling in map(_plain, spellings):
            assert names.setdefault(spelling, release) is release, spelling
    return names
