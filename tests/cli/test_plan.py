"""`herd plan`: tables, JSON, proposed command lines that work, and refusals in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from herd.cli.main import run

Captured = pytest.CaptureFixture[str]


def test_common_devices_are_compared(capsys: Captured) -> None:
    assert run(["plan", "llama-3.1-8b"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("8.03B parameters", "keys and values", "128 KiB per token", "4 query heads share", "Assumptions"):
        assert words in out
    row = next(line for line in out.splitlines() if line.startswith("h100"))
    assert row.split()[2] == "yes"


def test_the_proposed_command_lines_fit(capsys: Captured) -> None:
    line = [
        "plan",
        "llama-3.1-70b",
        "--device",
        "rtx4090",
        "--context",
        "32768",
        "--batch",
        "2",
        "--price-per-hour",
        "0.5",
    ]
    assert run(line) == 0
    out = capsys.readouterr().out
    proposed = [text.rsplit(None, 1)[0] for text in out.splitlines() if text.startswith("herd plan")]
    assert proposed
    for text in proposed:
        assert run([*shlex.split(text)[1:], "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["fits"], text
        assert found["context"] == 32_768


def test_json_has_every_key(capsys: Captured) -> None:
    assert run(["plan", "llama-4-behemoth", "--device", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "herd.plan/1"
    assert found["kv_bytes"] is None
    assert [one["name"] for one in found["devices"]] == ["h200"]


@pytest.mark.parametrize("columns", [50, 80, 160])
def test_notes_are_wrapped_to_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(["plan", "nano", "--device", "h100"]) == 0
    notes = capsys.readouterr().out.split("Assumptions\n")[1]
    assert max(map(len, notes.splitlines())) <= columns


def test_mistakes_are_one_line(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\xff\xff")
    for args, words, status in (
        (["lama-3.1-8b"], "nearest are", 1),
        (["llama-3.1-8b", "--device", "h300"], "no device is called 'h300'", 1),
        (["llama-3.1-8b", "--weights", "int3"], "choose f32", 1),
        (["llama-3.1-8b", "--batch", "0"], "--batch", 2),
        (["llama-3.1-8b", "--prise-per-hour", "2"], "--price-per-hour", 2),
        ([], "MODEL", 2),
        ([str(tmp_path / "x.gguf")], "x.gguf", 1),
        ([str(tmp_path / "none")], "no such file", 1),
    ):
        assert run(["plan", *args]) == status, args
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), args
        assert words in err, args
