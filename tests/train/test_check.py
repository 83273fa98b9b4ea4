"""What is found before anything is loaded: the same words as the run's, some minutes earlier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.cli.main import run

CHAT = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]}


@pytest.fixture
def dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """herd train RECIPE --dry-run over rows of `kind`; (status, what was told)."""

    def told(recipe: str, *more: str, row: object = CHAT) -> tuple[int, str]:
        path = tmp_path / "rows.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * 3)
        out = tmp_path / "out"
        status = run(["train", recipe, "model.source=nano", f"data.sources={path}", f"out={out}", *more, "--dry-run"])
        assert not out.exists()
        return status, capsys.readouterr().err

    return told


def test_a_dry_run_reads_the_first_rows_of_the_data(dry):
    status, told = dry("lora")
    assert status == 0
    assert "rows.jsonl: 1 file, messages" in told
    assert "this machine" not in told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["data.sources=nowhere.jsonl"], "nowhere.jsonl: no such data file"),
        (["data.held_out=nowhere.jsonl"], "nowhere.jsonl: no such data file"),
        (["method.targets=[q_proj]"], "method.targets: no matrix is called 'q_proj': herd calls it wq"),
        (["method.targets=[layers.0.attention.wx]"], "'layers.0.attention.wx': choose some of wq, wk"),
        (["method.kind=full", "method.qat=q4_9"], "method.qat: 'q4_9' is not one of q4_0"),
    ],
    ids=["sources", "held-out", "peft", "name", "qat"],
)
def test_a_dry_run_refuses_what_the_run_would(dry, more, said):
    status, told = dry("lora", *more)
    assert (status, said in told) == (1, True), told


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference rows: no recipe of herd trains on them yet"),
        ({"prompt": "a"}, "prompt rows: no recipe of herd trains on them yet"),
        (CHAT | {"label": True}, "unpaired preferences"),
        ({"a": 1}, "the fields 'a' are of no kind"),
    ],
    ids=["preference", "prompt", "label", "unknown"],
)
def test_rows_that_nothing_trains_on(dry, row, said):
    status, told = dry("lora", row=row)
    assert (status, said in told) == (1, True), told


@pytest.mark.parametrize("name", ["experts", "experts.w13", "layers.0.attention.wq", "tok_embeddings", "w1"])
def test_names_of_matrices_that_there_are_pass(dry, name):
    assert dry("lora", f"method.targets=[{name}]")[0] == 0


def test_what_this_machine_cannot_do_is_told_and_planned_all_the_same(dry):
    status, told = dry("lora", "train.precision=float8", "device=cpu", "parallel.tp=2")
    assert status == 0
    assert "not on this machine: train.precision=float8: cpu cannot" in told
    assert "not on this machine: the config asks for 2 processes" in told
