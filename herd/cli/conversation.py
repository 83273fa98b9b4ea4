"""A conversation with one model: its turns, its system prompt and its settings. No input or output happens here."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from herd.chat.format import Delta, ToolSpec
from herd.chat.messages import Message
from herd.chat.model import Reply
from herd.chat.params import SamplingParams
from herd.errors import ConfigError

__all__ = ["SETTINGS", "Conversation", "Outcome", "Talker", "stop_string"]


class Talker(Protocol):
    """The ChatModel behind a conversation: one that also says how full its context is. `herd.engine.local.LocalChat` is one."""

    last: Reply | None
    made: int

    @property
    def max_len(self) -> int: ...

    def count(self, messages: Sequence[Message]) -> int: ...

    def stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        params: SamplingParams = ...,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Delta]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a reply ended. `stopped`: the caller closed it early; `kept`: whether the exchange is part of the conversation."""

    reply: Reply
    stopped: bool
    kept: bool

    @property
    def used(self) -> int:
        """Tokens of the context that prompt and reply take."""
        return self.reply.usage.prompt_tokens + self.reply.usage.completion_tokens


class Conversation:
    """The turns so far and how the next one is sampled.

    A partial reply that was stopped stays in the conversation, marked by the stop reason out_of_tokens; one that was stopped
    before its first character, and one that failed, leave the conversation as it was.

    `beginning` are turns that it starts with and keeps when it is cleared. `apart`: each message is put to the model on its own,
    for Guards, whose verdicts are no part of what they judge.
    """

    def __init__(
        self,
        model: Talker,
        params: SamplingParams = SamplingParams(),
        system: str = "",
        *,
        apart: bool = False,
        beginning: Sequence[Message] = (),
    ) -> None:
        self.model, self.params, self.system, self.apart = model, params, system, apart
        self.beginning = tuple(beginning)
        self.turns: list[Message] = list(beginning)
        self.outcome: Outcome | None = None

    @property
    def messages(self) -> list[Message]:
        """The system prompt, if any, and the turns."""
        return [Message("system", self.system), *self.turns] if self.system else list(self.turns)

    @property
    def used(self) -> int:
        """Tokens of the context that the conversation takes now."""
        carried = self._before()
        return self.model.count(carried) if carried else 0

    def say(self, text: str, on_prefill: Callable[[int, int], None] | None = None) -> Iterator[Delta]:
        """The reply to `text` as it is made; close the iterator to stop it. Afterwards `outcome` says how it ended.

        Raises ContextFullError or PromptError before the first delta, with the conversation unchanged.
        """
        asked = Message("user", text)
        self.outcome = None
        stream = self.model.stream([*self._before(), asked], params=self.params, on_prefill=on_prefill)
        try:
            yield from stream
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(asked, stopped=True)
            raise
        self._keep(asked, stopped=False)

    def _before(self) -> list[Message]:
        """What the model is told before the next message."""
        return self.messages[: 1 if self.system else 0] if self.apart else self.messages

    def _keep(self, asked: Message, *, stopped: bool) -> None:
        reply = self.model.last
        if reply is None:  # stopped before the model began
            return
        kept = not stopped or bool(reply.text or reply.message.tool_calls)
        if kept:
            answer = replace(reply.message, stop_reason="out_of_tokens") if stopped else reply.message
            self.turns += [asked, answer]
        self.outcome = Outcome(reply, stopped, kept)

    def undo(self) -> str | None:
        """Take back the last exchange; the user's text of it, or None when there is none."""
        for i in range(len(self.turns) - 1, len(self.beginning) - 1, -1):
            if self.turns[i].role == "user":
                text = self.turns[i].text
                del self.turns[i:]
                return text
        return None

    def clear(self) -> None:
        """Forget every turn but those of the beginning; system prompt and settings stay."""
        self.turns[:] = self.beginning

    def set(self, name: str, value: str) -> str:
        """Change one setting from its text; the setting's full name. Raises ConfigError."""
        key = ALIASES.get(name.lower(), name.lower())
        if key == "system":
            self.system = value
            return key
        if key not in SETTINGS:
            near = difflib.get_close_matches(key, [*SETTINGS, *ALIASES], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are system, {', '.join(SETTINGS)}"
            raise ConfigError(f"no setting is called {name!r}: {hint}")
        self.params = replace(self.params, **{key: SETTINGS[key](key, value)})
        return key


def stop_string(text: str) -> str:
    r"""A stop string as typed: \n and \t stand for newline and tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: expected a number") from None


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}: expected an integer") from None


def _whole_or_none(name: str, text: str) -> int | None:
    return None if text.lower() == "none" else _whole(name, text)


def _stop(name: str, text: str) -> tuple[str, ...]:
    """ "none", one string, or a JSON list of strings."""
    if text.lower() == "none":
        return ()
    if not text.startswith("["):
        return (stop_string(text),)
    try:
        return tuple(json.loads(text))
    except (ValueError, TypeError):
        raise ConfigError(f'{name} is {text!r}: give one string, or a JSON list such as ["END", "\\n"]') from None


SETTINGS: dict[str, Callable[[str, str], Any]] = {
    "temperature": _number,
    "top_p": _number,
    "top_k": _whole,
    "min_p": _number,
    "repetition_penalty": _number,
    "max_tokens": _whole_or_none,
    "seed": _whole_or_none,
    "stop": _stop,
}
"""Fields of SamplingParams that can be changed in a chat, and how their text is read."""
ALIASES = {"temp": "temperature", "num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
