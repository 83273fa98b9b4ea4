"""Colour rules, and bars and spinners that appear only when work takes long and somebody looks."""

from __future__ import annotations

import io
import sys
import time

import pytest

from herd.cli import progress as progress_module
from herd.cli.console import coloured, is_interactive, is_terminal, styled
from herd.cli.lines import read_all
from herd.cli.progress import busy, progress
from herd.errors import HerdError


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Puts a terminal in the place of stderr. In the test itself: pytest sets stderr anew after its fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(progress_module, "PATIENCE", 0.0)
    return stream


@pytest.mark.parametrize(
    ("env", "colours"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours_where_somebody_wants_them(env: dict[str, str], colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert coloured(Terminal()) is colours
    assert styled("x", "dim", Terminal()) == ("\x1b[2mx\x1b[0m" if colours else "x")
    assert styled("x", "", Terminal()) == "x"
    assert not coloured(io.StringIO())


def test_missing_and_closed_streams_are_no_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Terminal()
    closed.close()
    monkeypatch.setattr(sys, "stdin", None)
    assert not is_terminal(None)  # type: ignore[arg-type]  # what python gives for a closed descriptor
    assert not is_interactive()


def test_a_bar_with_rate_and_time_left_for_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with progress("reading", "tokens") as tick:
        for done in range(0, 1001, 100):
            tick(done, 1000)
            time.sleep(0.03)
        drawn = stderr.getvalue()
        tick(1000, 1000)
    assert "reading" in drawn
    assert "tokens/s" in drawn
    assert "/1000" in drawn


def test_no_bar_for_short_work_or_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    monkeypatch.setattr(progress_module, "PATIENCE", 2.0)
    with progress("reading", "tokens") as tick, busy("loading"):
        tick(1, 10)
        tick(10, 10)
    assert stderr.getvalue() == ""
    monkeypatch.setattr(progress_module, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", plain := io.StringIO())
    with progress("reading", "tokens") as tick, busy("loading"):
        tick(1, 10)
    assert plain.getvalue() == ""


def test_a_spinner_for_work_of_unknown_length(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with pytest.raises(HerdError), busy("loading nano"):
        time.sleep(0.3)
        raise HerdError("broken")
    shown = stderr.getvalue()
    assert "loading nano" in shown
    stopped = len(shown)
    time.sleep(0.3)
    assert len(stderr.getvalue()) == stopped, "the spinner goes on after the work has ended"


def test_waiting_for_input_is_said() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            time.sleep(0.2)
            return super().read(size)

    said: list[str] = []
    from herd.cli import lines

    before, lines.PATIENCE = lines.PATIENCE, 0.05
    try:
        assert read_all(io.TextIOWrapper(Slow(b"late")), lambda: said.append("waiting")) == "late"
        assert read_all(io.TextIOWrapper(io.BytesIO(b"now")), lambda: said.append("never")) == "now"
    finally:
        lines.PATIENCE = before
    assert said == ["waiting"]
    assert read_all(None, lambda: None) == ""
