"""docs/training.md as a new user follows it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from herd.cli.train import configured
from herd.train.overrides import leaves

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")
GUIDE = TEXT.split("## From a folder of texts")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)


def commands() -> list[list[str]]:
    """Every `herd train` of the guide."""
    lines = "".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("herd train ")]


def test_every_command_of_the_guide_is_a_configuration() -> None:
    found = [args for args in commands() if args[0] != "runs/base"]
    assert len(found) >= 3
    for args in found:
        configured(args[0], [arg for arg in args[1:] if not arg.startswith("--")])


def test_keys_that_the_page_names_exist() -> None:
    known = {key for key, _, _ in leaves()} | {key.rpartition(".")[0].removesuffix(".0") for key, _, _ in leaves()}
    named = set(re.findall(r"`((?:model|data|method|train|report|parallel)\.[a-z_.0-9]+)", TEXT))
    assert len(named) > 10
    assert sorted(named - known) == []


def test_pages_that_it_links_to_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert sorted(link for link in links if not (PAGE.parent / link).exists()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the guide is for a shell")
def test_the_guide_word_for_word(tmp_path: Path) -> None:
    """Texts in, a served model out: every block of the guide in one shell, in an empty folder."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "herd").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m herd "$@"\n')
    (bin / "herd").chmod(0o755)
    script = "set -e\n" + "\n".join(f"echo '=== block {i}'\n{block}" for i, block in enumerate(BLOCKS))
    environ = os.environ | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "PYTHONPATH": str(PAGE.parents[1]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=work,
        env=environ,
        capture_output=True,
        text=True,
        timeout=1200,
        stdin=subprocess.DEVNULL,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-4000:]
    assert len(re.findall("=== block", done.stdout)) == len(BLOCKS)
    # It learned: the beginning of every text, and to answer with what was asked about.
    assert "there was a" in done.stdout.split("=== block 4")[1].split("=== block 5")[0]
    assert "The cat found a key." in done.stdout
    assert re.search(r'"content":\s*"The fox found a star\."', done.stdout)
