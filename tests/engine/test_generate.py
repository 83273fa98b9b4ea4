"""`generate` and what it makes of its arguments: text, messages, formats by name, tools, and a middle between two texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from herd.chat.formats import format_named
from herd.chat.guard import GuardFormat
from herd.chat.infill import Infill, InfillOrder
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.chat.toolspec import tools_from
from herd.engine.local import LocalChat, generate
from herd.engine.session import Session
from herd.errors import PromptError
from herd.model.llama import Llama
from tests.build import build
from tests.cli.tiny import infill_config, infill_tokenizer, tiny_config, tokenizer

HI = [Message("user", "Hi")]
GREEDY = SamplingParams(temperature=0, max_tokens=10)


@pytest.fixture(scope="module")
def model() -> Llama:
    return build(tiny_config(1024))


@pytest.mark.parametrize("prompt", ["Once upon", HI])
def test_generate_is_one_reply(model: Llama, prompt: str | list[Message]) -> None:
    reply = generate(model, tokenizer(), prompt, GREEDY)
    assert 0 < len(reply.tokens) <= 10
    assert generate(model, tokenizer(), prompt, GREEDY).tokens == reply.tokens
    assert not torch.is_inference_mode_enabled()


def test_messages_may_be_dictionaries_and_tools_functions(model: Llama) -> None:
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    found = tokenizer()
    found.chat_format = "llama3.1"
    plain = generate(model, found, [{"role": "user", "content": "Hi"}], GREEDY)
    assert plain.tokens == generate(model, found, HI, GREEDY).tokens
    with_tool = generate(model, found, [{"role": "user", "content": "Hi"}], GREEDY, tools=[add])
    assert with_tool.usage.prompt_tokens > plain.usage.prompt_tokens + 100


def test_a_format_may_be_an_object_a_name_or_a_name_with_its_tokenizer(model: Llama) -> None:
    found = tokenizer()
    assert found.chat_format == "llama3"
    wanted = len(format_named("llama3.1", found).render(HI, tools_from(["brave_search"])).tokens)
    for format in (format_named("llama3.1", found), "llama3.1", ("llama3.1", found)):
        reply = generate(model, found, HI, GREEDY, format=format, tools=["brave_search"])
        assert reply.usage.prompt_tokens == wanted
        assert LocalChat(model, found, format=format).format.name == "llama3.1"
    with pytest.raises(PromptError, match="no prompt format 'klingon'"):
        generate(model, tokenizer(), HI, GREEDY, format="klingon")


def test_what_has_no_meaning_with_a_text_is_refused(model: Llama) -> None:
    with pytest.raises(PromptError, match="without tools: give a list of messages"):
        generate(model, tokenizer(), "Hi", GREEDY, tools=["brave_search"])
    with pytest.raises(PromptError, match="without a format: give a list of messages"):
        generate(model, tokenizer(), "Hi", GREEDY, format="llama3")
    with pytest.raises(PromptError, match="not messages"):
        generate(model, tokenizer(), HI, GREEDY, suffix="there")
    with pytest.raises(PromptError, match="give a suffix"):
        generate(model, tokenizer(), "Hi", GREEDY, order="spm")


def test_notes_of_the_prompt_come_with_the_reply(model: Llama) -> None:
    guard = GuardFormat(tokenizer(), "llama-guard-3-1b", categories={"S1": "Bad."}, policy="own")
    reply = generate(model, tokenizer(), HI, GREEDY, format=guard)
    assert reply.notes == guard.render(HI).notes != ()
    assert generate(model, tokenizer(), HI, GREEDY).notes == ()


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_a_middle_is_what_the_model_writes_between_two_texts(order: InfillOrder) -> None:
    coder, found = build(infill_config()), infill_tokenizer()
    infill = Infill(found)
    made = list(Session(coder).generate(infill.prompt("abc ", " fed", order).tokens, GREEDY, infill.stop_ids))
    reply = generate(coder, found, "abc ", GREEDY, suffix=" fed", order=order)
    assert (reply.tokens, reply.text) == (made, infill.middle(made))
    chat = LocalChat(coder, found)
    assert "".join(delta.text or "" for delta in chat.infill("abc ", " fed", GREEDY, order=order)) == reply.text


def test_a_middle_needs_the_infill_pieces_and_their_embeddings(model: Llama) -> None:
    with pytest.raises(PromptError, match="no fill-in-the-middle pieces"):
        generate(model, tokenizer(), "Hi", GREEDY, suffix="there")
    found = infill_tokenizer()
    small = build(replace(infill_config(), vocab_size=found.vocab_size - 4))  # as Code Llama 34B
    with pytest.raises(PromptError, match="no embeddings for them"):
        generate(small, found, "abc", GREEDY, suffix="fed")
