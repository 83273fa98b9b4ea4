"""The catalog: every released model of the family, and how to find one by any of its names. Imports no torch.

A checkpoint's own config file always wins over these numbers: community copies and first uploads differ in places.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache

from herd.errors import UnknownModelError
from herd.model.presets_early import EARLY
from herd.model.presets_guard import GUARDS
from herd.model.presets_late import LATE
from herd.model.release import Release

__all__ = ["RELEASES", "Wanted", "find", "wanted"]

RELEASES: tuple[Release, ...] = EARLY + LATE + GUARDS

_QUANT = re.compile(r"-(i?q\d[\w-]*|fp16|bf16|f16|f32)$")
_VARIANT = re.compile(r"-?(instruct|chat|it|text|base)$")
_PACKED = re.compile(r"fp8|int\d|spinquant|qlora", re.IGNORECASE)


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
    tag = _VARIANT.sub("", _QUANT.sub("", tag))
    return [plain, f"{family}:{tag or 'latest'}"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a name asks for. `names` are the released names it may mean, best first, of `release.repos` and `release.native`.

    `exact` holds those that it is, letter by letter or without the organisation; `tuned` is None where the name leaves the
    variant open (then tuned ones come first); `quant` is an Ollama tag's quantization, in small letters with hyphens.
    """

    release: Release
    names: tuple[str, ...]
    exact: tuple[str, ...] = ()
    tuned: bool | None = None
    quant: str | None = None


def wanted(name: str) -> Wanted:
    """As `find`, with the variant and the quantization that the name asks for.

    Where only capitals tell a Hugging Face name from a catalog id, they count: `Llama-3.2-1B` is the base model,
    `llama-3.2-1b` whichever there is.
    """
    release = find(name)
    every = release.repos + release.native
    exact = tuple(sorted((n for n in every if _is_called(name, n, release)), key=lambda n: n != name))
    if exact:
        tuned, packed = release.is_tuned(exact[0]), _packed(exact[0])
        same = [n for n in every if release.is_tuned(n) == tuned and _packed(n) == packed and n not in exact]
        return Wanted(release, (*exact, *same), exact, tuned)
    _, _, tag = _plain(name).partition(":")
    quant = _QUANT.search(tag)
    variant = _VARIANT.search(_QUANT.sub("", tag))
    if variant is None:
        names = sorted(every, key=lambda n: (bool(_packed(n)), not release.is_tuned(n)))
        tuned = None
    else:
        tuned = variant[1] not in ("text", "base")
        names = [n for n in every if release.is_tuned(n) == tuned and not _packed(n)]
    return Wanted(release, tuple(names), (), tuned, quant[1] if quant else None)


def _is_called(name: str, released: str, release: Release) -> bool:
    plain, short = _plain(name), released.rpartition("/")[2]
    if "/" in released and plain == _plain(released):
        return True
    if name == short != release.id:
        return True
    return plain == _plain(short) and plain not in {release.id, _plain(release.name), *release.tags}


def _packed(name: str) -> list[str]:
    """The words of a released name that say its numbers are not plain floating point."""
    return [word.lower() for word in _PACKED.findall(name)]


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
