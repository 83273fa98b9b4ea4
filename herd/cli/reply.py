"""One reply on the screen: text as it is made, the rate behind it, and Ctrl-C that stops this reply and nothing else."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator

from herd.chat.messages import ToolCall
from herd.cli.console import note, silent_keys
from herd.cli.conversation import Conversation, Outcome
from herd.cli.progress import progress
from herd.cli.screen import Screen

__all__ = ["ReplyView", "called", "ending", "rates", "stoppable"]

REFRESH = 0.2
"""Seconds between two looks at the live rate."""


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

            first = looked = 0.0
            try:
                with contextlib.closing(talk.say(text, on_prefill)) as deltas:  # type: ignore[type-var]  # a generator
                    for delta in deltas:
                        if not first:
                            tick(1, 1)  # no bar between the words, whether or not the model told how it reads
                        if delta.text is not None:
                            screen.text(delta.text)
                        if delta.tool_call is not None:
                            screen.end()
                            note(called(delta.tool_call))
                        now = time.monotonic()
                        if not first:
                            first = looked = now
                        elif now - looked >= REFRESH:
                            looked = now
                            screen.status(f"{(talk.model.made - 1) / (now - first):.1f} tokens/s")
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
        at = "at the server's limit" if max_tokens is None else f"at {max_tokens} tokens"
        return f"[cut {at}: /set max_tokens N allows more]"
    if outcome.reply.finish_reason == "context_full":
        return "[cut: the context is full. /undo takes back the last exchange, /clear starts over]"
    return None


def rates(outcome: Outcome, max_len: int) -> str:
    """Tokens, tokens per second, and the context used and left (`max_len` 0: nobody knows how long it is)."""
    usage = outcome.reply.usage
    made = f"{usage.completion_tokens} token{'' if usage.completion_tokens == 1 else 's'}"
    speed = f", {usage.decode_rate:.1f} tokens/s" if usage.decode_rate else ""
    if not max_len:
        return f"[{made}{speed}; {outcome.used:,} tokens in all]"
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
