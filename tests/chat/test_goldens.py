"""Prompts kept as files. `tests/golden/llama3_hf.json` holds what the chat template of Llama 3.3 (Hugging Face) wrote for a few
conversations, rendered with jinja2 3.1.6; `Llama3Format.as_hf` must write the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from herd.chat.llama3 import Llama3Format
from herd.chat.render import render
from tests.vocabularies import llama3

CASES = json.loads((Path(__file__).parents[1] / "golden" / "llama3_hf.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_as_hf_writes_what_the_template_wrote(case: dict[str, Any]) -> None:
    tools = [*case["builtin_tools"], *case["tools"]]
    rendered = render(case["messages"], Llama3Format.as_hf(llama3()), tools, generate=True)
    assert llama3().decode(rendered.tokens, skip_special=False) == case["prompt"]


def test_the_date_can_be_given() -> None:
    rendered = render([{"role": "user", "content": "x"}], Llama3Format.as_hf(llama3(), date="21 Nov 2026"))
    assert "Today Date: 21 Nov 2026\n\n<|eot_id|>" in llama3().decode(rendered.tokens, skip_special=False)
