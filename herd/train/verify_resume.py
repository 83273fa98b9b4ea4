"""Proof for users that their own run can be interrupted: trained straight, and in two parts, and compared byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.errors import ConfigError
from herd.files import read_json
from herd.train.state import MANIFEST, STATE, damage

__all__ = ["Proof", "verify_resume"]

TABLE = ".metadata"
"""torch's table of contents of several ranks' tensors: it names the folder and a random id of the save, and no value."""

Run = Callable[[Path, int], object]
"""`run(out, until)`: build everything anew, go on from the newest checkpoint in `out` if there is one, and end after step `until`
with a checkpoint."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared. `exact` when nothing differs; `digest` is that of the trained tensors and optimiser states."""

    steps: int
    at: int
    files: int
    nbytes: int
    digest: str
    differences: tuple[str, ...]

    @property
    def exact(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if self.exact:
            return (
                f"exact: {self.steps} steps straight, and {self.at} + {self.steps - self.at} with a resume between, gave the "
                f"same {self.files} files ({self.nbytes:,} bytes): weights, optimiser, random states, data position "
                f"(SHA-256 {self.digest[:16]}...)"
            )
        return f"NOT exact after {self.at} + {self.steps - self.at} steps:\n  " + "\n  ".join(self.differences)


def verify_resume(
    run: Run, folder: Path, *, steps: int, at: int | None = None, tell: Callable[[str], None] = lambda text: None
) -> Proof:
    """Train `steps` steps straight and again with an end and a resume after step `at` (default: the middle); compare.

    The runs are left in `folder`/straight and `folder`/resumed. Raises ConfigError when `folder` has runs already.
    """
    at = steps // 2 if at is None else at
    if not 0 < at < steps:
        raise ConfigError(
            f"verify-resume: a resume after step {at} of {steps}: give at least two steps, and one in between"
        )
    straight, resumed = folder / "straight", folder / "resumed"
    for place in (straight, resumed):
        if place.exists():
            raise ConfigError(f"{place} exists already: verify in a new folder")
    for text, out, until in (
        (f"{steps} steps straight", straight, steps),
        (f"{at} steps, then an end", resumed, at),
        (f"resumed, to step {steps}", resumed, steps),
    ):
        tell(text)
        run(out, until)
    one, other = (out / "checkpoints" / f"step-{steps:08d}" for out in (straight, resumed))
    for place in (one, other):
        why = damage(place, deep=True)
        if why is not None:
            raise ConfigError(f"{place} is not whole ({why}): is the budget shorter than {steps} steps?")
    files = {name: facts for name, facts in read_json(one / MANIFEST)["files"].items() if name != TABLE}
    tensors = {name: facts for name, facts in files.items() if not name.endswith(".json")}
    digest = "".join(facts["sha256"] for facts in tensors.values())
    return Proof(
        steps, at, len(files), sum(facts["bytes"] for facts in files.values()), digest, tuple(_differences(one, other))
    )


def _differences(one: Path, other: Path) -> Iterator[str]:
    """Files that differ; of the state everything but the seconds it took, of a table of contents only whether it is there."""
    straight, resumed = read_json(one / MANIFEST)["files"], read_json(other / MANIFEST)["files"]
    for name in sorted(straight.keys() | resumed.keys()):
        if name == STATE:
            yield from _values("", _timeless(one), _timeless(other))
        elif name == TABLE and name in straight and name in resumed:
            continue
        elif straight.get(name) != resumed.get(name):
            yield f"{name} is another file after the resume"


def _timeless(place: Path) -> dict[str, Any]:
    state = read_json(place / STATE)
    state["counters"] = {key: value for key, value in state["counters"].items() if key != "seconds"}
    return state


def _values(prefix: str, straight: Any, resumed: Any) -> Iterator[str]:
    if isinstance(straight, dict) and isinstance(resumed, dict):
        for key in sorted(straight.keys() | resumed.keys()):
            yield from _values(f"{prefix}.{key}" if prefix else key, straight.get(key), resumed.get(key))
    elif straight != resumed:
        yield f"{prefix}: {straight} straight, {resumed} resumed"
