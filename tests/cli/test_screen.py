"""Text on a live terminal: words are not cut, the status disturbs nothing, and a model cannot steer the terminal."""

from __future__ import annotations

import io
import random
import re
import textwrap

import pytest
from rich.cells import cell_len

from herd.cli.screen import Screen

CLEAR, SAVE, BACK = "\x1b[K", "\x1b7", "\x1b8"


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    return Terminal()


def test_the_live_rate_stands_behind_the_text_and_goes_away(terminal: Terminal) -> None:
    screen = Screen(terminal, live=True)
    screen.text("Hello")
    screen.status("9.9 tokens/s")
    screen.text(" you")
    screen.end()
    assert terminal.getvalue() == f"Hello{SAVE}{CLEAR}  \x1b[2m9.9 tokens/s\x1b[0m{BACK}{CLEAR} you\n"


@pytest.mark.parametrize("text", ["x" * 30, "x" * 39, "x" * 40, "羊" * 15, "x" * 75, "\t" * 4, "one\n" + "x" * 30])
def test_the_live_rate_is_not_drawn_where_it_would_wrap(terminal: Terminal, text: str) -> None:
    screen = Screen(terminal, live=True)
    screen.text(text)
    screen.status("9.9 tokens/s")
    assert terminal.getvalue() == text


@pytest.mark.parametrize("text", ["x" * 10, "羊" * 10, "x" * 50, "x" * 30 + "\n", "e\u0301" * 20])
def test_the_live_rate_is_drawn_where_there_is_room(terminal: Terminal, text: str) -> None:
    screen = Screen(terminal, live=True)
    screen.text(text)
    screen.status("9.9 tokens/s")
    assert "9.9 tokens/s" in terminal.getvalue()


def test_a_dumb_terminal_gets_the_text_as_it_is(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(terminal, live=True)
    screen.text("word " * 20)
    screen.status("9.9 tokens/s")
    assert terminal.getvalue() == "word " * 20


def test_no_live_rate_without_colours(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen(terminal, live=True)
    screen.text("Hello")
    screen.status("9.9 tokens/s")
    screen.end()
    assert terminal.getvalue() == "Hello\n"


def test_a_model_cannot_steer_the_terminal(terminal: Terminal) -> None:
    Screen(terminal, live=False).text("a\x1b[2J\x07\x9b31m\tb\n")
    assert terminal.getvalue() == "a\u241b[2J\u2407\ufffd31m\tb\n"
    pipe = io.StringIO()
    Screen(pipe, live=False).text("a\x1b[2J")
    assert pipe.getvalue() == "a\x1b[2J"


WIDTH = 40


def shown(output: str) -> list[str]:
    """The lines that a terminal of WIDTH columns shows after `output`: an emulator of the few codes that are used."""
    lines: list[list[str]] = [[]]
    column, saved = 0, 0
    codes = output.replace(SAVE, "\x1b[s").replace(BACK, "\x1b[u")
    for amount, code, char in re.findall(r"\x1b\[(\d*)([A-Za-z])|(.|\n)", codes):
        line = lines[-1]
        if char == "\n":
            lines.append([])
            column = 0
        elif char:
            wide = cell_len(char)
            if column + wide > WIDTH:
                lines.append([])
                line, column = lines[-1], 0
            line[column : column + max(wide, 1)] = [char] + [""] * (wide - 1)
            column += wide
        elif code == "D":
            column -= int(amount)
            assert column >= 0
        elif code == "K":
            del line[column:]
        elif code == "s":
            saved = column
        elif code == "u":
            column = saved
    return ["".join(line).rstrip() for line in lines]


TEXT = (
    "Once upon a time there was a lonely dog named Tim. He lived in a house near the forest, and he was happy there. "
    "Extraordinarily long words such as incomprehensibilities happen too.\n\n  - an item that is long enough to need "
    "a second line\n羊驼 是 一种 动物，住在 山上，很 可爱，吃 草。\n"
)


@pytest.mark.parametrize("seed", range(6))
def test_words_are_not_cut_whatever_the_pieces(terminal: Terminal, seed: int) -> None:
    screen, rest, generator = Screen(terminal, live=True), TEXT, random.Random(seed)
    while rest:
        size = generator.randint(1, 9)
        screen.text(rest[:size])
        rest = rest[size:]
        if generator.random() < 0.5:
            screen.status("9.9 tokens/s")
    screen.end()
    lines = shown(terminal.getvalue())
    assert all(cell_len(line) < WIDTH for line in lines)
    assert " ".join(lines).split() == TEXT.split()
    first = textwrap.wrap(TEXT.split("\n")[0], WIDTH - 1)
    assert lines[: len(first)] == first


def test_code_and_long_words_are_left_to_the_terminal(terminal: Terminal) -> None:
    address = "https://example.org/" + "path/" * 12
    code = "```python\n" + "print('a rather long line of code', 'that goes on')" + "\n```\n"
    screen = Screen(terminal, live=True)
    for char in f"See {address} or\n{code}and then words again, enough of them for a second line.":
        screen.text(char)
    output = re.sub(r"\x1b\[\d*[A-Z]", "", terminal.getvalue())
    assert address in output
    assert code in output
    assert all(len(line) < WIDTH for line in shown(terminal.getvalue())[-2:])
