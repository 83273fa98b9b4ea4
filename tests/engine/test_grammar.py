"""Replies of a promised form: a model that knows nothing, held to schemas, writes what jsonschema and re accept."""

from __future__ import annotations

import json
import re
import threading
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine import grammar as grammar_module
from herd.engine.grammar import Grammars
from herd.engine.sampler import RowState, Sampler
from herd.errors import ConfigError
from tests.engine.random_schemas import random_schema
from tests.engine.words import small
from tests.tokenizer.conftest import *  # noqa: F403  # the vocabularies

pytest.importorskip("llguidance", reason='needs herd[grammar]: pip install -e ".[grammar]"')


@cache
def grammars() -> Grammars:
    return Grammars(small())


def write(
    params: SamplingParams, seed: int, *, limit: int = 1500, spread: float = 2.0, kept: Grammars | None = None
) -> bytes | None:
    """The reply of a model that gives random logits, with a pull towards ending things; None when it ran into the limit."""
    kept = kept or grammars()
    tokenizer = kept.tokenizer
    assert params.constraint is not None
    grammar = kept.compile(params.constraint)
    stops = tokenizer.special.stop
    row = RowState(params, vocab_size=kept.vocab_size, stop_ids=stops, seed=seed, mask=grammar.state(stops))
    generator = torch.Generator().manual_seed(seed)
    pull = torch.zeros(kept.vocab_size)
    pull[[*stops]] = 4
    for i in range(min(kept.vocab_size, 100_000)):
        if i not in stops and tokenizer.bytes_of(i) in (b'"', b"}", b"]"):
            pull[i] = 3
    made: list[int] = []
    for _ in range(limit):
        logits = torch.randn(1, kept.vocab_size, generator=generator) * spread + pull
        sampled = Sampler().sample(logits, [row])[0]
        assert sampled.token is not None, sampled.error
        row.append(sampled.token)
        if sampled.token in stops:
            data = b"".join(tokenizer.bytes_of(i) for i in made)
            assert grammar.check(data) is None
            return data
        made.append(sampled.token)
    return None


SCHEMAS: list[Any] = [
    True,
    {},
    {"type": "object"},
    {"type": "string"},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "pattern": "x"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "integer"},
    {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
    {"type": "integer", "multipleOf": 7},
    {"type": "number", "minimum": 0.5, "maximum": 0.75},
    {"type": "number", "multipleOf": 0.25, "minimum": 0},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"]},
    {"enum": ["a", 1, None, {"x": [1]}, 'quote " \\ and é \u2028']},
    {"const": {"deep": [1, {"er": "…"}]}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}], "items": {"type": "null"}},
    {"type": "array", "prefixItems": [{"const": 1}], "items": False},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["b"]},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1},
    {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "properties": {"never": False}, "additionalProperties": {"type": "null"}},
    {"type": "object", "required": ["not declared"]},
    {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]}]},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "boolean"}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}}},
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {"type": "object", "properties": {'we"ird \\ key/~': {"type": "null"}}, "required": ['we"ird \\ key/~']},
    {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"$ref": "#/properties/a"}}, "required": ["b"]},
    {"title": "T", "description": "annotations change nothing", "type": "boolean", "examples": [3], "default": "x"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:40])
def test_whatever_is_written_under_a_schema_parses_and_validates(schema: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the oracle of schemas: pip install jsonschema")
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    finished = [write(SamplingParams(schema=schema, temperature=1), seed) for seed in range(4)]
    done = [data for data in finished if data is not None]
    assert done, "no reply was finished"
    for data in done:
        validator.validate(json.loads(data))


@pytest.mark.parametrize("start", range(0, 150, 30))
def test_random_schemas_are_kept_or_refused(start: int) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the oracle of schemas: pip install jsonschema")
    finished = 0
    for seed in range(start, start + 30):
        schema = random_schema(seed)
        try:
            data = write(SamplingParams(schema=schema, temperature=1), seed, limit=400)
        except ConfigError:
            continue
        if data is not None:
            finished += 1
            checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
            assert not [error.message for error in checker.iter_errors(json.loads(data))], schema
    assert finished >= 15


def test_a_json_object_is_an_object() -> None:
    done = [data for seed in range(6) if (data := write(SamplingParams(json_object=True, temperature=1), seed))]
    assert done
    assert all(isinstance(json.loads(data), dict) for data in done)


@pytest.mark.parametrize(
    "regex", ["[0-9]{3}-[a-f]+", "(ja|nee|misschien)!?", r"\d{1,3}(,\d{3})*", "é{2}x?", "^anchored$", "[^a]{3}", "a/b"]
)
def test_a_regex_is_the_whole_reply(regex: str) -> None:
    for seed in range(5):
        data = write(SamplingParams(regex=regex, temperature=1), seed)
        assert data is not None
        assert re.fullmatch(regex, data.decode()), data


def test_choices_are_all_reached_and_nothing_else() -> None:
    choices = ("ja", "jazeker", "nee", 'say "no"\n', "back\\slash", "été", "/slash/", "{}")
    seen = {
        data.decode()
        for seed in range(150)
        if (data := write(SamplingParams(choices=choices, temperature=1), seed, spread=4.0))
    }
    assert seen == set(choices)


def test_json_may_be_indented_but_not_drift_into_blank_lines() -> None:
    grammar = grammars().compile(SamplingParams(json_object=True).constraint)  # type: ignore[arg-type]
    for text in (
        '{"a": [1, 2], "b": {}}',
        json.dumps({"a": [1, {"b": None}]}, indent=4),
        '{"a":1}',
        '{\r\n\t"a": 1\r\n}',
    ):
        assert grammar.check(text) is None
    for text in ('{\n\n"a": 1}', '{"a":  1}', ' {"a": 1}'):
        assert grammar.check(text) is not None


def test_a_lark_grammar_with_recursion() -> None:
    lark = 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,2}/'
    for seed in range(5):
        data = write(SamplingParams(grammar=lark, temperature=1), seed)
        assert data is not None
        assert re.fullmatch(rb"\(*[0-9]{1,2}\)*", data)
        assert data.count(b"(") == data.count(b")")


def test_special_tokens_never_come_but_to_end() -> None:
    tokenizer = small()
    state = grammars().compile(SamplingParams(regex="(?s:.)*").constraint).state(tokenizer.special.stop)  # type: ignore[arg-type]
    allowed = np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little")).tolist()
    special = set(allowed) & set(tokenizer.special.ids.values())
    assert special == set(tokenizer.special.stop)
    inside = grammars().compile(SamplingParams(regex="ab").constraint).state(tokenizer.special.stop)  # type: ignore[arg-type]
    inside.accept(ord("a"))
    assert np.flatnonzero(np.unpackbits(inside.allowed().view(np.uint8), bitorder="little")).tolist() == [ord("b")]
    assert not inside.complete
    inside.accept(ord("b"))
    assert inside.complete
    assert (
        set(np.flatnonzero(np.unpackbits(inside.allowed().view(np.uint8), bitorder="little"))) == tokenizer.special.stop
    )
    by_number = SamplingParams(grammar=f'start: "a" <[{tokenizer.special.ids["<|image|>"]}]>').constraint
    with pytest.raises(ConfigError, match="Token range"):
        grammars().compile(by_number)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"schema": {"properties": {"a": {"items": {"not": {"type": "string"}}}}}}, r"at /properties/a/items: .*not"),
        ({"schema": {"anyOf": [{"type": "null"}, {"if": {}, "then": {}}]}}, r"at /anyOf/1: .*if"),
        ({"schema": {"$defs": {"x/y": {"contains": {}}}, "$ref": "#/$defs/x~1y"}}, "contains"),
        (
            {"schema": {"properties": {"d": {"type": "string", "format": "zzz"}}}},
            "at /properties/d: Unknown format: zzz",
        ),
        ({"schema": {"properties": {"p": {"type": "string", "pattern": "(?=a)b"}}}}, "at /properties/p: look-around"),
        (
            {"schema": {"properties": {"p": {"type": "string", "pattern": "a(b"}}}},
            "at /properties/p: unclosed group at character 1",
        ),
        ({"schema": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "oneOf constraints are not supported$"),
        ({"schema": {"x-guidance": {"lenient": True}, "not": {}}}, "x-guidance"),
        ({"schema": {"enum": []}}, "Unsatisfiable"),
        ({"schema": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable"),
        ({"schema": {"$ref": "#"}}, "nothing can satisfy it"),
        ({"schema": {"$ref": "#/$defs/none"}}, "does not exist"),
        ({"schema": {"$ref": "https://example.com/schema"}}, "not present"),
        ({"schema": {"type": "wrong"}}, "Invalid type"),
        ({"schema": {"type": "integer", "multipleOf": 99999989}}, "/multipleOf"),
        (
            {"schema": {"type": "object", "properties": {"a": {"type": "string", "pattern": ".*" * 5000}}}},
            "/properties/a/pattern",
        ),
        ({"regex": "(a"}, "regex: unclosed group at character 0"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "a{5,0}"}, "repetition"),
        ({"regex": "(" * 3000}, "regex"),
        ({"regex": "a" * 5000}, "5,000 characters"),
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": "start: " + "(" * 100_000}, "nested"),
        ({"grammar": 'start: %json {"not": {}}'}, "not"),
        ({"grammar": "start: /" + ".*" * 5000 + "/"}, "10,002 characters"),
    ],
    ids=lambda v: json.dumps(v)[:50] if isinstance(v, dict) else "",
)
def test_what_cannot_be_enforced_is_refused_before_it_starts(given: dict[str, Any], words: str) -> None:
    constraint = SamplingParams(**given).constraint
    assert constraint is not None
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=words) as caught:
        grammars().compile(constraint)
    assert len(str(caught.value)) < 300
    assert time.perf_counter() - started < 10  # a second, on a machine with nothing else to do


def test_a_compilation_over_its_time_is_refused_and_only_so_many_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    hasty = Grammars(small(), seconds=0.05)
    hasty._open()
    monkeypatch.setattr(hasty._trial, "check", lambda text, seconds: None)
    monkeypatch.setattr(hasty, "_matcher", lambda text: release.wait(30) and "late")
    for text in "ab":
        with pytest.raises(ConfigError, match=r"takes more than 0.05 s"):
            hasty.compile(SamplingParams(regex=text).constraint)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="still being given up"):
        hasty.compile(SamplingParams(regex="c").constraint)  # type: ignore[arg-type]
    release.set()
    for _ in range(200):
        if hasty._stuck == 0:
            break
        time.sleep(0.01)
    assert hasty._stuck == 0


@pytest.mark.parametrize(
    "given",
    [
        {"schema": {"type": "string", "allOf": [{"pattern": f"a.*{i}.*b"} for i in range(100)]}},
        {"schema": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(12_000)}}},
        {"schema": {"properties": {f"p{i}": {"type": "integer", "multipleOf": 9973 - i} for i in range(50)}}},
        {
            "grammar": "start: "
            + " ".join(f"r{i}" for i in range(20_000))
            + "".join(f'\nr{i}: "a{i}"*' for i in range(20_000))
        },
    ],
    ids=["patterns", "properties", "multiples", "rules"],
)
def test_what_keeps_the_compiler_busy_is_stopped_and_the_next_one_works(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = grammars()
    started = time.perf_counter()
    with monkeypatch.context() as hasty:
        hasty.setattr(kept, "seconds", 0.25)
        # A fast machine reaches the limit of memory before that of time: "patterns" does within a second.
        with pytest.raises(ConfigError, match=r"(more than 0.25 s to compile|takes too much memory): make it simpler"):
            kept.compile(SamplingParams(**given).constraint)  # type: ignore[arg-type]
    assert time.perf_counter() - started < 10  # a quarter of a second and a little, where there is nothing else to do
    assert kept._stuck == 0
    assert kept.compile(SamplingParams(regex="next[0-9]").constraint).check("next1") is None  # type: ignore[arg-type]


def test_grammars_are_kept_but_not_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Grammars(small())
    first = SamplingParams(regex="a+").constraint
    assert first is not None
    assert kept.compile(first) is kept.compile(first)
    monkeypatch.setattr(grammar_module, "KEPT", 3)
    for i in range(5):
        kept.compile(SamplingParams(regex=f"b{i}").constraint)  # type: ignore[arg-type]
    assert len(kept._kept) == 3
    assert first not in kept._kept


def test_a_finished_reply_is_checked_as_a_whole() -> None:
    schema = grammars().compile(SamplingParams(schema={"type": "object", "required": ["a"]}).constraint)  # type: ignore[arg-type]
    assert schema.check('{"a": 1}') is None
    assert "before the schema is complete" in str(schema.check('{"a": 1'))
    assert "leaves the schema" in str(schema.check('{"a": 1}}'))
    assert "after 0 bytes" in str(schema.check("no"))
    assert schema.check(b'{"a": "\xff"}') is not None
    choices = grammars().compile(SamplingParams(choices=("ja", "nee")).constraint)  # type: ignore[arg-type]
    assert choices.check("ja") is None
    assert choices.check("j") is not None


def test_forks_go_their_own_way() -> None:
    stops = small().special.stop
    one = grammars().compile(SamplingParams(choices=("ab", "cd")).constraint).state(stops)  # type: ignore[arg-type]
    other = one.fork()
    one.accept(ord("a"))
    other.accept(ord("c"))
    for state, letter in ((one, "b"), (other, "d")):
        assert np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little")).tolist() == [
            ord(letter)
        ]


def test_a_token_that_does_not_fit_is_that_replys_error() -> None:
    state = grammars().compile(SamplingParams(regex="ab").constraint).state(small().special.stop)  # type: ignore[arg-type]
    state.accept(ord("z"))
    with pytest.raises(ConfigError, match="cannot be followed"):
        state.allowed()


def test_a_reply_that_nothing_can_end_is_refused() -> None:
    grammar = grammars().compile(SamplingParams(regex="ab").constraint)  # type: ignore[arg-type]
    for stops in ((), (ord("a"),)):
        with pytest.raises(ConfigError, match="no special token ends it"):
            grammar.state(stops)


def test_a_missing_llguidance_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"herd\[grammar\]"):
        Grammars(small()).compile(SamplingParams(regex="a").constraint)  # type: ignore[arg-type]


def test_sentencepiece_vocabularies_too(tiny_sp: Any) -> None:
    kept = Grammars(tiny_sp)
    stops = tiny_sp.special.stop
    for params in (
        SamplingParams(schema={"type": "object"}, temperature=1),
        SamplingParams(regex="[a-z ]{5,9}é", temperature=1),
    ):
        data = write(params, 3, kept=kept)
        assert data is not None
    state = kept.compile(SamplingParams(regex="(?s:.)*").constraint).state(stops)  # type: ignore[arg-type]
    allowed = np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little")).tolist()
    assert set(allowed) & set(tiny_sp.special.ids.values()) == set(stops)


@pytest.mark.slow
def test_masks_of_a_large_vocabulary_are_fast(opened_llama3: Any, measured: Any) -> None:
    kept = Grammars(opened_llama3)
    times = []
    for schema in SCHEMAS:
        grammar = kept.compile(SamplingParams(schema=schema).constraint)  # type: ignore[arg-type]
        for seed in range(3):
            state, generator = grammar.state(opened_llama3.special.stop), np.random.default_rng(seed)
            for _ in range(40):
                started = time.perf_counter()
                bits = state.allowed()
                times.append(time.perf_counter() - started)
                ids = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
                state.accept(int(generator.choice(ids)))
                if state.ended:
                    break
    p99 = float(np.quantile(times, 0.99))
    measured("grammar masks", "p99 at 128k, seconds", p99)
    assert p99 < 0.05  # 5 ms on a machine with nothing else to do


@pytest.fixture(scope="module")
def opened_llama3() -> Any:
    from tests.tokenizer.conftest import opened

    return opened("llama3")


@pytest.mark.parametrize("which", ["tiny_sp", "small", "opened_llama3"])
def test_where_only_one_text_can_follow_it_comes_in_the_tokenizers_own_ids(
    which: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = small() if which == "small" else request.getfixturevalue(which)
    state = (
        Grammars(tokenizer).compile(SamplingParams(regex="the story of a dog").constraint).state(tokenizer.special.stop)
    )  # type: ignore[arg-type]
    ids: list[int] = []
    while not state.complete:
        (only,) = np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little")).tolist()
        state.accept(only)
        ids.append(only)
    own = tokenizer.encode("\nthe story of a dog" if which == "tiny_sp" else "the story of a dog")
    assert ids == own[-len(ids) :]
    assert b"".join(map(tokenizer.bytes_of, ids)) == b"the story of a dog"


NESTED = {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1, "maxItems": 1}, {"type": "null"}]}
"""A reply that may be as deep as somebody makes it (with a logit bias, say)."""


def test_a_reply_that_is_too_deep_to_read_is_that_replys_error() -> None:
    grammar = grammars().compile(SamplingParams(schema=NESTED).constraint)  # type: ignore[arg-type]
    for depth, wrong in ((100, None), (3000, "nested more deeply")):
        found = grammar.check("[" * depth + "null" + "]" * depth)
        assert found is None if wrong is None else wrong in (found or "")
