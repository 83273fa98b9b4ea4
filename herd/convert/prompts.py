"""Conversations through the prompt format of each side: the same ids, or it is not the same model any more."""

from __future__ import annotations

from collections.abc import Sequence

from herd.chat.format import ChatFormat, ToolSpec
from herd.chat.formats import detect, format_named
from herd.chat.messages import Message, ToolCall
from herd.checkpoint.vocabulary import MissingTokenizer
from herd.convert.report import Check
from herd.errors import HerdError, PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["CONVERSATIONS", "check_prompts"]

_WEATHER = ToolSpec(
    "get_weather",
    "The weather of a city",
    {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}, "required": ["city"]},
)

CONVERSATIONS: dict[str, tuple[tuple[Message, ...], tuple[ToolSpec, ...]]] = {
    "one question": ((Message("user", "How many cows are in the herd?"),), ()),
    "with a system message": ((Message("system", "Answer in one word."), Message("user", "Is the sky blue?")), ()),
    "several turns": (
        (
            Message("user", "Hello!"),
            Message("assistant", "Hello, how can I help?"),
            Message("user", "Count: 1, 2,"),
        ),
        (),
    ),
    "unicode and names of special tokens": (
        (Message("user", "🦙 naïve <|eot_id|> </s> [INST] 東京\n\n  code:\n\tx = 1"),),
        (),
    ),
    "a tool and its result": (
        (
            Message("user", "What is the weather in Lima?"),
            Message("assistant", "", (ToolCall("get_weather", {"city": "Lima"}),)),
            Message("tool", '{"celsius": 19}', name="get_weather"),
        ),
        (_WEATHER,),
    ),
}
"""What is rendered. A format that cannot express one of them must refuse it on both sides."""

_SAME_WITHOUT_TOOLS = {frozenset(("llama3.1", "llama3.3"))}
"""Formats whose files cannot be told apart: the template of Llama 3.3 is that of 3.1."""


def check_prompts(a: Tokenizer, b: Tokenizer, *, kind_b: str) -> Check:
    """The prompt check over two tokenizers, B's from a checkpoint of `kind_b`. Not made without tokenizers."""
    if isinstance(a, MissingTokenizer) or isinstance(b, MissingTokenizer):
        return Check("prompts", None, ("without a tokenizer on both sides there are no prompts to compare",))
    lines: list[str] = []
    wrong: list[str] = _templates(a, b, kind_b, lines)
    try:
        one = detect(a)
    except PromptError as error:  # a template of its own: text equality is all there is to check
        lines.append(f"A's template is of no format that herd knows ({_first(error)})")
        return Check("prompts", not wrong, tuple(wrong + lines))
    other, names_agree = _other_format(one, b, kind_b, lines, wrong)
    if other is not None:
        compared = [
            name
            for name, (messages, tools) in CONVERSATIONS.items()
            if names_agree or not tools
            if _same(one, other, messages, tools, name, wrong)
        ]
        lines.insert(0, f"{len(compared)} conversations as {one.name}: the same ids on both sides")
    return Check("prompts", not wrong, tuple(wrong or lines), {"format": one.name})


def _templates(a: Tokenizer, b: Tokenizer, kind_b: str, lines: list[str]) -> list[str]:
    if a.template and b.template:
        if a.template == b.template:
            lines.append("chat template: the same text")
            return []
        at = next(
            (i for i, (x, y) in enumerate(zip(a.template, b.template, strict=False)) if x != y),
            min(len(a.template), len(b.template)),
        )
        return [
            f"the chat template differs from character {at} on ({len(a.template)} and {len(b.template)} characters)"
        ]
    if a.template and kind_b == "meta":
        lines.append("chat template: Meta's format has no place for it, B has none")
    elif a.template:
        return ["A has a chat template, B has none"]
    elif b.template:
        lines.append("chat template: A has none, B carries herd's own for this format")
    else:
        lines.append("chat template: none on either side")
    return []


def _other_format(
    one: ChatFormat, b: Tokenizer, kind_b: str, lines: list[str], wrong: list[str]
) -> tuple[ChatFormat | None, bool]:
    """B's format, and whether it is the same one (then tools are compared, too)."""
    try:
        other = detect(b)
    except HerdError as error:
        wrong.append(f"B's prompt format: {_first(error)}")
        return None, False
    if other.name == one.name:
        return other, True
    if frozenset((one.name, other.name)) in _SAME_WITHOUT_TOOLS:
        lines.append(f"B is taken for {other.name}: name the format {one.name} for its way of calling tools")
        return other, False
    if other.name == "base" and kind_b == "meta":
        lines.append(f"Meta's files do not name a prompt format: name it with --format {one.name}")
        return format_named(one.name, b), True
    wrong.append(f"the prompt format is {one.name} in A, {other.name} in B")
    return None, False


def _same(
    one: ChatFormat,
    other: ChatFormat,
    messages: Sequence[Message],
    tools: Sequence[ToolSpec],
    name: str,
    wrong: list[str],
) -> bool:
    ids_a, ids_b = _render(one, messages, tools), _render(other, messages, tools)
    if ids_a != ids_b:
        wrong.append(f"conversation {name!r} has other ids in B ({_length(ids_a)} and {_length(ids_b)})")
    return ids_a == ids_b


def _render(format: ChatFormat, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int] | str:
    """Ids, or the refusal."""
    try:
        return format.render(messages, tools).tokens
    except PromptError as error:
        return str(error)


def _length(rendered: list[int] | str) -> str:
    return "refused" if isinstance(rendered, str) else f"{len(rendered)} tokens"


def _first(error: Exception) -> str:
    return str(error).split("\n")[0][:160]
