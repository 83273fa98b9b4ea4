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
    status, told = dry("lora", "train.budget.steps=1")
    assert status == 0
    assert "\n1 step (" in told
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
        (
            ["data.chat_format=llama9"],
            "data.chat_format: there is no prompt format 'llama9'; choose one of base, llama2",
        ),
        (["data.chat_format=llama4"], "data.chat_format: "),
        (["data.chat_format=base"], "do not say how it chats: name the prompt format"),
        (
            ["model.source=", "model.shape={dim: 64, n_layers: 2}", "model.tokenizer=nano"],
            "do not say how it chats: name the prompt format",
        ),
        (["recipe=pretrain"], "rows.jsonl:1: a conversation needs a prompt format: name one with data.chat_format"),
        (["data.length=8"], "tokens are longer than a row of 8, as are 3 of the first 3 of this file"),
    ],
    ids=["sources", "held-out", "peft", "name", "qat", "format", "vocabulary", "base", "new", "texts", "long"],
)
def test_a_dry_run_refuses_what_the_run_would(dry, more, said):
    status, told = dry("sft" if any(word.startswith("model.") for word in more) else "lora", *more)
    assert (status, said in told) == (1, True), told


@pytest.mark.parametrize(
    "more",
    [["data.length=8", "data.long_rows=skip"], ["recipe=pretrain", "data.chat_format=llama3"]],
    ids=["long", "conversations among texts"],
)
def test_a_dry_run_passes_what_the_run_would(dry, more):
    assert dry("lora", *more)[0] == 0


def test_bad_rows_are_refused_or_left_out_as_in_the_run(dry):
    row = {"messages": [{"role": "user", "content": "Who?"}]}  # nobody answers: nothing is learned
    status, told = dry("lora", row=row)
    assert (status, "rows.jsonl:1: " in told) == (1, True), told
    assert dry("lora", "data.bad_rows=skip", row=row)[0] == 0


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
