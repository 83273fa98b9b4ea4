"""The real chat in a real pseudo-terminal: prompt, reply, live rate, Ctrl-C, completion, history, leaving."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.processes import LISTENING
from tests.cli.tiny import write_folder

pty = pytest.importorskip("pty")

DOWN, UP, ENTER, ALT_ENTER, TAB, CTRL_C, CTRL_D = "\x1b[B", "\x1b[A", "\r", "\x1b\r", "\t", "\x03", "\x04"
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[78=>]|\][^\x07]*\x07)")
STATUS = re.compile(r"\[\d+ tokens?,? .*context [\d,]+ of [\d,]+ used, [\d,]+ left\]")


IN_TERMINAL = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{LISTENING}"
"""herd with standard input as its controlling terminal, so that Ctrl-C reaches it as a signal."""


class Terminal:
    """A process at the other end of a pseudo-terminal of 100 columns."""

    def __init__(self, args: list[str], env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "100"} | env,
            start_new_session=True,
        )
        os.close(slave)
        self.raw = ""
        self.seen = 0

    @property
    def text(self) -> str:
        """Everything shown so far, without escape sequences."""
        return ESCAPES.sub("", self.raw)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str | re.Pattern[str], seconds: float = 60) -> re.Match[str]:
        """The next place that matches in what is shown after the last one found."""
        end = time.monotonic() + seconds
        while True:
            found = re.compile(pattern).search(self.text, self.seen)
            if found:
                self.seen = found.end()
                return found
            if time.monotonic() > end or not self._read(end - time.monotonic()):
                raise AssertionError(
                    f"{pattern!r} did not come; shown after the last match: {self.text[self.seen :]!r}"
                )

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the other end is closed
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)

    def status(self) -> int:
        """Waits for the end; the exit status."""
        while self._read(30):
            pass
        return self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with so much context that a reply does not end while it is looked at."""
    return str(write_folder(tmp_path_factory.mktemp("models") / "endless", context=8192))


@pytest.fixture
def open_chat(endless: str, tmp_path: Path) -> Iterator[object]:
    opened: list[Terminal] = []

    def start(*args: str, **env: str) -> Terminal:
        opened.append(Terminal(["chat", endless, *args], {"XDG_STATE_HOME": str(tmp_path)} | env))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_a_chat_from_greeting_to_goodbye(open_chat, tmp_path: Path) -> None:
    chat = open_chat("--temp", "0", "-n", "30")
    chat.wait_for("context 8,192 tokens")
    chat.wait_for("/\\? lists the commands")
    chat.wait_for(">>> ")
    chat.type("Hello" + ENTER)
    chat.wait_for("cut at 30 tokens")
    chat.wait_for(STATUS)
    chat.wait_for(">>> ")

    chat.type("/set max_tokens none" + ENTER)
    chat.wait_for("max_tokens is none")
    chat.wait_for(">>> ")
    chat.type("Again" + ENTER)
    chat.wait_for(r"\d tokens/s")  # while the reply goes on
    chat.type(CTRL_C)
    chat.wait_for(re.escape("[stopped]"))
    chat.wait_for(STATUS)
    chat.wait_for(">>> ")

    chat.type("half a line" + CTRL_C)
    chat.wait_for("Ctrl-D or /bye leaves")
    chat.wait_for(">>> ")
    chat.type("/sy" + TAB)
    chat.wait_for("/system")
    chat.type(ENTER)
    chat.wait_for("no system prompt")
    chat.wait_for(">>> ")
    chat.type("/show" + ENTER)
    chat.wait_for("4 messages")
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    history = tmp_path / "herd" / "history"
    assert "Hello" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_several_lines_history_and_no_colour(open_chat, tmp_path: Path) -> None:
    chat = open_chat("--temp", "0", "-n", "3", NO_COLOR="1")
    chat.wait_for(">>> ")
    chat.type('"""one' + ENTER)
    chat.wait_for(r"\.\.\.")
    chat.type('two"""' + ENTER)
    chat.wait_for("cut at 3 tokens")
    chat.wait_for(">>> ")
    chat.type("a" + ALT_ENTER + "b" + ENTER)
    chat.wait_for("cut at 3 tokens")
    chat.wait_for(">>> ")
    saved = tmp_path / "talk.json"
    chat.type(f"/save {saved}" + ENTER)
    chat.wait_for("4 messages")
    chat.wait_for(">>> ")
    chat.type(UP + UP + ENTER)
    chat.wait_for("cut at 3 tokens")
    chat.type("/bye" + ENTER)
    assert chat.status() == 0
    assert '"content": "one\\ntwo"' in saved.read_text()
    assert '"content": "a\\nb"' in saved.read_text()
    assert not re.search(r"\x1b\[(\d+;)*[39]\dm", chat.raw), "colours although NO_COLOR is set"


def test_a_dumb_terminal_gets_plain_lines(open_chat) -> None:
    chat = open_chat("-n", "3", TERM="dumb")
    chat.wait_for(">>> ")
    chat.type("Hello\n")
    chat.wait_for("cut at 3 tokens")
    chat.wait_for(STATUS)
    chat.wait_for(">>> ")
    chat.type(CTRL_D)
    assert chat.status() == 0
    assert "\x1b" not in chat.raw
