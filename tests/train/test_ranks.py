"""Two ranks (FSDP2 over gloo): the losses of one, the same bytes after kill -9, and nobody left waiting."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from herd.errors import ConfigError
from herd.parallel.checkpoint import Sharded
from herd.train.state import latest
from herd.train.trainer import load_weights
from tests.train.loop import model, trainer
from tests.train.runs import Runs

LOSSES = 1e-5
"""Of losses of about 4 nats over 8 steps: ranks add in another order."""
STEPS = 8


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
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3, msg=name)  # 8 steps of sign-like updates of 3e-3
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
    expected, seen, out, kills = whole[0], dict[str, str](), tmp_path / "out-0", 0
    while kills < 30:
        to = [[0], [1], [0, 1]][kills % 3]
        wait = 0.3 * ((kills * 7) % 11) / 11
        for line in runs.run(out, STEPS, wait=wait, to=to, lora=False, statuses={0, 1, 3, signal.SIGKILL}):
            number, _, what = line.partition(" ")
            assert seen.setdefault(number, what) == what
        kills += 1
        if "done" in seen:
            assert [f"{number} {what}" for number, what in seen.items()] == expected
            out, seen = tmp_path / f"out-{kills}", {}
