"""Sampling parameters: what makes no sense is refused by name, and what is accepted is plain, hashable data."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from herd.chat.params import MAX_BIAS, Constraint, SamplingParams
from herd.errors import ConfigError

GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 10**9}, "n is 1000000000: expected an integer at least 1 and at most 128"),
        ({"n": 10**5000}, "n is an integer beyond 64 bits"),
        ({"n": 0}, "n is 0"),
        ({"n": True}, "n is True"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 10**5000}, "temperature is an integer beyond 64 bits"),
        ({"top_p": 0}, "above 0"),
        ({"typical_p": 0}, "above 0 and at most 1"),
        ({"typical_p": 1.5}, "typical_p is 1.5"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs is 1000000"),
        ({"logit_bias": {1: 101}}, "logit_bias of id 1 is 101"),
        ({"logit_bias": {"1": 1}}, "logit_bias names '1'"),
        ({"logit_bias": {-1: 1}}, "logit_bias names -1"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIAS + 1), 1)}, "1,025 ids"),
        ({"logit_bias": ((1, 1), (1, 2))}, "an id twice"),
        ({"logit_bias": "x"}, "must map"),
        ({"stop_ids": {-1}}, "stop_ids"),
        ({"stop": "x"}, "give a tuple"),
        ({"min_tokens": 5, "max_tokens": 4}, "more than max_tokens"),
        ({"n": 3, "best_of": 2}, "best_of is 2, less than n"),
        ({"best_of": 2, **GREEDY}, "all are the same"),
        ({"length_penalty": 2.0}, "set beams above 1"),
        ({"beams": 4}, "set it to 0"),
        ({"beams": 2, "n": 3, **GREEDY}, "at most 2 replies"),
        ({"beams": 2, "best_of": 2, **GREEDY}, "with beams, n alone"),
        ({"beams": 2, "regex": "a", "logprobs": 1, **GREEDY}, "not made with logprobs, regex"),
        ({"beams": 2, "stop": ("a",), **GREEDY}, "not made with stop"),
        ({"regex": "a", "grammar": "start: /a/"}, "regex and grammar were given"),
        ({"regex": ""}, "non-empty"),
        ({"choices": ("a", "a")}, "different"),
        ({"choices": "ab"}, "tuple of strings"),
        ({"schema": "{"}, "not JSON"),
        ({"schema": {"const": float("nan")}}, "not JSON"),
        ({"schema": {"const": {1, 2}}}, "not JSON"),
        ({"schema": "[" * 100_000}, "too deeply"),
        ({"schema": 3}, "expected a JSON Schema object"),
        ({"schema": False}, "expected a JSON Schema object"),
        ({"schema": "[" * 10**6}, "1,000,000 characters"),
        ({"regex": "a" * 10**6}, "regex has 1,000,000 characters"),
        ({"regex": "a", "ignore_stop_ids": True}, "ignore_stop_ids"),
        ({"json_object": True, "min_tokens": 3}, "min_tokens cannot be kept with json_object"),
        ({"json_object": 1}, "expected True or False"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplingParams(**given)


def test_a_schema_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["not"] = loop
    with pytest.raises(ConfigError):
        SamplingParams(schema=loop)


def test_params_are_values_whatever_they_were_made_from() -> None:
    one = SamplingParams(schema={"type": "object"}, logit_bias={9: 1, 3: -2.5}, stop=["a"], stop_ids=[4])  # type: ignore[arg-type]
    two = SamplingParams(
        schema='{"type": "object"}', logit_bias=((3, -2.5), (9, 1.0)), stop=("a",), stop_ids=frozenset({4})
    )
    assert one == two
    assert hash(one) == hash(two)
    assert one.logit_bias == ((3, -2.5), (9, 1.0))
    assert replace(one, seed=3).schema == one.schema
    assert SamplingParams(**{f.name: getattr(one, f.name) for f in fields(one)}) == one


def test_the_constraint_is_the_one_that_was_given() -> None:
    assert SamplingParams().constraint is None
    assert SamplingParams(schema={"b": 1, "a": 2}).constraint == Constraint("schema", '{"b":1,"a":2}')
    assert SamplingParams(schema=True).constraint == Constraint("schema", "true")
    assert SamplingParams(json_object=True).constraint == Constraint("json_object", "")
    assert SamplingParams(regex="a+").constraint == Constraint("regex", "a+")
    chosen = SamplingParams(choices=("ja", "nee")).constraint
    assert chosen is not None
    assert (chosen.kind, json.loads(chosen.text)) == ("choices", ["ja", "nee"])


def test_candidates_are_best_of_or_n() -> None:
    assert SamplingParams(n=3).candidates == 3
    assert SamplingParams(n=2, best_of=5).candidates == 5
