"""The README is true: its Python runs as printed, and so do its commands on the embedded model."""

from __future__ import annotations

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
def test_python_runs_as_printed(code: str, shown: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout  # the loss mask, a score


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_printed(command: str) -> None:
    arguments = shlex.split(command)[1:]
    if arguments[0] == "run":
        arguments += ["--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "herd", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture
def words(tmp_path: Path) -> dict[str, str]:
    """An environment in which `herd` is this herd, and nothing else is set up."""
    script = tmp_path / "herd"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m herd "$@"\n')
    script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HERD_", "OLLAMA_"))}
    return kept | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def start(number: int, words: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A quick start, word for word."""
    language, block = STARTS[number]
    command = ["sh", "-ec", block] if language == "sh" else [sys.executable, "-W", "error", "-c", block]
    return subprocess.run(
        command, env=words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS
    )


def test_there_are_three_quick_starts() -> None:
    assert [language for language, _ in STARTS] == ["sh", "python", "sh", "python"]


@pytest.mark.parametrize("number", [0, 1], ids=["terminal", "Python"])
def test_quick_starts_word_for_word(number: int, words: dict[str, str]) -> None:
    done = start(number, words)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10  # a story


def test_the_api_client_word_for_word(words: dict[str, str]) -> None:
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
            done = start(3, words)
        finally:
            server.terminate()
            server.wait(30)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10


def _healthy() -> bool:
    try:
        return httpx.get("http://{}:{}/health".format(*SERVER), timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_something_was_found() -> None:
    assert len(COMMANDS) >= 4
