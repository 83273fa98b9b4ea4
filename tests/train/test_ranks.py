"""Two ranks (FSDP2 over gloo): the losses of one, the same bytes after kill -9, and nobody left waiting. One, killed likewise."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from herd.errors import ConfigError
from herd.parallel.checkpoint import Sharded
from herd.train.state import NEW, latest
from herd.train.trainer import load_weights
from tests.train.loop import model, trainer
from tests.train.runs import Runs

LOSSES = 1e-5
"""Of losses of about 4 nats over 6 steps: ranks add in another order."""
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("runs"), world=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """What a run says that nobody touches, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return runs.run(out, STEPS, lora=False), out


def test_two_ranks_lose_what_one_loses(whole: tuple[list[str], Path]) -> None:
    run, seen = trainer(STEPS)
    run.fit()
    theirs = [float.fromhex(line.split()[1]) for line in whole[0][:-1]]
    assert len(theirs) == STEPS
    assert max(abs(report.loss - loss) for report, loss in zip(seen.steps, theirs, strict=True)) <= LOSSES


def test_one_process_reads_what_two_wrote_and_says_that_going_on_is_not_exact(whole: tuple[list[str], Path]) -> None:
    run, _ = trainer(STEPS)
    run.fit()
    place = latest(whole[1])
    assert place is not None
    read = model(seed=3)
    load_weights(whole[1], read, Sharded())
    for (name, one), two in zip(run.model.named_parameters(), read.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3, msg=name)  # 6 steps of sign-like updates of 3e-3
    other, _ = trainer(STEPS, resume=place, payload=Sharded())
    with pytest.raises(ConfigError, match="world: 2 in the checkpoint, 1 now"):
        other.fit()
    loud, seen = trainer(STEPS, resume=place, payload=Sharded(), exact=False)
    loud.fit()
    assert loud.step == STEPS
    assert any("not exact: world" in note for note in seen.notes)


def test_killed_ranks_resume_to_the_same_bytes(runs: Runs, whole: tuple[list[str], Path], tmp_path: Path) -> None:
    """First both, then one: the other must not wait for the dead."""
    expected, out = whole[0], tmp_path / "out"
    seen: dict[str, str] = {}

    def look(lines: list[str]) -> None:
        for line in lines:
            number, _, what = line.partition(" ")
            assert seen.setdefault(number, what) == what, f"step {number} was another one"

    look(runs.run(out, STEPS, wait=0.02, after=2, lora=False))
    look(runs.run(out, STEPS, wait=0.0, after=1, to=[1], lora=False, statuses={0, 1, 3, signal.SIGKILL}))
    look(runs.run(out, STEPS, lora=False))
    assert [f"{number} {what}" for number, what in seen.items()] == expected


def test_a_signal_to_one_rank_saves_and_ends_all(runs: Runs, whole: tuple[list[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = runs.run(out, STEPS, wait=0.0, after=2, number=signal.SIGTERM, to=[1], lora=False, statuses={75})
    assert all("saved at" in text for text in runs.errors)
    assert [*first, *runs.run(out, STEPS, lora=False)] == whole[0]


@pytest.mark.slow
def test_thirty_kills_of_two_ranks(runs: Runs, whole: tuple[list[str], Path], tmp_path: Path) -> None:
    """Every second one in a save: of the main rank, the other, or both."""
    began = time.monotonic()
    runs.run(tmp_path / "timed", STEPS, lora=False)
    once, times = time.monotonic() - began, runs.times()
    saving = sorted(end - begin for begin, end in zip(times[::2], times[1::2], strict=True))[STEPS // 2]
    expected, seen, out, rng = whole[0], dict[str, str](), tmp_path / "out-0", random.Random(0)
    met = {"kills": 0, "in a growing checkpoint": 0, "finished runs": 0}

    def look(lines: list[str]) -> None:
        for line in lines:
            number, _, what = line.partition(" ")
            assert seen.setdefault(number, what) == what, f"step {number} was another one"
        if "done" in seen:
            assert [f"{number} {what}" for number, what in seen.items()] == expected

    while met["kills"] < 30:
        to, inside = [[0], [1], [0, 1]][met["kills"] % 3], bool(met["kills"] // 3 % 2)
        wait, save = (saving * rng.random(), rng.randint(1, 3)) if inside else (once * rng.random(), 0)
        look(runs.run(out, STEPS, wait=wait, save=save, to=to, lora=False, statuses={0, 1, 3, signal.SIGKILL}))
        met["kills"] += 1
        met["in a growing checkpoint"] += any((out / "checkpoints").glob(f"{NEW}*"))
        latest(out, pytest.fail)  # a damaged one would be told
        if "done" in seen:
            met["finished runs"] += 1
            out, seen = tmp_path / f"out-{met['kills']}", {}
    look(runs.run(out, STEPS, lora=False))
    assert "done" in seen
    print(met)  # shown by pytest -rP


WRITTEN = ("nothing", "tensors.safetensors", "rank-00000.json", "state.json", "digest-00000.json", "manifest.json")
"""Files of a checkpoint in the order of their writing."""


def survive(runs: Runs, folder: Path, kills: int, steps: int, seed: int, inside: int = 0) -> dict[str, int]:
    """Kill -9 `kills` times, and until `inside` of them met a growing checkpoint; resume each time.

    Every second kill comes at any moment, the others at any moment of a save. Every byte must be that of a run nobody touched.
    Returns what was met: how many kills, and what those in a save left of the checkpoint.
    """
    runs.run(folder / "first", 1)  # what torch does only once is done
    began = time.monotonic()
    expected = runs.run(folder / "whole", steps)
    once = time.monotonic() - began
    times = runs.times()
    saving = sorted(end - begin for begin, end in zip(times[::2], times[1::2], strict=True))[steps // 2]
    rng = random.Random(seed)
    met = dict.fromkeys(("kills", "in a growing checkpoint", "finished runs", "steps done again"), 0)
    out, seen = folder / "killed", dict[str, str]()

    def look(lines: list[str]) -> None:
        for line in lines:
            number, _, what = line.partition(" ")
            met["steps done again"] += number in seen
            assert seen.setdefault(number, what) == what, f"step {number} was another one"

    while met["kills"] < kills or met["in a growing checkpoint"] < inside:
        if met["kills"] % 2:
            look(runs.run(out, steps, wait=rng.random() * saving, save=rng.randint(1, 1 + steps // 8)))
        else:
            look(runs.run(out, steps, wait=rng.random() * once / 3))
        met["kills"] += 1
        for grown in (out / "checkpoints").glob(".*-step-*"):
            grows = grown.name.startswith(NEW)
            met["in a growing checkpoint"] += grows
            newest = max((path.name for path in grown.iterdir()), key=WRITTEN.index, default="nothing")
            found = f"{'growing' if grows else 'going'}, with {newest}"
            met[found] = met.get(found, 0) + 1
        place = latest(out, pytest.fail)  # a damaged one would be told
        done = 0 if place is None else int(place.name.removeprefix("step-"))
        last = max((int(n) for n in seen if n != "done"), default=0)
        assert done in (last - 1, last, last + 1)
        if "done" in seen:
            met["finished runs"] += 1
            assert [f"{number} {what}" for number, what in seen.items()] == expected
            out, seen = folder / f"killed {met['finished runs']}".replace(" ", "-"), {}
    look(runs.run(out, steps))
    assert [f"{number} {what}" for number, what in seen.items()] == expected
    return met


def test_killed_and_resumed_runs_have_the_same_bytes(runs: Runs, tmp_path: Path) -> None:
    met = survive(runs.alone(), tmp_path, kills=4, steps=16, seed=0)
    assert met["kills"] == 4


@pytest.mark.slow
def test_two_hundred_kills(runs: Runs, tmp_path: Path) -> None:
    print(survive(runs.alone(), tmp_path, kills=200, steps=60, seed=1, inside=50))  # shown by pytest -rP
