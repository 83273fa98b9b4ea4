"""The README is true: its Python runs as printed, and so do its commands on the embedded model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
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


def test_something_was_found() -> None:
    assert len(COMMANDS) >= 4
