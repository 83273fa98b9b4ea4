"""From calls to requests: truncation that is asked for, going on with a message, options of formats, promised calls."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from herd.chat.format import ChatFormat
from herd.chat.formats import format_named
from herd.chat.params import Constraint, SamplingParams
from herd.errors import ConfigError, ContextFullError, HerdError, PromptError
from herd.server.prepare import Preparer, conversation
from herd.server.protocol import Call, Chat, Ids, Text
from herd.tokenizer.tokenizer import Tokenizer
from tests.cli.tiny import infill_tokenizer, tokenizer

TOOLS = (
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    },
    {"type": "function", "function": {"name": "g", "strict": True}},
)


@dataclass
class Model:
    """What a Preparer needs of a model; bytes are tokens."""

    tokenizer: Tokenizer = field(default_factory=tokenizer)
    max_len: int = 400
    name: str = "llama3.1"
    compiled: list[Constraint] = field(default_factory=list)

    @property
    def format(self) -> ChatFormat:
        return format_named(self.name, self.tokenizer)

    def room(self, adapter: str | None = None) -> int:
        return self.max_len if adapter is None else self.max_len - 100

    def params(self, **chosen: Any) -> SamplingParams:
        return SamplingParams(**chosen)

    def compile(self, constraint: Constraint) -> None:
        if "refuse me" in constraint.text:
            raise ConfigError("schema at /x: no")
        self.compiled.append(constraint)


def turns(count: int, size: int = 40) -> tuple[dict[str, str], ...]:
    """A system message and so many exchanges, the last one open."""
    out = [{"role": "system", "content": "Be kind."}]
    for i in range(count):
        out += [
            {"role": "user", "content": f"{i} " + "x" * size},
            {"role": "assistant", "content": f"{i} " + "y" * size},
        ]
    return tuple(out[:-1])


def text_of(model: Model, ids: tuple[int, ...]) -> str:
    return model.tokenizer.decode(list(ids), skip_special=False)


def test_nothing_is_left_out_unless_asked() -> None:
    model = Model()
    prepared = Preparer(model).prepared(Call("1", Chat(turns(20))))
    assert prepared.truncated is None
    assert len(prepared.request.prompt) > model.max_len, "the engine refuses it, with the counts"


def test_the_oldest_turns_are_left_out_when_asked() -> None:
    model = Model()
    prepared = Preparer(model).prepared(Call("1", Chat(turns(20), truncate=True), {"max_tokens": 50}))
    text = text_of(model, prepared.request.prompt)
    assert prepared.truncated is not None
    assert "Be kind." in text
    assert "19 xxx" in text
    assert "0 xxx" not in text.replace("10 xxx", "")
    assert len(prepared.request.prompt) + 50 <= model.max_len
    assert prepared.truncated.dropped_messages % 2 == 0
    whole = Preparer(model).prepared(Call("1", Chat(turns(20)))).request.prompt
    assert prepared.truncated.dropped_tokens == len(whole) - len(prepared.request.prompt)
    short = Preparer(model).prepared(Call("1", Chat(turns(2), truncate=True)))
    assert short.truncated is None, "what fits is left alone"
    less = Preparer(model).prepared(Call("1", Chat(turns(20), truncate=True), {"max_tokens": 50}, adapter="virtual"))
    assert len(less.request.prompt) + 50 <= model.max_len - 100, "an adapter's virtual tokens take their part"


def test_what_can_never_be_left_out() -> None:
    messages = ({"role": "system", "content": "s" * 390}, *turns(3)[1:])
    with pytest.raises(ContextFullError, match="system messages"):
        Preparer(Model()).prepared(Call("1", Chat(messages, truncate=True)))


def test_going_on_with_a_message() -> None:
    model = Model()
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon"})
    prepared = Preparer(model).prepared(Call("1", Chat(messages, continue_final=True)))
    assert text_of(model, prepared.request.prompt).endswith("Once upon")
    with pytest.raises(PromptError, match="assistant"):
        Preparer(model).prepared(Call("1", Chat(messages[:1], continue_final=True)))
    closed = Preparer(model).prepared(Call("1", Chat(messages, generation_prompt=False)))
    assert text_of(model, closed.request.prompt).endswith("Once upon<|eot_id|>")


def test_options_of_formats() -> None:
    model = Model(name="llama3.1-hf")
    chat = Chat(({"role": "user", "content": "Hi"},), format_options={"date": "1 Apr 2030"})
    assert "1 Apr 2030" in text_of(model, Preparer(model).prepared(Call("1", chat)).request.prompt)
    with pytest.raises(PromptError, match="tokenize"):
        Preparer(model).prepared(Call("1", Chat(chat.messages, format_options={"tokenize": True})))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama3.1", {"dialect": []}),
        ("llama3.1", {"dialect": "klingon"}),
        ("llama3.1", {"date": 5}),
        ("llama3.1-hf", {"date": None}),
        ("llama3.1", {"strip_content": "no"}),
        ("llama3.1", {"preamble": 1}),
        ("llama-guard-3", {"exclude": "S1"}),
        ("llama-guard-3", {"exclude": [1]}),
        ("llama-guard-3", {"categories": {"S1": 1}}),
        ("llama-guard-3", {"policy": []}),
    ],
)
def test_options_of_formats_are_of_their_types(name: str, options: dict[str, Any]) -> None:
    chat = Chat(({"role": "user", "content": "Hi"},), format_options=options)
    with pytest.raises(PromptError, match=next(iter(options)) if "klingon" not in options.values() else "klingon"):
        Preparer(Model(name=name)).prepared(Call("1", chat))


@pytest.mark.parametrize("name", ["llama3.1", "llama3.2"])
def test_promised_calls(name: str) -> None:
    model = Model(name=name)
    ask = ({"role": "user", "content": "Hi"},)

    def params(**chat: Any) -> SamplingParams:
        return Preparer(model).prepared(Call("1", Chat(ask, **chat))).request.params

    assert params(tools=TOOLS[:1]).constraint is None, "auto: the model decides, and how it writes is its own"
    assert params(tools=TOOLS, tool_choice="none").constraint is None
    for chat in ({"tool_choice": "required"}, {"tool_choice": "named", "tool_name": "g"}, {}):
        grammar = params(tools=TOOLS, **chat).grammar  # type: ignore[arg-type]
        assert grammar is not None
        assert "g" in grammar
        assert ("%json" in grammar and '"integer"' in grammar) == (chat != {"tool_choice": "named", "tool_name": "g"})
    builder = Preparer(model).prepared(Call("1", Chat(ask, tools=TOOLS, parallel=False))).builders[0]
    assert not builder.done
    for wrong, said in (
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": TOOLS, "tool_choice": "named", "tool_name": "h"}, "'h'"),
        ({"tools": ({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": "refuse me"}}},),
          "tool_choice": "required"}, "tool 'f'"),
    ):  # fmt: skip
        with pytest.raises(HerdError, match=said):
            params(**wrong)


def test_a_form_beside_tools() -> None:
    chat = Chat(({"role": "user", "content": "Hi"},), tools=TOOLS)
    schema = {"type": "object", "properties": {"k": {"type": "integer"}}}
    for sampling in ({"schema": schema}, {"schema": json.dumps(schema)}, {"json_object": True}):
        params = Preparer(Model()).prepared(Call("1", chat, sampling)).request.params
        assert params.constraint is not None
        assert params.constraint.kind == "grammar"
    with pytest.raises(PromptError, match="regex"):
        Preparer(Model()).prepared(Call("1", chat, {"regex": "a"}))


def test_texts_ids_and_middles() -> None:
    model = Model()
    assert Preparer(model).prepared(Call("1", Text("ab"), echo=True)).prompt_text == "ab"
    assert Preparer(model).prepared(Call("1", Ids((65, 66)))).request.prompt == (65, 66)
    with pytest.raises(PromptError, match="Code Llama"):
        Preparer(model).prepared(Call("1", Text("a", "b")))
    code = Model(tokenizer=infill_tokenizer())
    prepared = Preparer(code).prepared(Call("1", Text("a", "b")))
    assert len(prepared.request.stop_ids) == 2


def test_images_and_empty_conversations_are_refused() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(PromptError, match="image"):
        Preparer(Model()).prepared(Call("1", Chat(({"role": "user", "content": [part]},))))
    with pytest.raises(PromptError):
        Preparer(Model()).prepared(Call("1", Chat(())))


def called(*ids: str | None) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}"}
    calls = [{"type": "function", "function": function} | ({} if id is None else {"id": id}) for id in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(text: str, id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({} if id is None else {"tool_call_id": id})


ASK = {"role": "user", "content": "Both, please."}


def test_results_stand_in_the_order_of_their_calls() -> None:
    """Formats have no place for ids: a result that came second would be read as that of the second call."""
    straight = [ASK, called("a", "b", "c"), result("of a", "a"), result("of b", "b"), result("of c", "c"), ASK]
    swapped = [*straight[:2], straight[4], straight[2], straight[3], ASK]
    preparer = Preparer(Model())
    prompts = [preparer.prepared(Call("x", Chat(tuple(one), TOOLS))).request.prompt for one in (straight, swapped)]
    assert prompts[0] == prompts[1]
    assert preparer.count(Chat(tuple(swapped), TOOLS)) == len(prompts[0])
    said = [one.text for one in conversation([*swapped, called("a"), result("again", "a")])]
    assert said[2:5] == ["of a", "of b", "of c"]
    assert said[-1] == "again"
    said = [one.text for one in conversation([ASK, called("a"), called("b"), result("of b", "b"), result("of a", "a")])]
    assert said[3:] == ["of a", "of b"], "a turn of two messages"


def test_a_result_of_no_call_is_refused() -> None:
    for wrong in (
        [ASK, called("a"), result("x", "b")],
        [ASK, called("a"), result("x", "a"), ASK, called("b"), result("y", "a")],
    ):
        with pytest.raises(PromptError, match="tool_call_id: no call of the turn before"):
            conversation(wrong)
    for fine in ([ASK, called(None), result("x", "b")], [ASK, called("a", "b"), result("x"), result("y", "a")]):
        assert [one.text for one in conversation(fine)][2] == "x"


def test_stop_ids_that_no_token_has_are_refused() -> None:
    preparer = Preparer(Model())
    last = tokenizer().vocab_size - 1
    assert last in preparer.prepared(Call("x", Text("Hi"), {"stop_ids": [5, last]})).request.params.stop_ids
    with pytest.raises(ConfigError, match="stop_token_ids"):
        preparer.prepared(Call("x", Text("Hi"), {"stop_ids": [5, last + 1]}))
