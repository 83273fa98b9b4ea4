"""Modelfiles: what is read, and what is refused with its line."""

from __future__ import annotations

import pytest

from herd.errors import ConfigError
from herd.hub.modelfile import parse

WHOLE = '''\ufeff# a comment
from ./weights.gguf
PARAMETER temperature 0.5
PARAMETER stop "<|eot|>"
PARAMETER STOP END
parameter num_predict -1
PARAMETER repeat_penalty 1.1
PARAMETER repeat_last_n -1
PARAMETER num_ctx 4096

SYSTEM """Two lines:
  # the second is no comment
"""
MESSAGE user Who wrote "Emma"?
MESSAGE assistant """Jane Austen,
in 1815."""
LICENSE MIT
LICENSE "second\\none"
TEMPLATE llama3.1
ADAPTER lora
REQUIRES 0.6.0
'''


def test_everything_at_once() -> None:
    found = parse(WHOLE)
    assert found.base == "./weights.gguf"
    assert found.params == {
        "temperature": 0.5,
        "stop": ("<|eot|>", "END"),
        "max_tokens": None,
        "repetition_penalty": 1.1,
    }
    assert (found.context, found.template, found.adapter, found.requires) == (4096, "llama3.1", "lora", "0.6.0")
    assert found.system == "Two lines:\n  # the second is no comment\n"
    assert found.messages == (("user", 'Who wrote "Emma"?'), ("assistant", "Jane Austen,\nin 1815."))
    assert found.licenses == ("MIT", "second\none")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("FORM x", 1, "did you mean FROM"),
        ("FROM x\nFROM y", 2, "a second FROM"),
        ("FROM x\n\nPARAMETER temprature 1", 3, "did you mean temperature"),
        ("FROM x\nPARAMETER temperature warm", 2, "expected a number"),
        ("FROM x\nPARAMETER top_k 1.5", 2, "expected an integer"),
        ("FROM x\nPARAMETER temperature", 2, "no value"),
        ("FROM x\nPARAMETER num_ctx 0", 2, "positive"),
        ("FROM x\nPARAMETER mirostat 2", 2, "use top_p or min_p"),
        ("FROM x\nPARAMETER repeat_last_n 64", 2, "whole text"),
        ("FROM x\nSYSTEM", 2, "no value"),
        ("FROM x\nMESSAGE robot hi", 2, "user, assistant"),
        ("FROM x\nMESSAGE user", 2, "a text"),
        ('FROM x\nSYSTEM """never\nends', 2, "never ends"),
        ('FROM x\nSYSTEM """ends""" and more', 2, "behind"),
        ('FROM x\nSYSTEM "open', 2, "quote"),
    ],
)
def test_refusals_name_the_line(text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError, match=f"line {line}: .*{words}"):
        parse(text)


def test_a_file_without_a_base() -> None:
    with pytest.raises(ConfigError, match="no FROM"):
        parse("SYSTEM hello")
