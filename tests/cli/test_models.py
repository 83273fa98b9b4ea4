"""`herd models`: the catalog as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.checkpoint.resolve import resolve
from herd.cli.main import run
from herd.cli.models import rows
from herd.model.presets import RELEASES

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine where nothing was downloaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LLAMA_MODELS_CONFIG_DIR", str(tmp_path / "llama"))
    return tmp_path


def test_the_table_has_what_can_be_run(capsys: Captured) -> None:
    assert run(["models"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["NAME", "PARAMETERS", "CONTEXT", "FORMAT", "TAG", "HERE"]
    line = next(line for line in lines if line.startswith("llama-3.2-1b "))
    assert line.split() == ["llama-3.2-1b", "1.24B", "128K", "llama3.2", "llama3.2:1b", "-"]
    assert "vision" not in out
    assert f"{sum(not release.runnable for release in RELEASES)} more cannot be run yet" in err


def test_all_says_why_a_model_cannot_be_run(capsys: Captured) -> None:
    assert run(["models", "--all"]) == 0
    out, err = capsys.readouterr()
    for release in RELEASES:
        assert f"{release.id} " in out
        if release.why_not is not None:
            assert f"{release.id}: {release.why_not}." in err


def test_json_has_everything(capsys: Captured) -> None:
    assert run(["models", "--json"]) == 0
    listed = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert {release.id for release in RELEASES} <= listed.keys()
    one = listed["llama-3.2-1b"]
    assert one["parameters"] == 1_235_814_400
    assert one["context"] == 131_072
    assert one["runnable"]
    assert one["path"] is None
    assert "meta-llama/Llama-3.2-1B-Instruct" in one["names"]
    assert not listed["llama-3.2-11b-vision"]["runnable"]


def test_what_is_on_this_machine_is_shown_where_it_is(cache: Path, capsys: Captured) -> None:
    folder = cache / "llama" / "checkpoints" / "Llama3.2-1B-Instruct"
    folder.mkdir(parents=True)
    (folder / "params.json").write_text("{}")
    assert run(["models"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("llama-3.2-1b "))
    assert line.split()[-1] == str(folder)


def test_the_embedded_model_comes_first() -> None:
    first = rows()[0]
    assert first.name == "nano"
    assert first.path == str(resolve("nano"))
    assert first.parameters is not None
    assert 1_000_000 < first.parameters < 100_000_000
