"""Templates that hypothesis makes: the sandbox always answers in time, and what it renders is what transformers renders."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.chat.sandbox import WALL_SECONDS, Sandbox

SPARE = 1.0
"""Seconds that starting anew and a busy machine may add."""

VARIABLES: dict[str, Any] = {
    "messages": [{"role": "system", "content": " é "}, {"role": "user", "content": "hi\n", "tool_calls": []}],
    "tools": None,
    "documents": None,
    "add_generation_prompt": True,
    "bos_token": "<s>",
}


@pytest.fixture(scope="module")
def patient() -> Iterator[Sandbox]:
    with Sandbox(wall_seconds=20) as opened:
        yield opened


@pytest.fixture(scope="module")
def strict() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


NAMES = (
    "messages",
    "messages[0]",
    "messages[1].content",
    "tools",
    "bos_token",
    "nothing",
    "m",
    "m['role']",
    "loop.index",
)
VALUES = ("1", "0", "-2", "1.5", "true", "none", "'x'", "'a b'", "''", "[]", "[1, 'b', none]", "{'k': 2}", "range(3)")
ATOMS = st.sampled_from((*NAMES, *VALUES, "ns.a", "loop.last"))
PLAIN_FILTERS = (
    "trim",
    "upper",
    "lower",
    "length",
    "list",
    "first",
    "last",
    "string",
    "int",
    "tojson",
    "join",
    "reverse",
)
MORE_FILTERS = (
    "unique",
    "sort",
    "default('d')",
    "items",
    "title",
    "abs",
    "sum",
    "replace('i','o')",
    "map('upper')",
    "select",
)
TAKING_FILTERS = ("rejectattr('content')", "map(attribute='role')", "truncate(3)", "batch(2)", "indent(2)")
FILTERS = st.sampled_from((*PLAIN_FILTERS, *MORE_FILTERS, *TAKING_FILTERS))
TESTS = st.sampled_from(("defined", "none", "string", "mapping", "iterable", "number", "odd", "undefined", "boolean"))
OPERATORS = st.sampled_from(("+", "~", "==", "!=", "<", "and", "or", "in", "*", "//", "%"))


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("({} {} {})".format, inner, OPERATORS, inner),
        st.builds("({} | {})".format, inner, FILTERS),
        st.builds("({} is {})".format, inner, TESTS),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{}.content".format, inner),
        st.builds("(not {})".format, inner),
        st.builds("{}[:1]".format, inner),
    )


EXPRESSIONS = st.recursive(ATOMS, larger, max_leaves=6)


def wider(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    several = st.lists(inner, min_size=1, max_size=3).map("".join)
    return st.one_of(
        several,
        st.builds("{{%- if {} %}}\n{}{{%- else -%}}{}{{% endif %}}".format, EXPRESSIONS, several, several),
        st.builds(
            "{{% for m in {} %}}{}{{% if loop.index > 1 %}}{{% break %}}{{% endif %}}{{%- endfor %}}\n".format,
            EXPRESSIONS,
            several,
        ),
        st.builds("{{% set ns.a = {} %}}{}".format, EXPRESSIONS, several),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, several),
        st.builds("{{% macro f(m) %}}{}{{% endmacro %}}{{{{ f({}) }}}}".format, several, EXPRESSIONS),
    )


PIECES = st.one_of(
    st.sampled_from(["text", "  \n ", "<|eot_id|>", "{# note #}", "\n"]),
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{{{- {} -}}}}".format, EXPRESSIONS),
)
TEMPLATES = st.recursive(PIECES, wider, max_leaves=6).map("{{% set ns = namespace(a='n') %}}{}".format)


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def expected(source: str) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    more = {name: value for name, value in VARIABLES.items() if name not in ("messages", "tools", "documents")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of `1[:1]`, when Jinja compiles
            text = render_jinja_template(conversations=[VARIABLES["messages"]], chat_template=source, **more)[0][0]
        return without_addresses(text)
    except (
        jinja2.TemplateError,
        SyntaxError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
    ):
        return None


MADE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(MADE, max_examples=40)
@given(TEMPLATES)
def test_made_templates_render_as_in_transformers(patient: Sandbox, source: str) -> None:
    outcome = patient.run(source, VARIABLES)
    text = expected(source)
    if outcome.kind == "text":
        assert without_addresses(outcome.text) == text
    elif text is not None:  # stricter than transformers only where the lists say so
        assert outcome.kind == "refused"


@pytest.mark.slow
@settings(MADE, max_examples=3000)
@given(TEMPLATES)
def test_many_made_templates_render_as_in_transformers(patient: Sandbox, source: str) -> None:
    outcome = patient.run(source, VARIABLES)
    text = expected(source)
    assert (
        without_addresses(outcome.text) == text if outcome.kind == "text" else text is None or outcome.kind == "refused"
    )


@settings(MADE, max_examples=60)
@given(st.text(alphabet=st.sampled_from("{%}#-()[]'\"|.,:~+*/<>=! \nabcdeforifsetmacroindn0159_\u20ac"), max_size=300))
def test_noise_is_answered_in_time(strict: Sandbox, source: str) -> None:
    before = time.monotonic()
    assert strict.run("{{" + source, VARIABLES).kind in ("text", "broken", "failed", "refused", "raised", "stopped")
    assert time.monotonic() - before < WALL_SECONDS + SPARE
