"""`herd doctor`: a page for people, JSON for programs, and an exit status for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.bench import checkup as module
from herd.bench.capacity import Rates
from herd.cli.main import run

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "LISTEN", 0.01)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def test_a_page(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rates", lambda threads: Rates(4.2e10, 2e11, 4e11))
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("Processor", "native kernels", "42.0 GB/s", "400 GOP/s", "llama-3.1-8b"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 140


def test_quick_as_json(capsys: Captured) -> None:
    assert run(["doctor", "--quick", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["limits"] is None
    assert {one["level"] for one in said["findings"]} <= {"good", "note", "slow", "broken"}
    assert said["models"][0]["forms"][0]["name"] == "bf16"


def test_a_broken_finding_is_an_exit_status(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.os, "access", lambda place, mode: False)
    assert run(["doctor", "--quick"]) == 1
    assert "Remedy: set HF_HOME" in capsys.readouterr().out
