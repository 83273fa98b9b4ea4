"""Formats by name, and which one a tokenizer belongs to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from herd.chat.base import BaseFormat
from herd.chat.formats import FORMATS, detect, format_named
from herd.chat.llama3 import Llama3Format
from herd.chat.llama4 import Llama4Format
from herd.chat.messages import Message
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Family, SpecialTokens
from tests.vocabularies import llama3, llama4


def double(family: Family, *names: str, template: str | None = None, chat_format: str | None = None) -> Any:
    """A tokenizer of characters with the special tokens asked for."""
    ids = {name: 0x110000 + i for i, name in enumerate(names)}
    special = SpecialTokens(bos=0x11FFFE, eos=0x11FFFF, stop=frozenset({0x11FFFF}), ids=ids)
    return SimpleNamespace(
        family=family,
        special=special,
        template=template,
        chat_format=chat_format,
        encode=lambda text, **_: [ord(c) for c in text],
        decode=lambda ids, **_: "".join(map(chr, ids)),
        bytes_of=lambda id: chr(id).encode() if id < 0x110000 else b"",
    )


def any_tokenizer(name: str) -> Any:
    three = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    four = ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|python_start|>", "<|python_end|>")
    if name == "codellama-70b":
        return double("codellama", "<step>")
    return double("llama4", *three, *four)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_built_by_its_name(name: str) -> None:
    format = format_named(name, any_tokenizer(name))
    assert format.name == name
    assert format.stop_ids
    if name != "base":
        assert format.render([Message("user", "x")]).tokens[0] == 0x11FFFE
    assert detect(any_tokenizer(name).__class__(**(vars(any_tokenizer(name)) | {"chat_format": name}))).name == name


def test_options_of_a_format() -> None:
    format = format_named("llama3.1", any_tokenizer("llama3.1"), dialect="pythonic")
    assert isinstance(format, Llama3Format)
    assert format.dialect is not None
    assert format.dialect.name == "pythonic"
    with pytest.raises(
        PromptError, match=r"the llama3\.1 format has no option 'policy'; it has dialect, strip_content"
    ):
        format_named("llama3.1", any_tokenizer("llama3.1"), policy="own")
    with pytest.raises(PromptError, match="the codellama format has no option 'code'; it has none"):
        format_named("codellama", any_tokenizer("codellama"), code=False)


def test_the_template_forms_have_names() -> None:
    conversation = [Message("system", " S "), Message("user", " x "), Message("assistant", "a"), Message("tool", "1")]
    three = format_named("llama3.1-hf", llama3(), date="21 Nov 2026")
    assert three.render(conversation) == Llama3Format.as_hf(llama3(), date="21 Nov 2026").render(conversation)
    four = format_named("llama4-hf", llama4())
    assert four.render(conversation) == Llama4Format.as_hf(llama4()).render(conversation)
    shown = llama3().decode(format_named("llama3-hf", llama3()).render(conversation[:2]).tokens, skip_special=False)
    assert shown == (  # the template of Llama 3 strips, and adds nothing
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


GUARD = "<BEGIN UNSAFE CONTENT CATEGORIES>"
THREE = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
HEADER = "<|start_header_id|>"


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (double("llama3", *THREE, template=f"{HEADER} {{{{ messages }}}}"), "llama3"),
        (double("llama3", *THREE, template=f"{HEADER} ipython 26 Jul 2024"), "llama3.1"),
        (double("llama3", *THREE, template=f"{HEADER} ipython strftime_now"), "llama3.2"),
        (double("llama3", *THREE, template=f"{HEADER} {GUARD} S5: Specialized Advice."), "llama-guard-2"),
        (double("llama3", *THREE, template=f"[INST] {GUARD} S5: Specialized Advice."), "llama-guard-2"),
        (double("llama3", *THREE, template=f"{HEADER} {GUARD} S5: Defamation."), "llama-guard-3"),
        (double("llama3", *THREE, template=f"{HEADER} {GUARD} Defamation. excluded_category_keys"), "llama-guard-3-1b"),
        (double("llama4", "<|header_start|>", "<|header_end|>", "<|eot|>", template="<|header_start|>"), "llama4"),
        (
            double("llama4", "<|header_start|>", "<|header_end|>", "<|eot|>", template=f"<|header_start|> {GUARD}"),
            "llama-guard-4",
        ),
        (double("llama2", template="[INST] <<SYS>>"), "llama2"),
        (double("llama2", template=f"[INST] {GUARD}"), "llama-guard-1"),
        (double("codellama", template="[INST] <<SYS>>"), "codellama"),
        (
            double("codellama", "<step>", template="'Source: ' + message['role'] + ' Destination: user'"),
            "codellama-70b",
        ),
        (double("codellama", "<step>", template="[INST]"), "codellama"),
        (double("llama3"), "base"),
        (double("llama2", template=""), "base"),
        (double("llama3", *THREE, template="[INST]", chat_format="llama3.3"), "llama3.3"),
    ],
)
def test_detection(tokenizer: Any, name: str) -> None:
    assert detect(tokenizer).name == name


def test_foreign_templates_are_refused_by_name() -> None:
    for tokenizer in (double("llama3", template="<|im_start|>"), double("llama3", template="[INST] {{ x }}")):
        with pytest.raises(PromptError, match=r"--format.*llama3\.1"):
            detect(tokenizer)
    with pytest.raises(PromptError, match=r"no prompt format 'chatml'.*base, llama2"):
        detect(double("llama3", chat_format="chatml"))
    with pytest.raises(PromptError, match="needs the special token"):
        detect(double("llama2", chat_format="llama3.1"))


def test_metas_own_files_do_not_say_whether_they_chat() -> None:
    assert isinstance(detect(llama3()), BaseFormat)


def test_base_models_refuse_messages_and_name_the_way_out() -> None:
    base = BaseFormat(llama3())
    with pytest.raises(PromptError, match=r"base model.*--format"):
        base.render([Message("user", "hi")])
    rendered = base.complete("Once upon <|eot_id|>")
    assert rendered.tokens == [llama3().special.bos, *llama3().encode("Once upon <|eot_id|>")]
    assert not any(rendered.loss_mask)
