"""The command line as a whole: fast help, exit statuses, one line per error, and nothing heavy imported for it."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from herd.cli import main
from herd.cli.main import COMMANDS, run
from herd.errors import HerdError

HEAVY = ("torch", "rich", "prompt_toolkit", "numpy", "jinja2", "tiktoken", "sentencepiece")
INSTALLED = [name for name, entry in COMMANDS.items() if (Path(main.__file__).parent / f"{name}.py").exists()]


def herd(*args: str, env: dict[str, str] | None = None, **how: object) -> subprocess.CompletedProcess[str]:
    """A real process; standard input is empty unless given."""
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60} | how
    if "input" in how:
        del how["stdin"]
    return subprocess.run([sys.executable, "-m", "herd", *args], env=os.environ | (env or {}), **how)  # type: ignore[call-overload]


QUICK, TRIES = 0.3, 3
"""Processor seconds of a page of help, and how often it may be asked for: the first time nothing may be in the disk's cache."""


def processor_seconds() -> float:
    """Time that finished child processes have spent on a processor."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in INSTALLED)], ids=" ".join)
def test_help_is_fast_and_imports_nothing_heavy(args: list[str], measured: Callable[[str, str, float], None]) -> None:
    times = []
    code = (
        f"import sys; from herd.cli.main import run\n"
        f"sys.exit(run({args!r}) or [m for m in {HEAVY!r} if m in sys.modules] or 0)"
    )
    while not times or (times[-1][0] >= QUICK and len(times) < TRIES):
        before, began = processor_seconds(), time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        times.append((processor_seconds() - before, time.perf_counter() - began))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Usage: herd")
    measured("help, seconds", f"herd {' '.join(args)}", min(seconds for _, seconds in times))
    # Processor time: what the clock says depends on who else uses the machine.
    assert times[-1][0] < QUICK


def test_help_without_a_command_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    out = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert f"  {name}" in out
        assert entry.summary in out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("herd 0.")


@pytest.mark.parametrize("name", INSTALLED)
def test_every_command_says_what_it_does_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "-h"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert f"herd {name}" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chatt"], "no such command 'chatt': did you mean chat? (see: herd --help)"),
        (["xyzzy"], "no such command 'xyzzy': the commands are chat, run"),
        (["run", "m", "p", "--tempp", "1"], "'--tempp'"),
        (["run", "m", "p", "--tempp", "1"], "--temp"),
        (["run", "m", "p", "--tempp", "1"], "(see: herd run --help)"),
        (["run"], "Missing argument 'MODEL'"),
        (["run", "m", "p", "--temp", "-1"], "temperature is -1.0: expected a number at least 0"),
        (["run", "m", "p", "--temp", "hot"], "'hot' is not a valid float"),
        (["run", "m", "p", "--temp", "nan"], "temperature is nan"),
        (["run", "m", "p", "--top-p", "2"], "top_p is 2.0: expected a number above 0 and at most 1"),
        (["run", "m", "p", "--top-k", "-3"], "top_k is -3"),
        (["run", "m", "p", "--min-p", "1.5"], "min_p is 1.5"),
        (["run", "m", "p", "--repeat-penalty", "0"], "repetition_penalty is 0"),
        (["run", "m", "p", "-n", "0"], "max_tokens is 0"),
        (["run", "m", "p", "--seed", "-1"], "seed is -1"),
        (["run", "m", "p", "--stop", ""], "stop strings must be non-empty"),
        (["run", "m", "p", "-c", "0"], "'--ctx-size'"),
        (["run", "m", "p", "--dtype", "nonsense"], "'nonsense' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["run", "m", "p", "--raw", "--system", "x"], "--raw uses no prompt format"),
        (["run", "m", "p", "extra"], "unexpected extra argument"),
        (["run", "m", ""], "the prompt is empty"),
        (["chat", "m", "--top-p", "0"], "top_p is 0.0"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line_and_status_2(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("herd: ")
    assert err.count("\n") == 1
    assert words in err
    assert "torch" not in err


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Runs `herd models` with a command that raises."""

    def with_error(error: BaseException) -> int:
        @click.command()
        def command() -> None:
            raise error

        monkeypatch.setattr("herd.cli.models.command", command)
        return run(["models"])

    return with_error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (HerdError("the file\n is bad"), 1, "herd: the file is bad\n"),
        (ValueError("oh"), 1, "herd: ValueError: oh (this is a bug in herd: HERD_DEBUG=1 shows where)\n"),
        (ValueError("x" * 9999), 1, None),
        (MemoryError(), 1, "herd: out of memory: use a smaller model, a shorter context (-c) or --dtype bfloat16\n"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, None),
        (OSError(28, "No space left on device"), 1, None),
        (click.UsageError("no"), 2, "herd: no (see: herd models --help)\n"),
        (KeyboardInterrupt(), 130, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_one_line_and_a_status(
    broken, error: BaseException, status: int, line: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert broken(error) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err) < 500
    assert err.count("\n") == 1
    assert "Traceback" not in err
    if line is not None:
        assert err == line


def test_herd_debug_shows_where(broken, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERD_DEBUG", "1")
    assert broken(ValueError("oh")) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.rstrip().endswith("(this is a bug in herd: HERD_DEBUG=1 shows where)")


def test_a_warning_is_one_line_without_a_place_in_the_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def command() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("two files\ndisagree", stacklevel=1)

    monkeypatch.setattr("herd.cli.models.command", command)
    assert run(["models"]) == 0
    assert capsys.readouterr().err == "note: two files disagree\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m herd run --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # 0 when everything was in the pipe before it was closed


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    command = f"{sys.executable} -m herd models {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Error" not in done.stderr
    assert "on this machine" not in done.stdout


def test_no_escape_codes_without_a_terminal() -> None:
    done = herd("chatt", env={"TERM": "xterm-256color", "FORCE_COLOR": "1"})
    assert "\x1b" not in done.stderr
