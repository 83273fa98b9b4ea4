"""Choices of one request on their way to a reader: with a small model, against `LLM.generate`, and event by event."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from herd.chat.base import BaseFormat
from herd.chat.format import Delta
from herd.chat.model import Usage
from herd.chat.params import SamplingParams
from herd.engine.choices import ChoicesSink, ChoiceStep
from herd.engine.completion import TokenLogprob
from herd.engine.llm import LLM
from herd.engine.reply import ReplyBuilder
from herd.engine.request import Request, TokenEvent
from herd.errors import ConfigError, HerdError
from tests.build import build
from tests.cli.tiny import tiny_config, tokenizer

MODEL = build(tiny_config())
PROMPT = (256, *b"Once upon")


class Reader:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[ChoiceStep] = []
        self.prompt: list[TokenLogprob | None] = []
        self.usage: Usage | None = None
        self.error: BaseException | None = None
        self.over = threading.Event()

    def scored(self, tokens: Sequence[TokenLogprob | None]) -> None:
        self.prompt = list(tokens)

    def step(self, step: ChoiceStep) -> None:
        self.steps.append(step)

    def finished(self, usage: Usage) -> None:
        self.usage = usage
        self.over.set()

    def failed(self, error: BaseException) -> None:
        self.error = error
        self.over.set()

    def text(self, index: int) -> str:
        return "".join(d.text or "" for s in self.steps if s.index == index for d in s.deltas)

    def tokens(self, index: int) -> list[TokenLogprob]:
        return [token for s in self.steps if s.index == index for token in s.tokens]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM((MODEL, tokenizer())) as made:
        yield made


def run(llm: LLM, params: SamplingParams, id: str) -> Reader:
    base = BaseFormat(llm.tokenizer)
    request = Request(id, PROMPT, params, base.stop_ids)
    reader = Reader()
    builders = [ReplyBuilder(base.parser(), params, base.stop_ids) for _ in range(request.width)]
    llm.begin(request, ChoicesSink(request, builders, reader, llm.tokenizer.bytes_of))
    assert reader.over.wait(30)
    return reader


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n=3, seed=1, max_tokens=12, logprobs=2, temperature=1),
        SamplingParams(n=2, best_of=4, seed=1, max_tokens=12, logprobs=0, temperature=1),
        SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1, logprobs=1),
    ],
    ids=["n", "best_of", "prompt"],
)
def test_the_same_as_completions(llm: LLM, params: SamplingParams) -> None:
    reader = run(llm, params, f"same {params.n}{params.best_of}")
    (completion,) = llm.generate([PROMPT], params)
    for output in completion.outputs:
        assert reader.text(output.index if params.best_of is None else completion.outputs.index(output)) == output.text
    for place, output in enumerate(completion.outputs):
        assert output.logprobs is not None
        stops = BaseFormat(llm.tokenizer).stop_ids
        assert [t.token for t in reader.tokens(place)] == [t.token for t in output.logprobs if t.token not in stops]
        assert [t.logprob for t in reader.tokens(place)] == [t.logprob for t in output.logprobs if t.token not in stops]
        ends = [s for s in reader.steps if s.index == place and s.finish]
        assert [s.finish for s in ends] == [output.finish_reason]
        assert ends[0].made == len(output.tokens)
    assert reader.usage is not None
    assert reader.usage.prompt_tokens == len(PROMPT)
    if params.prompt_logprobs is not None:
        assert reader.prompt == completion.prompt_logprobs


def test_a_request_that_cannot_run_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError):
        run(llm, SamplingParams(logit_bias={10**6: 1}), "refused")


# ---- event by event ------------------------------------------------------------------------------------------------


def sink(params: SamplingParams, *, max_calls: int | None = None, tools: bool = False) -> tuple[ChoicesSink, Reader]:
    from herd.chat.format import ToolSpec
    from herd.chat.formats import format_named

    format = format_named("llama3.1", tokenizer())
    parser = format.parser((ToolSpec("f"), ToolSpec("g")) if tools else ())
    request = Request("1", PROMPT, params, format.stop_ids)
    reader = Reader()
    builder = ReplyBuilder(parser, params, format.stop_ids, max_calls=max_calls)
    return ChoicesSink(request, [builder], reader, tokenizer().bytes_of), reader


def say(to: ChoicesSink, text: str) -> bool:
    """Push a text byte by byte; whether the reply is complete for its reader."""
    said = [to.push(TokenEvent("1", 0, byte, -1.0)) for byte in text.encode()]
    return any(said)


def test_held_back_text_brings_its_tokens_later() -> None:
    made, reader = sink(SamplingParams(stop=("END",), logprobs=0))
    say(made, "abE")
    assert reader.text(0) == "ab"
    assert len(reader.tokens(0)) == 2
    say(made, "x")
    assert (reader.text(0), len(reader.tokens(0))) == ("abEx", 4)
    assert say(made, "END")
    made.push(TokenEvent("1", 0, finish="abort"))
    assert (reader.text(0), len(reader.tokens(0))) == ("abEx", 4), "the tokens of the stop string are not told"
    assert (reader.steps[-1].finish, reader.steps[-1].stop) == ("stop", "END")


def test_at_most_one_call_ends_the_reply() -> None:
    made, reader = sink(SamplingParams(), max_calls=1, tools=True)
    assert not say(made, '{"name": "f", "parameters": {"a": 1')
    assert say(made, '}}; {"name": "g", "parameters": {}}')
    made.push(TokenEvent("1", 0, finish="abort"))
    calls = [d.tool_call.name for s in reader.steps for d in s.deltas if d.tool_call]
    assert calls == ["f"]
    assert reader.steps[-1].finish == "stop"
    made, reader = sink(SamplingParams(), tools=True)
    say(made, '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}')
    made.push(TokenEvent("1", 0, finish="length"))
    assert [d.tool_call.name for s in reader.steps for d in s.deltas if d.tool_call] == ["f", "g"]


def test_errors_keep_their_kind_and_come_once() -> None:
    made, reader = sink(SamplingParams())
    made.push(TokenEvent("1", 0, finish="error", error="no way on", kind="ConfigError"))
    assert isinstance(reader.error, ConfigError)
    first = reader.error
    made.fail(HerdError("again"))
    assert reader.error is first
    assert not made.push(TokenEvent("1", 0, 65))
    made, reader = sink(SamplingParams())
    made.push(TokenEvent("1", 0, finish="error", error="KeyError: 'x'", kind="KeyError"))
    assert type(reader.error) is HerdError


def test_deltas_are_what_the_parser_gives() -> None:
    made, reader = sink(SamplingParams())
    say(made, "Hi")
    assert [s.deltas for s in reader.steps] == [(Delta(text="H"),), (Delta(text="i"),)]
