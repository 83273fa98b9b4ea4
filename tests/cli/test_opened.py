"""What a model that is opened for the terminal brings along: defaults, number types, its prompt format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.cli.main import run
from herd.engine.local import generate
from tests.build import build
from tests.cli.tiny import tiny_config, tokenizer, write_folder

Piped = Callable[[str | bytes], None]
Captured = pytest.CaptureFixture[str]
GREEDY = ("--temp", "0", "-n", "12")
pytestmark = pytest.mark.usefixtures("no_input_on_a_cpu")


def test_a_store_is_opened_once(chat_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from herd.checkpoint import hf

    opened = []
    real = hf.HFStore.__init__
    monkeypatch.setattr(
        hf.HFStore, "__init__", lambda self, *args, **how: (opened.append(args), real(self, *args, **how))[1]
    )
    assert run(["run", chat_model, "Hello", *GREEDY]) == 0
    assert len(opened) == 1


def test_every_default_of_the_checkpoint_counts(tmp_path: Path, capsys: Captured) -> None:
    folder = write_folder(tmp_path / "own")
    own = {"do_sample": True, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3, "max_new_tokens": 4}
    (folder / "generation_config.json").write_text(json.dumps(own))
    assert run(["run", str(folder), "Hello", "--seed", "3"]) == 0
    params = SamplingParams(top_k=40, min_p=0.01, repetition_penalty=1.3, max_tokens=4, seed=3)
    out, err = capsys.readouterr()
    assert out == generate(build(tiny_config()), tokenizer(), [Message("user", "Hello")], params).text + "\n"
    assert err == "[cut at 4 tokens: --max-tokens allows more]\n"


def test_a_format_that_is_known_by_the_name_of_the_folder_is_shown_so(
    tmp_path: Path, piped: Piped, capsys: Captured
) -> None:
    folder = write_folder(tmp_path / "Llama-3.2-1B-Instruct", chat=False)
    for flags, shown in (
        ([], "llama3.2 (by the name of its folder: its files do not say)"),
        (["--format", "llama3"], "llama3"),
    ):
        piped("/show\n")
        assert run(["chat", str(folder), *flags]) == 0
        lines = [line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines()]
        assert ["format", shown] in lines


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(chat_model: str, dtype: str, capsys: Captured) -> None:
    assert run(["run", chat_model, "Hello", "--dtype", dtype, *GREEDY]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "used"), [("auto", "float32"), ("float16", "float16")])
def test_a_small_model_runs_in_float32_unless_told_otherwise(
    dtype: str, used: str, piped: Piped, capsys: Captured
) -> None:
    piped("/show\n")
    assert run(["chat", "nano", "--dtype", dtype]) == 0  # stored as float16
    assert f"{used} on cpu" in capsys.readouterr().err
