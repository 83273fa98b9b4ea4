"""Templates that are known to be broken in the wild, and what lint says about each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from herd.chat.deviations import MEANINGS
from herd.chat.formats import FORMATS
from herd.chat.lint import Report, lint
from herd.chat.lint_cases import CASES
from herd.chat.sandbox import Sandbox
from herd.chat.templates import template_of
from herd.errors import PromptError
from tests.vocabularies import llama3


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(wall_seconds=20) as opened:
        yield opened


GOOD = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""What most checkpoints tuned from Llama 3 carry."""


def of_case(report: Report, case: str) -> tuple[str, tuple[str, ...]]:
    finding = next(finding for finding in report.findings if finding.case == case)
    return finding.status, finding.reasons


def test_the_names_of_cases_and_deviations_are_there() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 30
    assert all(text.endswith((".", "?")) for text in MEANINGS.values())


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "base"])
def test_herds_own_templates_agree_in_every_case(sandbox: Sandbox, name: str) -> None:
    report = lint(template_of(name) or "", sandbox)
    assert report.format == name
    assert report.ok, [finding for finding in report.findings if finding.status != "same"]
    assert report.passed[name] == len(CASES)


def test_a_good_template_of_llama_3_follows_hugging_face(sandbox: Sandbox) -> None:
    report = lint(GOOD, sandbox)
    assert report.format == "llama3-hf"
    assert report.passed["llama3-hf"] > report.passed["llama3"]
    assert of_case(report, "several turns") == ("same", ())
    assert of_case(report, "white space around a question") == ("same", ())
    # It writes tools and calls nowhere, and says nothing.
    assert of_case(report, "a tool") == ("accepted", ("accepts-tools",))
    against_meta = lint(GOOD, sandbox, format="llama3")
    assert of_case(against_meta, "white space around a question") == ("different", ("trimmed",))


BROKEN = {
    # llama-cpp-python #1501 and others: the token is in the template, and written again by the variable
    "double BOS": ("'<|begin_of_text|>' + ", "one question", "different", "double-bos"),
    "no BOS": ("", "one question", "different", "no-bos"),
    "space in front": ("' ' + ", "one question", "different", "before-bos"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_beginning_of_text(sandbox: Sandbox, name: str) -> None:
    front, case, status, reason = BROKEN[name]
    bos = "{{- " + front + "bos_token }}" if front else ""
    report = lint(GOOD.replace("{{- bos_token }}", bos), sandbox)
    assert of_case(report, case) == (status, (reason,))
    assert not report.ok
    assert sum(reason in finding.reasons for finding in report.findings) > 15


def test_a_missing_and_an_unasked_generation_prompt(sandbox: Sandbox) -> None:
    never = GOOD.replace("add_generation_prompt", "false")
    assert of_case(lint(never, sandbox), "several turns") == ("different", ("no-generation-prompt",))
    always = GOOD.replace("if add_generation_prompt", "if true")
    assert of_case(lint(always, sandbox), "finished conversation") == ("different", ("always-generation-prompt",))
    assert of_case(lint(always, sandbox), "several turns") == ("same", ())


def test_a_dropped_and_a_default_system_message(sandbox: Sandbox) -> None:
    dropped = GOOD.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    status, reasons = of_case(lint(dropped, sandbox), "system and question")
    assert (status, reasons) == ("different", ("dropped-system",))
    header = "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nYou are a helpful assistant.<|eot_id|>' }}"
    default = GOOD.replace(
        "{{- bos_token }}", "{{- bos_token }}{%- if messages[0]['role'] != 'system' %}" + header + "{%- endif %}"
    )
    assert of_case(lint(default, sandbox), "one question") == ("different", ("default-system",))
    assert of_case(lint(default, sandbox), "system and question") == ("same", ())


def test_an_empty_list_of_tool_calls(sandbox: Sandbox) -> None:
    """vllm #13978: `'tool_calls' in message` is true for an empty list, and the length is not one."""
    check = (
        "{%- if 'tool_calls' in message %}{%- if message.tool_calls|length != 1 %}{{- raise_exception('one call') }}"
    )
    crash = GOOD.replace("in messages %}", "in messages %}" + check + "{%- endif %}{%- endif %}")
    report = lint(crash, sandbox)
    status, reasons = of_case(report, "empty list of tool calls")
    assert (status, reasons) == ("raised", ("empty-tool-calls",))
    finding = next(finding for finding in report.findings if finding.case == "empty list of tool calls")
    assert "one call" in finding.message
    assert "line 2" in finding.message


def test_text_that_is_not_stripped(sandbox: Sandbox) -> None:
    kept = GOOD.replace(" | trim", "")
    report = lint(kept, sandbox)
    assert report.format == "llama3"  # so it follows Meta
    against_hf = lint(kept, sandbox, format="llama3-hf")
    assert of_case(against_hf, "white space around a reply") == ("different", ("untrimmed",))


def test_dates_tools_and_results(sandbox: Sandbox) -> None:
    """The template of 3.1 against Meta's way of writing."""
    report = lint(template_of("llama3.1-hf") or "", sandbox, format="llama3.1")
    assert of_case(report, "one question") == ("different", ("date-lines",))
    status, reasons = of_case(report, "a call, its result, and more turns")
    assert status == "different"
    assert {"date-lines", "quoted-results"} <= set(reasons)
    back = lint(template_of("llama3.1") or "", sandbox, format="llama3.1-hf")
    assert "no-date-lines" in of_case(back, "one question")[1]
    assert "unquoted-results" in of_case(back, "words and a call")[1]
    other = lint(template_of("llama3.2") or "", sandbox, format="llama3.1")
    assert "tools-elsewhere" in of_case(other, "a tool")[1]
    assert "calls-otherwise" in of_case(other, "a call")[1]
    four = lint(template_of("llama4-hf") or "", sandbox, format="llama4")
    assert "closing" in of_case(four, "a call and its result")[1]


def test_forgotten_tools_and_calls(sandbox: Sandbox) -> None:
    report = lint(GOOD, sandbox, format="llama3.1")
    assert "dropped-tools" in of_case(report, "a tool")[1]
    assert "dropped-calls" in of_case(report, "a call and its result")[1]


def test_roles_that_must_alternate(sandbox: Sandbox) -> None:
    strict = GOOD.replace(
        "in messages %}",
        "in messages %}{%- if message['role'] == 'user' and loop.index0 % 2 %}{{- raise_exception('order') }}{%- endif %}",
    )
    assert of_case(lint(strict, sandbox), "two questions in a row") == ("raised", ("refuses-order",))


def test_content_in_parts(sandbox: Sandbox) -> None:
    printed = GOOD.replace("message['content'] | trim", "(message['content'] | string | trim)")
    assert of_case(lint(printed, sandbox), "parts of text") == ("different", ("no-parts",))


LLAMA2 = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + ' ' + eos_token }}{%- endif %}
{%- endfor %}
"""


def test_a_template_of_llama_2_that_forgets_the_system_text(sandbox: Sandbox) -> None:
    report = lint(LLAMA2, sandbox)
    assert report.format == "llama2"
    assert of_case(report, "several turns") == ("same", ())
    assert of_case(report, "system and question") == ("different", ("dropped-system",))
    assert of_case(report, "special tokens in a question") == ("accepted", ("accepts-tags",))
    assert of_case(report, "two questions in a row") == ("accepted", ("accepts-order",))


def test_special_tokens_that_a_user_can_forge(sandbox: Sandbox) -> None:
    assert lint(GOOD, sandbox).forged == 7  # those of Llama 4 are text for Llama 3
    assert lint(template_of("llama2") or "", sandbox).forged == 0  # refused, as the tags are


def test_ids_with_a_tokenizer(sandbox: Sandbox) -> None:
    tokenizer = llama3()
    report = lint(template_of("llama3.1") or "", sandbox, tokenizer=tokenizer)
    assert report.ok
    assert "one question" not in report.other_ids
    assert "white space around a question" not in report.other_ids
    assert "white space around the system text" in report.other_ids  # its line end joins those of the header


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("{{ bos_token }}<|start_header_id|>\n{{ 2 ** 9 }}", "refused", "line 2: Pow"),
        ("<|start_header_id|>{% include 'x' %}", "refused", "line 1: Include"),
        ("<|start_header_id|>{{ messages.__class__ }}", "refused", "line 1: attribute '__class__'"),
        ("<|start_header_id|>{% if %}", "broken", "line 1"),
        (
            "<|start_header_id|>{% set k = '__cla' ~ 'ss__' %}\n{{ messages[k] }}",
            "refused",
            "line 2: attribute '__class__'",
        ),
    ],
)
def test_what_the_sandbox_refuses_is_a_result(sandbox: Sandbox, source: str, kind: str, said: str) -> None:
    report = lint(source, sandbox)
    assert not report.ok
    assert report.findings == ()
    assert report.refused is not None
    assert report.refused.kind == kind
    assert said in report.refused.explain()


def test_a_template_that_takes_too_long_is_a_result() -> None:
    with Sandbox() as quick:
        endless = "<|start_header_id|>{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        report = lint(endless, quick)
    assert report.refused is not None
    assert report.refused.kind == "stopped"


def test_a_template_of_no_llama_and_an_unknown_format(sandbox: Sandbox) -> None:
    with pytest.raises(PromptError, match="--format"):
        lint("<|im_start|>{{ messages[0].role }}", sandbox)
    with pytest.raises(PromptError, match="'llama9'"):
        lint(GOOD, sandbox, format="llama9")
    with pytest.raises(PromptError, match="'base'"):
        lint(GOOD, sandbox, format="base")


@pytest.mark.parametrize(
    "hostile", ["{{ 10**(10**7) }}", "{% include '/etc/passwd' %}", "{{ ''.__class__ }}", "{% if %}"]
)
def test_a_hostile_template_is_refused_whatever_its_format(sandbox: Sandbox, hostile: str) -> None:
    report = lint(hostile, sandbox)
    assert report.refused is not None
    assert not report.ok


def test_no_template_and_no_known_format_are_said(sandbox: Sandbox) -> None:
    with pytest.raises(PromptError, match="is empty"):
        lint(" \n", sandbox)
    with pytest.raises(PromptError, match="of no Llama format"):
        lint("{% for m in messages %}{{ m.content }}{% endfor %}", sandbox)
