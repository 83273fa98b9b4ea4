"""`-tp 2` on the command line: the same answers as of one process, and what does not go with it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from herd.cli.main import run

QUESTION = "Who are you?"
GREEDY = ("--temp", "0", "-n", "8")


def answers(out: Path, *more: str) -> Any:
    source = out.parent / "in.jsonl"
    source.write_text(json.dumps({"prompt": "Once upon a time"}) + "\n")
    assert run(["generate", "nano", "--batch-file", str(source), "--out", str(out), *GREEDY, *more]) == 0
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    assert run(["chat", "nano", *GREEDY, *more]) == 0
    return capsys.readouterr().out


def test_generate_over_two_processes(tmp_path: Path) -> None:
    two = answers(tmp_path / "two.jsonl", "-tp", "2")
    assert two == answers(tmp_path / "one.jsonl")
    assert two[0]


@pytest.mark.slow
def test_chat_over_two_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    two = said(monkeypatch, capsys, "--tensor-parallel-size", "2")
    assert two == said(monkeypatch, capsys)
    assert len(two) > 5


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chat", "nano", "--adapter", "HERE"], "merge a LoRA"),
        (["run", "nano", "Hi", "--adapter", "HERE"], "merge a LoRA"),
        (["generate", "nano", "--batch-file", "HERE/in", "--out", "HERE/out", "--adapter", "HERE"], "merge a LoRA"),
        (["chat", "--url", "http://127.0.0.1:9"], "a model that is opened here"),
        (["chat", "nano"], "tp 3"),
    ],
)
def test_what_does_not_go_with_it(
    args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    many = "3" if words == "tp 3" else "2"
    assert run([*(one.replace("HERE", str(tmp_path)) for one in args), "-tp", many]) in (1, 2)
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
