"""Where the lines of a chat come from: a terminal with history and completion, or a plain pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from herd.errors import HerdError

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

__all__ = ["FENCE", "GLANCE", "PROMPT", "Lines", "PlainLines", "TerminalLines", "read_all", "speaks", "state_dir"]

FENCE = '"""'
"""Begins and ends a message of several lines."""
PROMPT = ">>> "
PATIENCE = 2.0
"""Seconds without input before that is said."""
GLANCE = 1.0
"""Seconds in which a pipe beside a prompt has to say something."""


class Lines(Protocol):
    """The user's messages, one after another."""

    def read(self) -> str | None:
        """The next message, or None at the end. Raises KeyboardInterrupt when the line is given up with Ctrl-C."""
        ...


class PlainLines:
    """Messages from a stream, without any editing: one per line, or several lines between fences.

    `prompt` is written to stderr before each line, for a person at a terminal that can do no better.
    """

    def __init__(self, stream: TextIO | None, prompt: str = "") -> None:
        self.stream, self.prompt = stream, prompt

    def read(self) -> str | None:
        line = self._line()
        if line is None:
            return None
        while is_open(line):
            more = self._line()
            if more is None:
                break  # the end of the input closes the message
            line += "\n" + more
        return unfenced(line)

    def _line(self) -> str | None:
        if self.stream is None:  # closed before herd began
            return None
        sys.stderr.write(self.prompt)
        sys.stderr.flush()
        try:
            line = self.stream.readline()
        except UnicodeDecodeError as error:
            raise HerdError(f"standard input is not UTF-8 text: {error.reason}") from None
        if not line:
            sys.stderr.write("\n" if self.prompt else "")
            return None
        return line.rstrip("\r\n")


class TerminalLines:
    """Messages typed at a terminal: history over sessions, Tab completes commands, Alt-Enter starts a new line."""

    def __init__(self, words: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.filters import Condition

        session: PromptSession[str]
        self._session = session = PromptSession(
            history=_history(),
            completer=_completer(words),
            complete_while_typing=False,
            multiline=Condition(lambda: is_open(session.default_buffer.text)),
            key_bindings=_keys(),
            prompt_continuation=lambda width, number, soft: "... ",
            placeholder=[("fg:ansibrightblack", "Say something (/? for help)")],
        )

    def read(self) -> str | None:
        try:
            return unfenced(self._session.prompt(PROMPT))
        except EOFError:
            return None


def is_open(text: str) -> bool:
    """Whether `text` begins with a fence that is not closed yet."""
    return text.lstrip().startswith(FENCE) and FENCE not in text.lstrip()[len(FENCE) :]


def unfenced(text: str) -> str:
    """`text` without its fences, when they stand around all of it (or the last is missing); any other text as it is."""
    inner = text.strip()
    if not inner.startswith(FENCE):
        return text
    inside, _, behind = inner[len(FENCE) :].partition(FENCE)
    return text if behind else inside.strip("\n")


def state_dir() -> Path:
    """Where herd keeps what it remembers between runs (XDG base directories)."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "herd"


def read_all(stream: TextIO | None, waiting: Callable[[], None]) -> str:
    """The whole of `stream` as text; `waiting` is called once when it has not ended after PATIENCE seconds."""
    if stream is None:  # closed before herd began
        return ""
    import threading

    timer = threading.Timer(PATIENCE, waiting)
    timer.daemon = True
    timer.start()
    try:
        data = stream.buffer.read() if hasattr(stream, "buffer") else stream.read().encode()
    finally:
        timer.cancel()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HerdError(f"standard input is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None


def speaks(stream: TextIO | None) -> bool:
    """Whether `stream` gives data or ends within GLANCE seconds; True where that cannot be asked."""
    import select

    try:
        return stream is None or bool(select.select([stream], [], [], GLANCE)[0])
    except (OSError, ValueError):  # not a file of the system, or a system that waits for sockets only
        return True


def _history() -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = state_dir() / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # what people ask is nobody else's business
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _completer(words: Sequence[str]) -> Completer:
    from prompt_toolkit.completion import WordCompleter

    return WordCompleter(list(words), sentence=True)


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: object) -> None:
        event.current_buffer.insert_text("\n")  # type: ignore[attr-defined]

    return keys
