"""Tool descriptions: from functions, from what APIs send, and what is wrong with bad ones."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

import pytest

from herd.chat.format import ToolSpec
from herd.chat.llama3 import Llama3Format
from herd.chat.llama4 import Llama4Format
from herd.chat.messages import Message
from herd.chat.toolspec import BUILTIN_TOOLS, check_tools, is_builtin, tool_from_function, tools_from
from herd.errors import PromptError
from tests.vocabularies import llama3, llama4


class Unit(Enum):
    C = "celsius"
    F = "fahrenheit"


def forecast(
    city: str,
    days: int = 3,
    unit: Unit = Unit.C,
    detail: Literal["short", "long"] = "short",
    tags: list[str] | None = None,
    weights: dict[str, float] | None = None,
    limit: int | str = 1,
    place: Annotated[str, "Where exactly."] = "centre",
    anything: Any = None,
) -> str:
    """Forecast the weather
    for a city.

    A second paragraph that no model needs.

    Args:
        city: Name of the city,
            with its country.
        days (int): How many days.

    Returns:
        The forecast.
    """
    return city


def test_spec_of_a_function() -> None:
    spec = tool_from_function(forecast)
    assert (spec.name, spec.description) == ("forecast", "Forecast the weather for a city.")
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Name of the city, with its country."},
            "days": {"type": "integer", "description": "How many days.", "default": 3},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "detail": {"type": "string", "enum": ["short", "long"], "default": "short"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "weights": {"type": "object", "additionalProperties": {"type": "number"}},
            "limit": {"anyOf": [{"type": "integer"}, {"type": "string"}], "default": 1},
            "place": {"type": "string", "description": "Where exactly.", "default": "centre"},
            "anything": {},
        },
        "required": ["city"],
    }


def test_spec_of_a_method_and_of_a_function_without_words() -> None:
    class Box:
        def open(self, *, force: bool) -> None: ...

    spec = tool_from_function(Box().open)
    assert spec == ToolSpec(
        "open", "", {"type": "object", "properties": {"force": {"type": "boolean"}}, "required": ["force"]}
    )


def test_args_directly_behind_the_summary() -> None:
    def f(a: str) -> None:
        """Do it.
        Args:
            a: This.
        """

    spec = tool_from_function(f)
    assert spec.description == "Do it."
    assert spec.parameters is not None
    assert spec.parameters["properties"]["a"]["description"] == "This."


def _untyped(a): ...  # type: ignore[no-untyped-def]
def _starred(*a: int) -> None: ...
def _positional(a: int, /) -> None: ...
def _strange(a: set[int]) -> None: ...
def _mixed(a: Literal["x", b"y"]) -> None: ...
def _unresolved(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (_untyped, "'a' has no type hint"),
        (_starred, "cannot be called by name"),
        (_positional, "cannot be called by name"),
        (_strange, "JSON Schema cannot say"),
        (_mixed, "choices must be"),
        (_unresolved, "cannot be resolved"),
    ],
)
def test_functions_that_cannot_be_described(function: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        tool_from_function(function)


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def test_tools_in_every_shape() -> None:
    spec = ToolSpec("f", "d", SCHEMA)
    inner = {"name": "f", "description": "d", "parameters": SCHEMA}
    for tool in (
        spec,
        inner,
        {"type": "function", "function": inner},
        {"type": "function", "function": inner | {"strict": True}},
    ):
        assert tools_from([tool]) == (spec,)
    assert tools_from(["brave_search", forecast])[0] == BUILTIN_TOOLS["brave_search"]
    assert tools_from([{"name": "f"}]) == (ToolSpec("f"),)
    assert tools_from([]) == ()


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        (["google"], "tool 0: 'google' is not built in"),
        ([5], "tool 0 is a int"),
        ([{"type": "retrieval"}], "tool 0: expected"),
        ([{"type": "function", "function": "f"}], "tool 0: expected"),
        ([{"description": "d"}], "tool 0: name and description"),
        ([{"name": "f", "parameters": "none"}], "parameters is not"),
        ([ToolSpec("f"), ToolSpec("f")], "tool 1 .*given twice"),
        ([ToolSpec("bad name")], "tool 0 .'bad name'"),
        ([ToolSpec("")], "a name has 1 to 64"),
        ([ToolSpec("a" * 65)], "a name has 1 to 64"),
        ([ToolSpec("a.")], "a name has 1 to 64"),
        ([ToolSpec("f", parameters={"type": "array"})], "type 'array'"),
        ([ToolSpec("f", parameters={"properties": [1]})], "properties is a list"),
        ([ToolSpec("f", parameters={"properties": {"a": 1}})], "properties.a is not"),
        ([ToolSpec("f", parameters={"properties": {}, "required": "a"})], "required is not a list"),
        ([ToolSpec("f", parameters={"properties": {}, "required": ["a"]})], "required names 'a'"),
    ],
)
def test_bad_tools_are_named(tools: list[Any], complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        tools_from(tools)


def test_check_tools_takes_specs_only() -> None:
    with pytest.raises(PromptError, match="expected a ToolSpec"):
        check_tools([{"name": "f"}])  # type: ignore[list-item]


def test_what_is_built_in() -> None:
    assert is_builtin(ToolSpec("brave_search"))
    assert is_builtin(BUILTIN_TOOLS["code_interpreter"])
    assert not is_builtin(ToolSpec("brave_search", "mine", SCHEMA))
    assert not is_builtin(ToolSpec("f"))


def test_tools_that_need_a_user_message_say_so() -> None:
    spec = ToolSpec("f", "d", SCHEMA)
    for dialect in ("json", "meta_json", "function_tag", "pythonic_user", "pythonic_user_3.3"):
        with pytest.raises(PromptError, match="there is none"):
            Llama3Format(llama3(), dialect=dialect).render([Message("system", "x")], [spec])
    bad = ToolSpec("f", "d", {"type": "object", "properties": {"a": {"default": object()}}})
    with pytest.raises(PromptError, match="not a JSON value"):
        Llama3Format(llama3()).render([Message("user", "x")], [bad])


def test_builtin_tools_and_system_texts() -> None:
    format = Llama3Format(llama3())

    def system(messages: list[Message], *tools: str) -> str:
        shown = llama3().decode(format.render(messages, tools_from(tools)).tokens, skip_special=False)
        return shown.split("<|eot_id|>")[0].removeprefix(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        )

    user = Message("user", "x")
    assert system([user], "code_interpreter") == "Environment: ipython"
    assert system([user], "brave_search") == "Environment: ipython\nTools: brave_search"
    assert system([Message("system", "S"), user], "wolfram_alpha", "code_interpreter") == (
        "Environment: ipython\nTools: wolfram_alpha\n\nS"
    )
    assert system([Message("system", ""), user], "code_interpreter") == "Environment: ipython"


def test_llama4_describes_every_tool_as_a_function() -> None:
    shown = llama4().decode(Llama4Format(llama4()).render([Message("user", "x")], tools_from(["brave_search"])).tokens)
    assert '"name": "brave_search"' in shown
    assert "- Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]\n" in shown
    assert "Environment" not in shown
