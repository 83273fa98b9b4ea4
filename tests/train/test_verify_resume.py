"""The proof that users run: it finds nothing where all is well, and what is wrong where it is not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.errors import ConfigError
from herd.train.objective import NextToken
from herd.train.verify_resume import verify_resume
from tests.train.loop import trainer


def test_a_run_that_resumes_exactly_is_proved_exact(tmp_path: Path) -> None:
    told: list[str] = []
    proof = verify_resume(
        lambda out, until: trainer(9, out, lora=True)[0].fit(until=until), tmp_path, steps=5, tell=told.append
    )
    assert proof.exact
    assert "5 steps straight, and 2 + 3" in str(proof)
    assert (proof.files, len(proof.digest)) == (3, 64)
    assert len(told) == 3
    with pytest.raises(ConfigError, match="exists already"):
        verify_resume(lambda out, until: None, tmp_path, steps=5)


class Forgetful(NextToken):
    """Noise from a generator that no checkpoint knows."""

    generator = torch.Generator().manual_seed(0)

    def __call__(self, model: Any, batch: Any) -> Any:
        loss = super().__call__(model, batch)
        noise = 1 + 0.01 * torch.rand((), generator=self.generator)
        return type(loss)(loss.total * noise, loss.supervised)


def test_what_a_checkpoint_does_not_hold_is_found(tmp_path: Path) -> None:
    def run(out: Path, until: int) -> None:
        Forgetful.generator.manual_seed(0)
        trainer(6, out, objective=Forgetful())[0].fit(until=until)

    proof = verify_resume(run, tmp_path, steps=4)
    assert not proof.exact
    assert "tensors.safetensors is another file after the resume" in str(proof)


def test_tables_of_contents_are_told_apart_by_their_place_alone(tmp_path):
    """What several ranks write: the table holds a random id of each save. Without one, or with other tensors, it is no proof."""

    def run(spoil):
        def make(out, until):
            place = out / "checkpoints" / f"step-{until:08d}"
            place.mkdir(parents=True)
            files = {
                "__0_0.distcp": b"values",
                ".metadata": os.urandom(8),
                "state.json": b'{"counters": {"seconds": 1}}',
            }
            if out.name == "resumed":
                spoil(files)
            for name, content in files.items():
                (place / name).write_bytes(content)
            facts = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
            (place / "manifest.json").write_text(json.dumps({"version": 1, "step": until, "world": 2, "files": facts}))

        return make

    proof = verify_resume(run(lambda files: None), tmp_path / "a", steps=2)
    assert proof.exact
    assert (proof.files, proof.digest) == (2, hashlib.sha256(b"values").hexdigest())
    for name, spoil in (
        (".metadata", lambda files: files.pop(".metadata")),
        ("__0_0.distcp", lambda files: files.update({"__0_0.distcp": b"valuEs"})),
    ):
        proof = verify_resume(run(spoil), tmp_path / name, steps=2)
        assert proof.differences == (f"{name} is another file after the resume",)


def test_a_loader_that_loses_its_place_is_found(tmp_path: Path) -> None:
    def run(out: Path, until: int) -> None:
        made, _ = trainer(6, out)
        draw, restore = made.loader.draw, made.loader.restore
        made.loader.restore = lambda state, **more: (restore(state, **more), draw())[0]  # type: ignore[method-assign]
        made.fit(until=until)

    proof = verify_resume(run, tmp_path, steps=4)
    assert any(line.startswith("loader.position: ") for line in proof.differences)


@pytest.mark.parametrize(("steps", "at"), [(1, None), (4, 4), (4, 0)])
def test_steps_that_prove_nothing_are_refused(steps: int, at: int | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="verify-resume"):
        verify_resume(lambda out, until: None, tmp_path, steps=steps, at=at)


def test_a_budget_that_is_too_short_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the budget shorter than 8 steps"):
        verify_resume(lambda out, until: trainer(6, out)[0].fit(until=until), tmp_path, steps=8)
