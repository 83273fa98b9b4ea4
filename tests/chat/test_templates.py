"""The chat templates that herd writes, run by transformers' own renderer, against herd's prompt formats."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2
import pytest

from herd.chat.formats import FORMATS, detect, format_named
from herd.chat.guard_categories import CATEGORIES
from herd.chat.letters import Letters
from herd.chat.messages import Message, ToolCall
from herd.chat.render import render
from herd.chat.templates import named_in, template_of
from herd.chat.toolspec import BUILTIN_TOOLS, tools_from
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Family, Tokenizer
from tests.chat.conversations import PLAIN, SPECIAL_TEXT, TEXTS, WITH_TOOLS
from tests.vocabularies import Pieces, llama3, llama4

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather für alle 🙂 <now> & 'then'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
SEARCH = {"type": "function", "function": {"name": "brave_search"}}
CODE = {"type": "function", "function": {"name": "code_interpreter", "description": "Runs Python."}}

CHATTY = tuple(name for name in FORMATS if name.startswith(("llama3", "llama4")))
TURNED = ("llama2", "codellama", "codellama-70b", *CATEGORIES)
WITH_FUNCTIONS = tuple(name for name in CHATTY if name not in ("llama3", "llama3-hf"))


def family_of(name: str) -> Family:
    if name in ("llama2", "llama-guard-1"):
        return "llama2"
    if name.startswith("codellama"):
        return "codellama"
    return "llama4" if name in ("llama4", "llama4-hf", "llama-guard-4") else "llama3"


letters_of = cache(Letters)
"""Tokenizers of letters, made once; tests that change one make their own."""


def as_dict(message: Message) -> dict[str, Any]:
    item: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        item["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.stop_reason:
        item["stop_reason"] = message.stop_reason
    return item


def written(name: str, messages: list[dict[str, Any]], tools: Any = (), *, generate: bool = True, **more: Any) -> str:
    """What transformers makes of herd's template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    old = family_of(name) in ("llama2", "codellama")
    rendered, _ = render_jinja_template(
        conversations=[messages],
        tools=list(tools) or None,
        chat_template=template_of(name),
        add_generation_prompt=generate,
        bos_token="<s>" if old else "<|begin_of_text|>",
        eos_token="</s>" if old else "<|end_of_text|>",
        **more,
    )
    return rendered[0]


def both(name: str, messages: list[Any], tools: Any = (), *, generate: bool = True) -> tuple[str | None, str | None]:
    """Our text and the template's; None for a refusal."""
    items = [as_dict(message) if isinstance(message, Message) else message for message in messages]
    letters = letters_of(family_of(name))
    try:
        ours = letters.decode(
            render(items, (name, letters), tools_from(tools), generate=generate).tokens, skip_special=False
        )
    except PromptError:
        ours = None
    try:
        return ours, written(name, items, tools, generate=generate)
    except jinja2.exceptions.TemplateError as error:
        if type(error) is not jinja2.exceptions.TemplateError:  # a slip in the template, not raise_exception
            raise
        return ours, None


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "base"])
@pytest.mark.parametrize("generate", [True, False])
def test_texts_and_refusals_are_those_of_the_renderer(name: str, generate: bool) -> None:
    texts = refusals = 0
    for conversation in PLAIN + WITH_TOOLS:
        ours, theirs = both(name, conversation, generate=generate)
        assert theirs == ours, conversation
        texts, refusals = texts + (ours is not None), refusals + (ours is None)
    assert texts > 10
    assert refusals > 0 or name in WITH_FUNCTIONS


@pytest.mark.parametrize("name", WITH_FUNCTIONS)
@pytest.mark.parametrize("tools", [[WEATHER], [SEARCH], [CODE], [NOW, SEARCH, WEATHER, CODE]], ids=len)
def test_tools_are_described_as_the_renderer_does(name: str, tools: list[Any]) -> None:
    for conversation in PLAIN + WITH_TOOLS:
        ours, theirs = both(name, conversation, tools)
        assert theirs == ours, conversation


def calls(*found: ToolCall, **more: Any) -> list[Message]:
    return [
        Message("user", "u"),
        Message("assistant", more.pop("text", ""), found, **more),
        Message("tool", '{"a": 1}'),
    ]


ODD = ToolCall("f", {"s": "a\"b\\c\nd'🙂", "i": -3, "x": 1.5, "e": 1e30, "l": [1, [], {"k": None}], "b": [True, False]})
QUERY, MATHS = ToolCall("brave_search", {"query": 'say "hi"'}), ToolCall("wolfram_alpha", {"query": "1+1"})
RUN = ToolCall("code_interpreter", {"code": "print('x')\n"})
NO_RUN = ToolCall("code_interpreter", {"source": "x"})
CALLS = [
    calls(ODD),
    calls(ODD, ToolCall("now"), text="Two."),
    calls(QUERY),
    calls(QUERY, MATHS),
    calls(QUERY, ODD),
    calls(RUN),
    calls(RUN, ODD),
    calls(NO_RUN),
    calls(RUN, stop_reason="end_of_turn"),
    calls(ODD, stop_reason="end_of_message"),
    calls(ToolCall("bad name", {})),
    calls(ToolCall("f", {"bad key": 1})),
]


@pytest.mark.parametrize("name", CHATTY)
@pytest.mark.parametrize("tools", [[], [SEARCH], [WEATHER, CODE]], ids=len)
def test_calls_are_written_as_the_renderer_does(name: str, tools: list[Any]) -> None:
    for conversation in CALLS:
        ours, theirs = both(name, conversation, tools if name in WITH_FUNCTIONS else ())
        assert theirs == ours, conversation


def test_conversations_in_other_shapes() -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    cases = [
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}],
        [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}, {"role": "ipython", "content": "c"}],
        [{"role": "user", "content": [{"type": "image", "path": "x.png"}]}],
        [{"role": "critic", "content": "a"}],
        [{"role": "user", "content": "a", "tool_calls": [call]}],
        [],
    ]
    for conversation in cases:
        ours, theirs = both("llama3.1", conversation)
        assert theirs == ours, conversation


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER, WEATHER],
        [{"type": "function", "function": {"name": "a b"}}],
        [{"type": "function", "function": {"name": ""}}],
        [{"type": "function", "function": {"name": "x" * 65}}],
    ],
)
def test_tools_that_cannot_be_described_are_refused(tools: list[Any]) -> None:
    with pytest.raises(PromptError):
        tools_from(tools)
    with pytest.raises(jinja2.exceptions.TemplateError):
        written("llama3.1", [{"role": "user", "content": "u"}], tools)


def test_json_text_as_arguments() -> None:
    """OpenAI's shape: the text is written as it is, blank means none; Python calls cannot be made of text."""
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    conversation = [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [call]}]
    ours, theirs = both("llama3.1", conversation)
    assert theirs == ours
    assert '{"name": "f", "parameters": {"a": 1}}' in str(theirs)
    with pytest.raises(jinja2.exceptions.TemplateError, match="give them as an object"):
        written("llama3.2", conversation)


def test_switches_that_transformers_knows() -> None:
    spoken = [{"role": "user", "content": "u"}]
    by_name = written(
        "llama3.1-hf", spoken, builtin_tools=["brave_search", "code_interpreter"], date_string="1 Jan 2027"
    )
    format = format_named("llama3.1-hf", Letters("llama3"), date="1 Jan 2027")
    ours = format.render([Message("user", "u")], [BUILTIN_TOOLS["brave_search"], BUILTIN_TOOLS["code_interpreter"]])
    assert by_name == format.tokenizer.decode(ours.tokens, skip_special=False)  # type: ignore[attr-defined]


def test_guards_take_categories() -> None:
    spoken = [{"role": "user", "content": "u"}]
    fewer = format_named("llama-guard-3-1b", Letters("llama3"), exclude=["S2", "S13"])
    text = written("llama-guard-3-1b", spoken, excluded_category_keys=["S2", "S13"])
    assert text == Letters("llama3").decode(fewer.render([Message("user", "u")]).tokens, skip_special=False)
    own = format_named("llama-guard-4", Letters("llama4"), categories={"X1": "Spam."})
    text = written("llama-guard-4", spoken, categories={"X1": "Spam."})
    assert text == Letters("llama4").decode(own.render([Message("user", "u")]).tokens, skip_special=False)


def tokenizers(name: str, pieces: Pieces) -> Tokenizer:
    family = family_of(name)
    if family in ("llama2", "codellama"):
        return pieces.with_added("<step>")
    return llama4() if family == "llama4" else llama3()


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "base"])
def test_ids_are_those_of_the_renderer(name: str, pieces: Pieces) -> None:
    """The text of the template, encoded as a whole: BOS once, and the same ids. Three kinds of message cannot pass: special
    names in the text, and tokens that join over the border to the header or to a call."""
    tokenizer = tokenizers(name, pieces)
    same = 0
    for conversation in PLAIN + WITH_TOOLS:
        if any(SPECIAL_TEXT in m.text or m.text[:1] in ("\n", "\r") or (m.text and m.tool_calls) for m in conversation):
            continue
        try:
            ours = render(conversation, (name, tokenizer), generate=True).tokens
        except PromptError:
            continue
        text = written(name, [as_dict(message) for message in conversation])
        ids = tokenizer.encode(text, allow_special=True)
        assert ids == ours, conversation
        assert ids.count(tokenizer.special.bos) == (text.count("[INST]") if name in ("llama2", "codellama") else 1)
        same += 1
    assert same > 8


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "base"])
def test_a_template_names_its_format(name: str) -> None:
    template = template_of(name)
    assert template is not None
    assert named_in(template) == name
    letters = Letters(family_of(name))
    letters.template = template
    found = detect(letters)
    assert found.name == name
    ours = found.render([Message("user", "u")])
    assert letters.decode(ours.tokens, skip_special=False) == both(name, [Message("user", "u")])[1]


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2", "llama2", "llama-guard-2"])
def test_it_reads_the_same_without_block_trimming(name: str) -> None:
    """Not every program that runs templates sets trim_blocks and lstrip_blocks."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    plain = jinja2.Environment(trim_blocks=False)
    plain.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    items = [{"role": "user", "content": text} for text in TEXTS[:1]]
    template = plain.from_string(template_of(name) or "")
    given = {"messages": items, "add_generation_prompt": True, "raise_exception": refuse}
    old = family_of(name) == "llama2"
    text = template.render(
        **given, bos_token="<s>" if old else "<|begin_of_text|>", eos_token="</s>" if old else "<|end_of_text|>"
    )
    assert text == written(name, items)


def test_no_template_where_there_is_no_conversation() -> None:
    assert template_of("base") is None
    assert template_of("unheard of") is None
    assert named_in("{{ bos_token }}") is None
