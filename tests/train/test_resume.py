"""The same bytes: twice from one seed, and after a stop at any step; and refusals where they could not be the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.adapters.apply import LoraConfig, apply_lora
from herd.errors import CheckpointError, ConfigError
from herd.quant.apply import quantize
from herd.train.config import AveragePart, OptimConfig, SavePart
from herd.train.identity import differences
from herd.train.objective import NextToken
from herd.train.state import latest
from herd.train.stop import Stopped
from herd.train.trainer import Trainer, load_weights
from herd.train.watch import Recorder, Silent
from tests.build import build
from tests.train.loop import Loader, config, fingerprint, model, rows, trainer, weights

KINDS: dict[str, Any] = {
    "muon": {},
    "adamw": {"optim": OptimConfig(kind="adamw", lr=3e-3)},
    "lora with dropout": {"lora": True},
}


def run_of(kind: str, steps: int, out: Path | None = None, **options: Any) -> tuple[Trainer, Recorder]:
    lora, changes = KINDS[kind].get("lora", False), {k: v for k, v in KINDS[kind].items() if k != "lora"}
    save = SavePart(every_steps=1, every_minutes=None, keep=99)
    return trainer(steps, out, lora=lora, changes={"save": save} | changes, **options)


def told(seen: Recorder) -> list[Any]:
    return [(r.step, r.loss, r.norm, r.rate, r.supervised, r.all_tokens) for r in seen.steps]


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_of_one_seed_have_the_same_bytes_and_another_seed_has_others(kind: str) -> None:
    found = []
    for changes in ({}, {}, {"seed": 1}):
        lora = KINDS[kind].get("lora", False)
        given = {k: v for k, v in KINDS[kind].items() if k != "lora"} | changes
        run, seen = trainer(6, lora=lora, changes=given)
        run.fit()
        found.append((fingerprint(run), told(seen)))
    assert found[0] == found[1]
    assert (found[0] != found[2]) == (kind == "lora with dropout"), "the seed of the loop is that of dropout"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_from_any_step_has_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """Steps 5 to 10 are the decay."""
    whole, expected = run_of(kind, 10, tmp_path / "whole")
    assert len(rows()) < 10 * 8, "an epoch ends within the run"
    whole.fit()
    for step in (1, 4, 9):
        place = tmp_path / f"whole/checkpoints/step-{step:08d}"
        resumed, seen = run_of(kind, 10, tmp_path / f"from {step}", resume=place)
        torch.rand(17)  # whatever happened before in the process
        resumed.fit()
        assert told(seen) == told(expected)[step:]
        assert fingerprint(resumed) == fingerprint(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_made_ahead_are_not_lost(workers: int, tmp_path: Path) -> None:
    whole, expected = run_of("lora with dropout", 6)
    whole.fit()
    for until in (2, 5, 6):
        run, seen = run_of("lora with dropout", 6, tmp_path, loader=Loader(rows(), 4, seed=1, workers=workers))
        run.fit(until=until)
        assert told(seen) == told(expected)[seen.steps[0].step - 1 : until]
    assert fingerprint(run) == fingerprint(whole)


def test_evaluations_do_not_show_in_the_bytes(tmp_path: Path) -> None:
    quiet, _ = trainer(4, lora=True)
    quiet.fit()
    watched, _ = trainer(4, tmp_path, lora=True, evaluate=lambda m: {"x": float(torch.rand(()))})
    watched.fit()
    assert fingerprint(watched) == fingerprint(quiet)


def test_an_adapter_over_a_quantized_base_saves_only_itself(tmp_path: Path) -> None:
    def make(out: Path | None, base: int = 0) -> tuple[Trainer, Recorder]:
        torch.manual_seed(base)
        whole = build("llama-3")
        if base:
            torch.nn.init.normal_(whole.layers[0].attention.wq.weight)
        quantize(whole, "nf4")
        torch.manual_seed(1)
        apply_lora(whole, LoraConfig(4, 8.0, dropout=0.1))
        seen = Recorder()
        return Trainer(whole, NextToken(), Loader(rows(), 4, 1), config(6), out=out, watchers=[seen]), seen

    straight, expected = make(None)
    straight.fit()
    first, _ = make(tmp_path)
    first.fit(until=3)
    place = latest(tmp_path)
    assert place is not None
    size = (place / "tensors.safetensors").stat().st_size
    factors = sum(weight.numel() for weight in weights(first).values())
    assert size < 3.5 * 4 * factors + 40_000
    second, seen = make(tmp_path)
    second.fit()
    assert told(seen) == told(expected)[3:]
    assert fingerprint(second) == fingerprint(straight)
    other, _ = make(tmp_path, base=1)
    with pytest.raises(ConfigError, match="frozen: "):
        other.fit()


@pytest.mark.parametrize(("kind", "start"), [("ema", 0.0), ("tail", 0.5)])
def test_averages_go_on_too(kind: str, start: float, tmp_path: Path) -> None:
    average = AveragePart(kind=kind, start=start, decay=0.9)  # type: ignore[arg-type]

    def make(out: Path | None) -> Trainer:
        return trainer(
            6, out, changes={"average": average}, evaluate=lambda m: {"first": float(m.norm.weight.detach()[0])}
        )[0]

    whole = make(None)
    figures = whole.fit()
    make(tmp_path).fit(until=4)
    resumed = make(tmp_path)
    assert resumed.fit() == figures
    assert whole.average is not None
    assert resumed.average is not None
    kept = resumed.average.tensors()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in whole.average.tensors().items())
    assert figures["first"] == pytest.approx(float(kept["average.norm.weight"][0]))
    assert figures["first"] != float(whole.model.norm.weight.detach()[0])


def test_other_data_are_told_in_few_letters_beside_whatever_else_differs() -> None:
    def facts(rows: int, letter: str) -> dict[str, object]:
        return {"facts": {"data": {"rows": rows}, "digest": letter * 64}}

    told = "rows of the data and their order: aaaaaaaaaaaa... in the checkpoint, bbbbbbbbbbbb... now"
    assert differences(facts(4, "a"), facts(2, "b")) == (["data.rows: 4 in the checkpoint, 2 now", told], True)
    assert differences(facts(4, "a"), facts(4, "b")) == ([told], True)
    assert differences(facts(4, "a"), facts(4, "a")) == ([], True)


def test_another_configuration_is_refused_with_the_differences(tmp_path: Path) -> None:
    first, _ = trainer(6, tmp_path, facts={"vocabulary": "abc"})
    first.fit(until=2)
    changes = {"optim": OptimConfig(kind="muon", lr=1e-3), "accumulate": 3}
    other, seen = trainer(6, tmp_path, changes=changes, facts={"vocabulary": "abd"})
    with pytest.raises(ConfigError) as caught:
        other.fit()
    text = str(caught.value)
    assert "train.optim.lr: 0.003 in the checkpoint, 0.001 now" in text
    assert "train.accumulate: 2 in the checkpoint, 3 now" in text
    assert "vocabulary: abc in the checkpoint, abd now" in text
    assert "facts" not in text
    assert "--inexact" in text
    assert "exact=" not in text
    assert "muon_lr" not in text
    loud, seen = trainer(6, tmp_path, changes=changes, facts={"vocabulary": "abd"}, exact=False)
    loud.fit(until=3)
    assert len([note for note in seen.notes if note.startswith("not exact: ")]) == 3
    assert seen.steps[0].step == 3


def test_another_number_of_threads_is_refused(tmp_path: Path) -> None:
    first, _ = trainer(4, tmp_path)
    first.fit(until=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        other, _ = trainer(4, tmp_path)
        with pytest.raises(ConfigError, match=f"threads: {threads} in the checkpoint, {threads + 1} now"):
            other.fit()
    finally:
        torch.set_num_threads(threads)


def test_settings_that_change_no_weight_may_change(tmp_path: Path) -> None:
    first, _ = trainer(6, tmp_path)
    first.fit(until=2)
    other, seen = trainer(6, tmp_path, changes={"log_every": 1, "save": SavePart(every_steps=3, every_minutes=None)})
    other.fit()
    assert seen.notes == []
    whole, _ = trainer(6)
    whole.fit()
    assert fingerprint(other) == fingerprint(whole)


def test_another_model_is_refused_whatever_was_asked(tmp_path: Path) -> None:
    first, _ = trainer(4, tmp_path)
    first.fit(until=2)
    other, _ = trainer(4, tmp_path, lora=True, exact=False)
    with pytest.raises(CheckpointError, match="another model") as caught:
        other.fit()
    assert "trained.layers.0.attention.wq.a: nothing in the checkpoint, float32 [4, 16] now" in str(caught.value)
    assert load_weights(tmp_path, model(seed=5)) == tmp_path / "checkpoints/step-00000002"


def test_never_refuses_a_folder_with_checkpoints_and_a_path_must_be_the_newest(tmp_path: Path) -> None:
    first, _ = run_of("adamw", 4, tmp_path / "a")
    first.fit()
    elsewhere, _ = run_of("adamw", 4, tmp_path / "elsewhere")
    elsewhere.fit()
    for resume, told_ in (
        ("never", "holds checkpoints"),
        (tmp_path / "a/checkpoints/step-00000002", "is not the newest"),
        (tmp_path / "elsewhere/checkpoints/step-00000004", "is not the newest"),
    ):
        other, _ = run_of("adamw", 4, tmp_path / "a", resume=resume)
        with pytest.raises(ConfigError, match=told_):
            other.fit()
    fresh, _ = run_of("adamw", 4, tmp_path / "b", resume="never")
    fresh.fit()
    assert fingerprint(fresh) == fingerprint(first)
    for wrong in (tmp_path / "nowhere", tmp_path):
        other, _ = run_of("adamw", 4, tmp_path / "c", resume=wrong)
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            other.fit()


def test_going_on_in_another_way_leaves_nothing_of_the_first_way(tmp_path: Path) -> None:
    """The checkpoint of step 4 is damaged, and the run goes on from 2 with another rate: 4 has to be the new one."""
    first, _ = trainer(6, tmp_path)
    first.fit(until=4)
    (tmp_path / "checkpoints/step-00000004/state.json").write_text("{}")
    other, seen = trainer(6, tmp_path, changes={"optim": OptimConfig(kind="muon", lr=1e-3)}, exact=False)
    other.fit(until=4)
    assert seen.steps[0].step == 3
    assert any("step-00000004 is not whole" in note for note in seen.notes)
    again, seen = trainer(6, tmp_path, changes={"optim": OptimConfig(kind="muon", lr=1e-3)})
    again.fit(until=4)
    assert seen.notes == []
    assert fingerprint(again) == fingerprint(other)


def test_the_next_phase_starts_counting_anew(tmp_path: Path) -> None:
    first, _ = trainer(3, tmp_path / "first")
    first.fit()
    place = latest(tmp_path / "first")
    assert place is not None
    second, seen = trainer(5, tmp_path / "second", changes={"accumulate": 1})
    second.adopt(place)
    assert (second.step, second.progress) == (0, 0)
    assert all(torch.equal(now, weights(first)[name]) for name, now in weights(second).items())
    assert len(second.optimisers[0].state) == len(first.optimisers[0].state)
    second.fit()
    assert [report.step for report in seen.steps] == [1, 2, 3, 4, 5]
    assert seen.steps[0].rate == pytest.approx(1.5e-3)
    other, _ = trainer(5, lora=True)
    with pytest.raises(CheckpointError, match="another model"):
        other.adopt(place)


class Kick(Silent):
    """Sends a signal to this process during a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step(self, report: Any) -> None:
        if report.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_saves_and_the_resumed_run_has_the_same_bytes(name: str, code: int, tmp_path: Path) -> None:
    before = signal.getsignal(getattr(signal, name))
    whole, expected = trainer(6, lora=True)
    whole.fit()
    slow = SavePart(every_minutes=None)
    run, _ = trainer(6, tmp_path, lora=True, changes={"save": slow}, watchers=[Kick(3, getattr(signal, name))])
    with pytest.raises(Stopped, match=f"stopped by {name} after step 3; saved at .*step-00000003") as caught:
        run.fit()
    assert caught.value.exit_code == code
    assert signal.getsignal(getattr(signal, name)) is before
    resumed, seen = trainer(6, tmp_path, lora=True, changes={"save": slow})
    resumed.fit()
    assert told(seen) == told(expected)[3:]
    assert fingerprint(resumed) == fingerprint(whole)


def test_a_signal_between_micro_batches_gives_the_step_back(tmp_path: Path) -> None:
    """Steps can take minutes; nobody waits that long for a process to go."""

    class Kicked(NextToken):
        calls = 0

        def __call__(self, model: Any, batch: Any) -> Any:
            Kicked.calls += 1
            if Kicked.calls == 3 * 2 + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(model, batch)

    whole, _ = trainer(6, lora=True)
    whole.fit()
    run, seen = trainer(6, tmp_path, lora=True, objective=Kicked())
    with pytest.raises(Stopped, match="after step 3"):
        run.fit()
    assert Kicked.calls == 7
    assert len(seen.steps) == 3
    resumed, _ = trainer(6, tmp_path, lora=True)
    resumed.fit()
    assert fingerprint(resumed) == fingerprint(whole)


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    class Stubborn(NextToken):
        def __call__(self, model: Any, batch: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(model, batch)

    run, _ = trainer(6, tmp_path, objective=Stubborn())
    with pytest.raises(KeyboardInterrupt):
        run.fit()
