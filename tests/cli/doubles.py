"""A model that says what it was told to say, for conversations without a model and without a terminal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence

from herd.chat.format import Delta, ToolSpec
from herd.chat.messages import Message
from herd.chat.model import FinishReason, Reply, Usage
from herd.chat.params import SamplingParams
from herd.errors import ContextFullError, HerdError

__all__ = ["INTERRUPT", "ListedLines", "ScriptedTalker"]

INTERRUPT = "\0interrupt"
"""A piece of a script that is not said: Ctrl-C is pressed at this point."""


class ScriptedTalker:
    """Says the scripts one after another, piece by piece; a piece and a word of a prompt are one token each.

    `asked` keeps every list of messages it was given; `fails` is raised instead of the next reply.
    """

    def __init__(self, *scripts: Sequence[str], max_len: int = 100, finish: FinishReason = "stop") -> None:
        self.scripts = [list(script) for script in scripts]
        self.max_len, self.finish = max_len, finish
        self.asked: list[list[Message]] = []
        self.params: list[SamplingParams] = []
        self.last: Reply | None = None
        self.made = 0
        self.fails: HerdError | None = None

    def count(self, messages: Sequence[Message]) -> int:
        return sum(len(message.text.split()) for message in messages)

    def stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        params: SamplingParams = SamplingParams(),
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Delta]:
        self.asked.append(list(messages))
        self.params.append(params)
        return self._say(self.count(messages), on_prefill)

    def _say(self, prompt: int, on_prefill: Callable[[int, int], None] | None) -> Iterator[Delta]:
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        if prompt >= self.max_len:
            raise ContextFullError(
                f"the prompt has {prompt} tokens and the context holds {self.max_len}",
                needed=prompt + 1,
                available=self.max_len,
            )
        said: list[str] = []
        self.made = 0
        try:
            script = self.scripts.pop(0) if self.scripts else ["ok"]
            if script[:1] == [INTERRUPT]:
                signal.raise_signal(signal.SIGINT)
            if on_prefill is not None:
                on_prefill(prompt, prompt)
            for piece in script:
                if piece == INTERRUPT:
                    signal.raise_signal(signal.SIGINT)
                    continue
                self.made += 1
                said.append(piece)
                yield Delta(text=piece)
            yield Delta(stop_reason="end_of_turn")
        finally:
            usage = Usage(prompt, self.made, 0, 0.01, 0.5 if self.made > 1 else 0.0)
            self.last = Reply(Message("assistant", "".join(said)), [1] * self.made, self.finish, usage)


class ListedLines:
    """Lines of a chat from a list; INTERRUPT is Ctrl-C at the prompt."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def read(self) -> str | None:
        if not self.lines:
            return None
        line = self.lines.pop(0)
        if line == INTERRUPT:
            raise KeyboardInterrupt
        return line
