"""`herd inspect`: the page, the JSON, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.cli.main import run
from tests.build import build
from tests.checkpoint.folders import write_hf

Captured = pytest.CaptureFixture[str]


def test_the_page_says_what_matters(capsys: Captured) -> None:
    assert run(["inspect", "nano"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "of no released size",
        "4 query heads, 2 key/value heads of 64",
        "chat format  llama3",
        "model.safetensors",
    ):
        assert words in out
    assert "tok_embeddings.weight" not in out


def test_tensors_are_listed_when_asked(capsys: Captured) -> None:
    assert run(["inspect", "nano", "--tensors"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tok_embeddings.weight"))
    assert line.split() == ["tok_embeddings.weight", "4096x256", "F16", "2,097,152", "model.safetensors"]


def test_json_is_one_object(capsys: Captured) -> None:
    assert run(["inspect", "nano", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "herd.inspect/1"
    assert found["config"]["n_layers"] == 6
    assert "tensors" not in found
    assert {
        "path",
        "kind",
        "what",
        "problem",
        "release",
        "parameters",
        "types",
        "files",
        "tokenizer",
        "suspicious",
    } <= found.keys()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_text_is_wrapped_to_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(["inspect", "nano"]) == 0
    facts = capsys.readouterr().out.split("\n\n")[1]
    assert max(map(len, facts.splitlines())) <= max(columns, 40)


def test_names_from_files_cannot_steer_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    write_hf(tmp_path, build("llama-2"))
    (tmp_path / "evil\x1b[2J.py").write_text("")
    assert run(["inspect", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_what_does_not_open_ends_with_one_line_and_status_1(tmp_path: Path, capsys: Captured) -> None:
    write_hf(tmp_path, build("llama-2"))
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"num_hidden_layers": 3}))
    capsys.readouterr()  # what writing the model said
    assert run(["inspect", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "F32" in out
    assert err.count("\n") == 1
    assert "model.layers.2" in err
    (tmp_path / "x.gguf").write_bytes(b"GGUF\0\0")
    assert run(["inspect", str(tmp_path / "x.gguf")]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "x.gguf" in err


def test_unknown_names_and_flags(capsys: Captured) -> None:
    assert run(["inspect", "lama-3.1-8x"]) == 1
    assert "nearest" in capsys.readouterr().err
    assert run(["inspect", "nano", "--tensor"]) == 2
    assert "--tensors" in capsys.readouterr().err
    assert run(["inspect"]) == 2
