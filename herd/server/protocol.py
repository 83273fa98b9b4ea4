"""What the HTTP process and the worker of a model say to each other: frozen dataclasses, written by `herd.server.wire`. No torch.

To the worker: `Load` first, then `Call` (a reply is wanted), `Ask` (anything with one answer) and `Cancel` (one of these is not
wanted any more; at any time, twice is fine). Back: `Progress` while the model is loaded, then `Ready` or `Broken`; for each Call
`Began`, `Piece`s, an `Ended` for each choice and `Finished`, or `Failed` at any moment; `Answer` or `Failed` for each Ask; `Gone`
for each Cancel; `Beat` about once a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from herd.server.wire import Codec

__all__ = [
    "DOWN",
    "UP",
    "Answer",
    "Ask",
    "Beat",
    "Began",
    "Broken",
    "Call",
    "Cancel",
    "Chat",
    "Ended",
    "Event",
    "Failed",
    "Finished",
    "Gone",
    "Ids",
    "Load",
    "Piece",
    "Progress",
    "Ready",
    "Text",
    "TokenInfo",
    "ToolPiece",
    "Truncated",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


# ---- to the worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """The model of a worker, once. `options` are the keyword arguments of `herd.LLM`; `adapters` are (name, path) pairs."""

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation to be answered: messages in OpenAI's shape, as plain JSON.

    `tool_choice` is "auto", "none", "required", or with `tool_name` "named". `parallel` False: at most one call. `continue_final`
    goes on with the last message, which is the assistant's. `format_options` go to `herd.chat.formats.format_named`. `truncate`:
    the oldest messages may be left out when the conversation does not fit. `note` is to stand at the end of the system message.
    """

    messages: tuple[Any, ...]
    tools: tuple[Any, ...] = ()
    tool_choice: Literal["auto", "none", "required", "named"] = "auto"
    tool_name: str | None = None
    parallel: bool = True
    continue_final: bool = False
    generation_prompt: bool = True
    format_options: dict[str, Any] = field(default_factory=dict)
    truncate: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A text to go on with, or with a `suffix` the middle between the two."""

    text: str
    suffix: str | None = None


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids to go on with, as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A reply that is wanted, or `n` of them. `id` is the caller's, and new.

    `sampling` are fields of SamplingParams over the checkpoint's own defaults. Prompts share cached prefixes only with calls
    of the same `salt`. `echo`: Began tells the prompt's text. `only_prompt`: nothing is generated, the prompt's logprobs are
    wanted.
    """

    id: str
    prompt: Chat | Text | Ids
    sampling: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    salt: str = ""
    echo: bool = False
    only_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """The call or question `id` is not wanted any more. Nothing but `Gone` comes of it from now on; unknown ids are fine."""

    id: str


@dataclass(frozen=True, slots=True)
class Ask:
    """A question with one answer: `what` is a function of `herd.server.asks`, `args` are its keyword arguments."""

    id: str
    what: str
    args: dict[str, Any] = field(default_factory=dict)


# ---- of one call -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token, its log-probability (nats; None for the first of a prompt) and those of the likeliest ones, best first."""

    id: int
    text: str
    data: bytes
    logprob: float | None = None
    top: tuple[tuple[int, str, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolPiece:
    """More of a tool call, the choice's `number`-th: `id` and `name` come first and once, then `arguments` (JSON) in pieces."""

    number: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Truncated:
    """What was left out of a conversation that did not fit: the oldest messages, never system messages, tools or the last one."""

    dropped_messages: int
    dropped_tokens: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts in tokens, times in seconds. Prompt seconds are from when the worker took the call to its first token.
    `from_cache`: the whole reply was given before, and is given again (`--response-cache`)."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    from_cache: bool = False


@dataclass(frozen=True, slots=True)
class Began:
    """The call was taken: it will not be refused any more. `notes` are the prompt format's."""

    call: str
    prompt_tokens: int
    notes: tuple[str, ...] = ()
    truncated: Truncated | None = None
    prompt_text: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """More of choice `index`: text, part of a tool call, or both. `tokens` are there when logprobs were asked for, in order and
    each once, not always with the very text that they make. `prompt` are the prompt's, when asked for, once."""

    call: str
    index: int = 0
    text: str = ""
    tool: ToolPiece | None = None
    tokens: tuple[TokenInfo, ...] = ()
    prompt: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """Choice `index` is complete. `detail`: the stop string that was met, or "context_full" when the length is the context's."""

    call: str
    index: int
    reason: FinishReason
    detail: str | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The call is over."""

    call: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Gone:
    """Nobody in the worker does anything for the cancelled `call` any more: until then it takes the place of another."""

    call: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The call, or the question, came to nothing. `kind` is the name of a HerdError, or "Bug"; `details` are its numbers."""

    call: str
    kind: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


Event = Began | Piece | Ended | Finished | Failed


# ---- of the worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """How far loading is: what is being done, and its part from 0 to 1 when that is known."""

    phase: str
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded. `format` is its prompt format, None for a base model; `budget` says what memory it got.
    `defaults` are the checkpoint's own sampling defaults, those that pages show. `sees`: prompts may hold images. `rooms` are
    the contexts of adapters that leave less of it (virtual tokens)."""

    source: str
    path: str
    parameters: int
    kind: str
    context: int
    format: str | None
    tools: bool
    infill: bool
    grammar: bool
    seqs: int
    budget: str
    fingerprint: str
    family: str
    adapters: tuple[str, ...] = ()
    device: str = "cpu"
    defaults: dict[str, Any] = field(default_factory=dict)
    sees: bool = False
    rooms: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Broken:
    """The model cannot be loaded, and why."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an Ask."""

    call: str
    value: Any = None


@dataclass(frozen=True, slots=True)
class Beat:
    """What the engine does: the fields of `herd.engine.engine.Stats`."""

    stats: dict[str, Any]


DOWN = Codec([Load, Call, Cancel, Ask])
"""To the worker."""
UP = Codec([Began, Piece, Ended, Finished, Failed, Gone, Answer, Progress, Ready, Broken, Beat])
"""From it."""
