"""The README is true: its Python runs as printed, and so do its commands on the embedded model."""

from __future__ import annotations

import io
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from herd.cli.main import run

README = Path(__file__).parents[1] / "README.md"
_BEFORE, QUICK, _AFTER = re.split(
    r"^## Three quick starts$(.*?)^(?=## )",
    README.read_text(encoding="utf-8"),
    maxsplit=1,
    flags=re.MULTILINE | re.DOTALL,
)
BLOCKS, STARTS = (
    re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for text in (_BEFORE + _AFTER, QUICK)
)
SERVER = ("127.0.0.1", 8000)
"""Where the quick start's server listens: the README says no port, so it is the usual one."""
START_SECONDS = 120.0
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.startswith(("herd run nano", "herd tokens", "herd models", "herd inspect nano", "herd lint", "herd plan"))
]


PYTHON = [block for language, block in BLOCKS if language == "python"]


@pytest.mark.parametrize(
    ("code", "shown"), list(zip(PYTHON, ("True", "is_greedy=True"), strict=True)), ids=("model", "LLM")
)
def test_python_runs_as_printed(code: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(code, {"__name__": "__main__"})
    assert shown in capsys.readouterr().out  # the loss mask, a score


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_printed(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = shlex.split(command)[1:]
    if arguments[0] == "run":
        arguments += ["--max-tokens", "8"]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run(arguments) == 0
    assert capsys.readouterr().out.strip()


@pytest.fixture
def words(tmp_path: Path) -> dict[str, str]:
    """An environment in which `herd` is this herd, and nothing else is set up."""
    script = tmp_path / "herd"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m herd "$@"\n')
    script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HERD_", "OLLAMA_"))}
    return kept | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def test_there_are_three_quick_starts() -> None:
    assert [language for language, _ in STARTS] == ["sh", "python", "sh", "python"]


def test_the_terminal_word_for_word(words: dict[str, str]) -> None:
    command = ["sh", "-ec", STARTS[0][1]]
    done = subprocess.run(
        command, env=words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10  # a story


def test_python_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    exec(STARTS[1][1], {"__name__": "__main__"})
    assert len(capsys.readouterr().out.split()) > 10


def test_the_api_client_word_for_word(words: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(SERVER) == 0:
            pytest.skip("something else listens where the README's server does")
    _, block = STARTS[2]
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(
            ["sh", "-ec", f"exec {block}"], env=words, stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
        try:
            until = time.monotonic() + START_SECONDS
            while not _healthy():
                said.seek(0)
                assert server.poll() is None, said.read().decode()
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.2)
            exec(STARTS[3][1], namespace := {"__name__": "__main__"})
            namespace["client"].close()
        finally:
            server.terminate()
            server.wait(30)
    assert len(capsys.readouterr().out.split()) > 10


def _healthy() -> bool:
    try:
        return httpx.get("http://{}:{}/health".format(*SERVER), timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_something_was_found() -> None:
    assert len(COMMANDS) >= 4
