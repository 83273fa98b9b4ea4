"""The stages of herd-nano: each in a folder of its own, each from the weights of the one before, none done twice."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from herd.data.encode import encode_text
from herd.data.pack import Rows, pack_stream
from herd.model.llama import Llama
from herd.train.state import latest, read_state

nano = pytest.importorskip("herd.train.recipes.nano")


def rows() -> Rows:
    return pack_stream([encode_text([3 + (i * d) % 500 for i in range(20)], bos=1, eos=2) for d in range(1, 12)], 16)


def stage(name: str, decay: float) -> object:
    return nano.Stage(name, 0.5, rows, 4, 1, 2, decay, 0.02, 3e-3)


def test_stages_follow_each_other_and_are_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(out=tmp_path, minutes=0.01, eager=True)
    asked = []

    def evaluate(model: Llama) -> dict[str, float]:
        asked.append(model.training)
        return {"bits_per_byte": 2.0}

    torch.manual_seed(0)
    model = nano.run_stages(args, [stage("stable", 0.0), stage("anneal", 1.0)], evaluate)
    places = [latest(tmp_path / name) for name in ("stable", "anneal")]
    done = [read_state(place)["counters"] for place in places if place is not None]
    assert [counters["step"] >= 1 and counters["seconds"] >= 0.3 for counters in done] == [True, True]
    assert asked == [False, False]
    assert "bits_per_byte 2.0000" in capsys.readouterr().out
    kept = Llama(nano.CONFIG)
    nano.load_weights(tmp_path / "anneal", kept)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), kept.parameters(), strict=True))
    again = nano.run_stages(args, [stage("stable", 0.0), stage("anneal", 1.0)], evaluate)
    assert [latest(tmp_path / name) for name in ("stable", "anneal")] == places
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), kept.parameters(), strict=True))
