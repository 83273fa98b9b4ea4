"""One reply on the screen: text as it is made, the rate behind it, and Ctrl-C that stops this reply and nothing else."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from herd.chat.messages import ToolCall
from herd.cli.console import coloured, is_terminal, note, progress, safe, styled
from herd.cli.conversation import Conversation, Outcome

__all__ = ["ReplyView", "Screen", "ending", "rates", "stoppable"]

REFRESH = 0.2
"""Seconds between two looks at the live rate."""


class Screen:
    """Text on a stream; on a terminal with `live`, a dim status stands behind the cursor until more text comes.

    The status is only drawn where the rest of the line holds it, so it never wraps and never covers text.
    """

    def __init__(self, stream: TextIO, *, live: bool) -> None:
        self.stream = stream
        self.column = 0
        self._live = live and coloured(stream)
        self._terminal = is_terminal(stream)
        self._shown = False

    def text(self, piece: str) -> None:
        """Write a piece of text."""
        piece = safe(piece) if self._terminal else piece
        self.stream.write("\x1b[K" + piece if self._shown else piece)
        self._shown = False
        self.stream.flush()
        if self._live:
            self._advance(piece)
        elif piece:
            self.column = 0 if piece.endswith("\n") else 1

    def status(self, text: str) -> None:
        """Show `text` behind the cursor, which stays where it is."""
        room = shutil.get_terminal_size().columns - self.column
        if not self._live or room < len(text) + 4:
            return
        self.stream.write(f"\x1b7\x1b[K  {styled(text, 'dim', self.stream)}\x1b8")
        self.stream.flush()
        self._shown = True

    def end(self) -> None:
        """Remove the status and begin a new line, unless the cursor is at the start of one."""
        if self._shown or self.column:
            self.text("\n" if self.column else "")

    def _advance(self, piece: str) -> None:
        from prompt_toolkit.utils import get_cwidth  # a terminal chat has it loaded already

        width = shutil.get_terminal_size().columns
        line = piece.rsplit("\n", 1)
        if len(line) == 2:
            self.column = 0
        for char in line[-1]:
            wide = 8 - self.column % 8 if char == "\t" else max(get_cwidth(char), 0)
            self.column = self.column + wide if self.column + wide <= width else wide


class ReplyView:
    """Says a text to a conversation and shows what comes back. Replies go to stdout, all else to stderr."""

    def __init__(self, conversation: Conversation, *, live: bool) -> None:
        self.conversation, self.live = conversation, live

    def say(self, text: str) -> Outcome | None:
        """One exchange. None when it was stopped before the model began. Raises HerdError as `Conversation.say` does."""
        talk = self.conversation
        screen = Screen(sys.stdout, live=self.live)
        with stoppable() as stopped, silent_keys(), progress("reading", "tokens") as tick:

            def on_prefill(done: int, total: int) -> None:
                tick(done, total)
                if stopped():
                    raise KeyboardInterrupt

            began = looked = time.monotonic()
            try:
                with contextlib.closing(talk.say(text, on_prefill)) as deltas:  # type: ignore[type-var]  # a generator
                    for delta in deltas:
                        if delta.text is not None:
                            screen.text(delta.text)
                        if delta.tool_call is not None:
                            screen.end()
                            note(called(delta.tool_call))
                        now = time.monotonic()
                        if now - looked >= REFRESH:
                            looked = now
                            screen.status(f"{talk.model.made / (now - began):.1f} tokens/s")
                        if stopped():
                            break
            except KeyboardInterrupt:
                pass
            finally:
                screen.end()
        return talk.outcome


def called(call: ToolCall) -> str:
    """A tool call in words."""
    return f"[calls {call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})]"


def ending(outcome: Outcome, max_tokens: int | None) -> str | None:
    """What is to be said of a reply that did not end by itself."""
    if outcome.stopped:
        return "[stopped]" if outcome.kept else "[stopped before the first word: your message was taken back]"
    if outcome.reply.finish_reason == "length":
        return f"[cut at {max_tokens} tokens: /set max_tokens N allows more]"
    if outcome.reply.finish_reason == "context_full":
        return "[cut: the context is full. /undo takes back the last exchange, /clear starts over]"
    return None


def rates(outcome: Outcome, max_len: int) -> str:
    """Tokens, tokens per second, and the context used and left."""
    usage = outcome.reply.usage
    made = f"{usage.completion_tokens} token{'' if usage.completion_tokens == 1 else 's'}"
    speed = f", {usage.decode_rate:.1f} tokens/s" if usage.decode_rate else ""
    return f"[{made}{speed}; context {outcome.used:,} of {max_len:,} used, {max_len - outcome.used:,} left]"


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is remembered (the yielded function tells), and the second one raises KeyboardInterrupt."""
    asked = False

    def remember(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Inside, the terminal does not echo keys into the reply; what is typed waits for the next prompt."""
    try:
        import termios
    except ImportError:  # not a Unix
        yield
        return
    if not is_terminal(sys.stdin):
        yield
        return
    before = termios.tcgetattr(sys.stdin.fileno())
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)
