"""Shell completion, as the shells ask for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from herd.cli.main import run
from herd.hub.created import Created, save


def complete(words: str, home: Path) -> list[str]:
    """What bash would offer for the last of `words`."""
    environment = {
        **os.environ,
        "_HERD_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "HERD_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
    }
    code = "import sys; sys.argv = ['herd']; from herd.cli.main import main; main()"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    return [line.partition(",")[2] for line in said.stdout.splitlines() if line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("no bash here")
    assert run(["completion", shell]) == 0
    assert "_HERD_COMPLETE" in capsys.readouterr().out


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "fish" in capsys.readouterr().err


def test_commands_options_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERD_HOME", str(tmp_path))
    save(Created("librarian:latest", "nano"))
    assert complete("herd che", tmp_path) == []
    assert complete("herd cha", tmp_path) == ["chat"]
    assert "--verbose" in complete("herd run --ver", tmp_path)
    assert complete("herd run lib", tmp_path) == ["librarian:latest"]
    assert complete("herd show na", tmp_path) == ["nano"]
