"""Meta's prompt_format.md documents (llama-models package): their prompts are what we render, their replies what we parse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import pytest

from herd.chat.format import ToolSpec
from herd.chat.headers import HeaderFormat
from herd.chat.llama3 import Llama3Format
from herd.chat.llama4 import Llama4Format
from herd.chat.messages import Message, Role, ToolCall
from herd.chat.reply import ReplyParser
from herd.chat.toolspec import BUILTIN_TOOLS
from tests.vocabularies import llama3, llama4

DOCUMENTS = {"3.1": ("llama3_1", "prompt_format.md"), "3.2": ("llama3_2", "text_prompt_format.md")}
_TURN = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)(<\|eot_id\|>|<\|eom_id\|>|\Z)", re.DOTALL)
_PROMPT = "##### Input Prompt Format\n```\n"
_REPLY = "##### Model Response Format\n```\n"


@dataclass(frozen=True)
class Example:
    title: str
    prompt: str
    reply: str


@cache
def examples(version: str) -> dict[str, Example]:
    """The examples of one document by the heading above them."""
    folder, name = DOCUMENTS[version]
    text = (files("llama_models") / folder / name).read_text()
    found: dict[str, Example] = {}
    title = ""
    for block in re.split(r"(?m)^(?=## )", text):
        title = block.split("\n", 1)[0].removeprefix("## ")
        if _PROMPT in block:
            prompt = block.split(_PROMPT)[1].split("\n```", 1)[0]
            reply = block.split(_REPLY)[1].split("\n```", 1)[0]
            found[title] = Example(title, prompt, reply)
    return found


def shown(tokens: list[int]) -> str:
    return llama3().decode(tokens, skip_special=False)


def read(parser: ReplyParser, text: str) -> Message:
    """The message of a reply whose special names are special ids."""
    for id in llama3().encode(text, allow_special=True):
        parser.push(id)
    parser.close()
    return parser.message()


def messages(prompt: str) -> list[Message]:
    """The turns of a document's prompt; assistant turns are read by the parser."""
    found: list[Message] = []
    for header, content, end in _TURN.findall(prompt):
        if header == "assistant":
            if end:
                found.append(read(Llama3Format(llama3()).parser(None), content + end))
            continue
        role: Role = "tool" if header == "ipython" else header
        found.append(Message(role, content))
    return found


CHATS = [
    (version, title)
    for version in DOCUMENTS
    for title, example in examples(version).items()
    if "<|start_header_id|>" in example.prompt
]


def test_the_documents_are_all_read() -> None:
    assert {version: len(examples(version)) for version in DOCUMENTS} == {"3.1": 7, "3.2": 6}
    assert len(CHATS) == 11


@pytest.mark.parametrize(("version", "title"), CHATS)
def test_prompts_are_rendered_as_printed(version: str, title: str) -> None:
    example = examples(version)[title]
    rendered = shown(Llama3Format(llama3(), dialect="pythonic").render(messages(example.prompt)).tokens)
    # The one place where the documents write the tag before a Python list; their other examples do not.
    expected = example.prompt.replace("<|python_tag|>[get_weather", "[get_weather")
    assert rendered == expected


def test_base_prompts() -> None:
    from herd.chat.base import BaseFormat

    for version, title in (("3.1", "Llama 3.1 Base Model"), ("3.2", "Prompt format for base models")):
        prompt = examples(version)[title].prompt
        assert shown(BaseFormat(llama3()).complete(prompt.removeprefix("<|begin_of_text|>")).tokens) == prompt


SONGS = ToolSpec(
    "trending_songs",
    "Returns the trending songs on a Music site",
    {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "description": "The number of songs to return"},
            "genre": {"type": "string", "description": "The genre of the songs to return"},
        },
        "required": ["n"],
    },
)
WEATHER = ToolSpec(
    "get_weather",
    "Get weather info for places",
    {
        "type": "object",
        "required": ["city"],
        "properties": {
            "city": {"type": "string", "description": "The name of the city to get the weather for"},
            "metric": {
                "type": "string",
                "description": "The metric for weather. Options are: celsius, fahrenheit",
                "default": "celsius",
            },
        },
    },
)


@pytest.mark.parametrize(
    ("dialect", "version", "title", "tool"),
    [
        ("meta_json", "3.1", "JSON based tool calling", SONGS),
        ("function_tag", "3.1", "`<function>` based tool calling", SONGS),
        ("pythonic", "3.2", "Zero shot function calling", WEATHER),
        ("pythonic", "3.2", "Zero shot function calling E2E format", WEATHER),
    ],
)
def test_tools_are_described_as_printed(dialect: str, version: str, title: str, tool: ToolSpec) -> None:
    example = examples(version)[title]
    turns = messages(example.prompt)
    # Take the description out of the document's turns, and let the dialect put it back.
    bare = turns[1:] if dialect == "pythonic" else [turns[0], *turns[2:]]
    rendered = shown(Llama3Format(llama3(), dialect=dialect).render(bare, [tool]).tokens)
    assert rendered == example.prompt.replace("<|python_tag|>[get_weather", "[get_weather")


def test_tools_beside_the_question_as_printed_but_for_indentation() -> None:
    example = examples("3.2")["Zero shot function calling with user message"]
    listed = json.loads(example.prompt.split("invoke:\n")[1].split("\n\nShould")[0])
    parameters = listed[0]["parameters"] | {"type": "object"}
    tool = ToolSpec(listed[0]["name"], listed[0]["description"], parameters)
    question = example.prompt.split("Questions: ")[1].split("\nHere is")[0]
    format = Llama3Format(llama3(), dialect="pythonic_user")
    assert shown(format.render([Message("user", question)], [tool]).tokens).split() == example.prompt.split()


@pytest.mark.parametrize(
    "build", [lambda **options: Llama3Format(llama3(), **options), lambda **options: Llama4Format(llama4(), **options)]
)
def test_tools_beside_the_question_end_in_the_words_of_3_3_and_4(build: Callable[..., HeaderFormat]) -> None:
    """prompt_format.md of Llama 3.3 and Llama 4, which the llama-models package does not carry."""
    format = build(dialect="pythonic_user_3.3")
    older = shown(Llama3Format(llama3(), dialect="pythonic_user").render([Message("user", "q")], [WEATHER]).tokens)
    question = older.split("user<|end_header_id|>\n\n")[1].split("Should you")[0]
    rendered = format.tokenizer.decode(format.render([Message("user", "q")], [WEATHER]).tokens, skip_special=False)
    assert (
        f"\n\n{question}Should you decide to return the function call(s), put them in the format of "
        "[func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\n"
        "You SHOULD NOT include any other text in the response.<|eo"
    ) in rendered


def test_builtin_tools_are_switched_on_as_printed() -> None:
    format = Llama3Format(llama3())
    code = examples("3.1")["Builtin Code Interpreter"]
    turns = messages(code.prompt)
    assert shown(format.render(turns[1:], [BUILTIN_TOOLS["code_interpreter"]]).tokens) == code.prompt
    gold = examples("3.1")["Builtin Tool Calling"]
    tools = [BUILTIN_TOOLS["brave_search"], BUILTIN_TOOLS["wolfram_alpha"]]
    rendered = shown(
        format.render([Message("system", "You are a helpful assistant."), messages(gold.prompt)[1]], tools).tokens
    )
    assert rendered.startswith(
        gold.prompt.split("Cutting Knowledge")[0].rstrip("\n") + "\n\nYou are a helpful assistant."
    )


REPLIES: list[tuple[str, str, str, list[ToolCall], str]] = [
    ("3.1", "User and assistant conversation", "", [], "end_of_turn"),
    (
        "3.1",
        "Builtin Tool Calling",
        "",
        [ToolCall("brave_search", {"query": "latest price of 1oz gold"})],
        "end_of_message",
    ),
    ("3.1", "Built-in tools full interaction", "", [], "end_of_turn"),
    ("3.1", "JSON based tool calling", "", [ToolCall("trending_songs", {"n": "10", "genre": "all"})], "end_of_message"),
    ("3.1", "`<function>` based tool calling", "", [ToolCall("trending_songs", {"n": 10})], "end_of_turn"),
    (
        "3.2",
        "Zero shot function calling",
        "",
        [ToolCall("get_weather", {"city": city, "metric": "celsius"}) for city in ("San Francisco", "Seattle")],
        "end_of_turn",
    ),
    (
        "3.2",
        "Zero shot function calling with user message",
        "",
        [ToolCall("get_user_info", {"user_id": 7890, "special": "black"})],
        "end_of_turn",
    ),
]
TOOLS = [SONGS, WEATHER, ToolSpec("get_user_info")]


@pytest.mark.parametrize(("version", "title", "content", "calls", "stop"), REPLIES)
def test_replies_are_parsed(version: str, title: str, content: str, calls: list[ToolCall], stop: Any) -> None:
    reply = examples(version)[title].reply
    message = read(Llama3Format(llama3()).parser(TOOLS), reply)
    assert list(message.tool_calls) == calls
    assert message.stop_reason == stop
    assert message.content == ("" if calls else reply.removesuffix("<|eot_id|>"))


@pytest.mark.parametrize(("version", "title"), [("3.1", "Builtin Code Interpreter"), ("3.2", "Code Interpreter")])
def test_code_is_parsed(version: str, title: str) -> None:
    reply = examples(version)[title].reply
    source = reply.removeprefix("<|python_tag|>").removesuffix("<|eom_id|>")
    message = read(Llama3Format(llama3()).parser(), reply)
    assert message == Message("assistant", "", (ToolCall("code_interpreter", {"code": source}),), "end_of_message")
    assert shown(Llama3Format(llama3()).render([message], generate=False).tokens).endswith(reply)
