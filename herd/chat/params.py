"""How to sample: pure data, shared by engines and APIs. No torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from herd.errors import ConfigError

__all__ = ["MAX_BIAS", "MAX_LOGPROBS", "MAX_N", "Constraint", "ConstraintKind", "SamplingParams"]

MAX_N = 128
"""Most replies, candidates or beams of one request: each takes its own share of the cache."""
MAX_LOGPROBS = 20
"""Most alternatives reported for one token."""
MAX_BIAS = 1024
"""Most ids with a bias."""
MAX_CONSTRAINT = 500_000
"""Most characters of a schema, regex, list of choices or grammar."""
MAX_CHOICES = 10_000
MAX_INT = 2**63 - 1

ConstraintKind = Literal["schema", "json_object", "regex", "choices", "grammar"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a reply must be. `text` is JSON for "schema" and "choices", the pattern or the grammar, empty for "json_object"."""

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling controls; the defaults are Meta's generation defaults (temperature 0.6, top_p 0.9).

    Which token: `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `typical_p` 1 switch those filters off.
    `repetition_penalty` divides or multiplies the logits of ids in the prompt and the reply; `presence_penalty` (once) and
    `frequency_penalty` (per use) are subtracted for ids in the reply, from -2 to 2. `logit_bias` (id -> -100..100) is added;
    it is kept as sorted pairs. The order of the filters is that of `herd.engine.sampler`. `seed` None draws a fresh one.

    How long: `max_tokens` None means up to the end of the context. `stop` strings end the reply and are not part of it; so do
    `stop_ids`. Nothing but a limit ends it before `min_tokens`. `ignore_stop_ids` runs to max_tokens whatever the model says.

    How many: `n` replies; with `best_of`, the n likeliest of that many by mean log-probability. `beams` above 1 is beam
    search (temperature 0; returns the n best): scores are sums of log-probabilities over length ** `length_penalty`.

    What is told: `logprobs` alternatives for each token (0: only the chosen one's log-probability; None: nothing), and
    `prompt_logprobs` the same for the prompt. They are those of the model, before any filter and without temperature.

    What form: at most one of `schema` (JSON Schema, a mapping or its JSON text; kept as text), `json_object`, `regex` (the
    whole reply), `choices` and `grammar` (Lark, as llguidance reads it). They need `herd[grammar]`.

    Raises ConfigError naming the field. Limits that only protect a public service (how many stop strings, how long they
    are, n times prompt tokens) belong to that service.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    ignore_stop_ids: bool = False
    n: int = 1
    best_of: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    schema: str | Mapping[str, Any] | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choices: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise ConfigError(f"stop is the string {self.stop!r}: give a tuple of strings, ({self.stop!r},)")
        if isinstance(self.choices, str):
            raise ConfigError(f"choices is the string {self.choices!r}: give a tuple of strings")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        if self.schema is not None:
            object.__setattr__(self, "schema", _schema_text(self.schema))
        self._check_fields()
        self._check_constraint()
        self._check_together()

    @property
    def constraint(self) -> Constraint | None:
        """What the reply must be, or None."""
        if self.schema is not None:
            return Constraint("schema", str(self.schema))
        if self.json_object:
            return Constraint("json_object", "")
        if self.regex is not None:
            return Constraint("regex", self.regex)
        if self.choices:
            return Constraint("choices", json.dumps(self.choices, ensure_ascii=False))
        if self.grammar is not None:
            return Constraint("grammar", self.grammar)
        return None

    @property
    def candidates(self) -> int:
        """How many continuations are made: best_of, or n."""
        return self.n if self.best_of is None else self.best_of

    def _check_fields(self) -> None:
        _within("temperature", self.temperature, 0, math.inf)
        _within("top_p", self.top_p, 0, 1, open_low=True)
        _within("top_k", self.top_k, 0, MAX_INT, whole=True)
        _within("min_p", self.min_p, 0, 1)
        _within("typical_p", self.typical_p, 0, 1, open_low=True)
        _within("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, MAX_INT, whole=True)
        _within("min_tokens", self.min_tokens, 0, MAX_INT, whole=True)
        if self.seed is not None:
            _within("seed", self.seed, 0, MAX_INT, whole=True)
        _within("n", self.n, 1, MAX_N, whole=True)
        if self.best_of is not None:
            _within("best_of", self.best_of, 1, MAX_N, whole=True)
        _within("beams", self.beams, 1, MAX_N, whole=True)
        _within("length_penalty", self.length_penalty, -math.inf, math.inf)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _within(name, count, 0, MAX_LOGPROBS, whole=True)
        for name in ("ignore_stop_ids", "json_object"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} is {_shown(value)}: expected True or False")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ConfigError("stop strings must be non-empty text")
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= MAX_INT for i in self.stop_ids):
            raise ConfigError("stop_ids must be token ids: integers from 0 up")

    def _check_constraint(self) -> None:
        given = {
            "schema": self.schema is not None,
            "json_object": self.json_object,
            "regex": self.regex is not None,
            "choices": bool(self.choices),
            "grammar": self.grammar is not None,
        }
        names = [name for name, there in given.items() if there]
        if len(names) > 1:
            raise ConfigError(f"{' and '.join(names)} were given: a reply can be held to one of them only")
        for name in ("regex", "grammar"):
            if (text := getattr(self, name)) is not None and (not isinstance(text, str) or not text):
                raise ConfigError(f"{name} must be non-empty text")
        if any(not isinstance(c, str) or not c for c in self.choices) or len(set(self.choices)) < len(self.choices):
            raise ConfigError("choices must be different, non-empty texts")
        if len(self.choices) > MAX_CHOICES:
            raise ConfigError(f"{len(self.choices):,} choices were given: at most {MAX_CHOICES:,} are allowed")
        if names:
            size = max(len(self.regex or ""), len(self.grammar or ""), sum(map(len, self.choices)))
            size = max(size, len(str(self.schema)))
            if size > MAX_CONSTRAINT:
                raise ConfigError(f"{names[0]} has {size:,} characters: at most {MAX_CONSTRAINT:,} are allowed")
            if self.ignore_stop_ids:
                raise ConfigError(
                    f"ignore_stop_ids runs on past the end that {names[0]} asks for: leave one of them out"
                )
            if self.min_tokens:
                raise ConfigError(
                    f"min_tokens cannot be kept with {names[0]}, which says when a reply is complete: leave it out"
                )

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        if self.best_of is not None:
            if self.best_of < self.n:
                raise ConfigError(
                    f"best_of is {self.best_of}, less than n, {self.n}: the n best of it cannot be chosen"
                )
            if self.beams > 1:
                raise ConfigError(
                    "best_of chooses among samples: with beams, n alone says how many of them are returned"
                )
            if self.best_of > self.n and self.temperature == 0:
                raise ConfigError("best_of chooses among different replies, but at temperature 0 all are the same")
        if self.beams == 1:
            if self.length_penalty != 1:
                raise ConfigError("length_penalty is about beam search: set beams above 1 or leave it out")
            return
        if self.temperature != 0:
            raise ConfigError(f"beam search does not sample, but temperature is {self.temperature:g}: set it to 0")
        if self.n > self.beams:
            raise ConfigError(f"n is {self.n}, but {self.beams} beams give at most {self.beams} replies")
        changed = {
            "repetition_penalty": self.repetition_penalty != 1,
            "presence_penalty": self.presence_penalty != 0,
            "frequency_penalty": self.frequency_penalty != 0,
            "logit_bias": bool(self.logit_bias),
            "stop": bool(self.stop),
            "logprobs": self.logprobs is not None,
        }
        names = [name for name, there in changed.items() if there]
        if (constraint := self.constraint) is not None:
            names.append(constraint.kind)
        if names:
            raise ConfigError(f"beam search is not made with {', '.join(names)}: leave that out, or set beams to 1")


def _pairs(bias: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The biases as sorted pairs, checked."""
    pairs: tuple[tuple[Any, Any], ...]
    try:
        pairs = tuple(bias.items()) if isinstance(bias, Mapping) else tuple((i, x) for i, x in bias)
    except (TypeError, ValueError):
        raise ConfigError("logit_bias must map token ids to numbers") from None
    if len(pairs) > MAX_BIAS:
        raise ConfigError(f"logit_bias has {len(pairs):,} ids: at most {MAX_BIAS:,} are allowed")
    for i, x in pairs:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= MAX_INT:
            raise ConfigError(f"logit_bias names {_shown(i)}: expected a token id, an integer from 0 up")
        _within(f"logit_bias of id {i}", x, -100, 100)
    if len({i for i, _ in pairs}) < len(pairs):
        raise ConfigError("logit_bias names an id twice")
    return tuple(sorted((i, float(x)) for i, x in pairs))


def _schema_text(schema: object) -> str:
    """A JSON Schema as JSON text; the order of its properties is kept."""
    try:
        if isinstance(schema, str):
            if len(schema) > MAX_CONSTRAINT:
                raise ConfigError(f"schema has {len(schema):,} characters: at most {MAX_CONSTRAINT:,} are allowed")
            schema = json.loads(schema)
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError("schema is nested too deeply, or holds itself") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping) and schema is not True:
        raise ConfigError(f"schema is {_shown(schema)}: expected a JSON Schema object, or True for any JSON value")
    return text


def _within(name: str, value: object, low: float, high: float, *, open_low: bool = False, whole: bool = False) -> None:
    number = isinstance(value, int) if whole else isinstance(value, int | float)
    if (
        isinstance(value, bool)
        or not number
        or not abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # NaN and integers too large for a float too
        or not low <= value <= high  # type: ignore[operator]  # a number by now
        or (open_low and value == low)
    ):
        kind = "an integer" if whole else "a number"
        if low == -math.inf:
            raise ConfigError(f"{name} is {_shown(value)}: expected a finite number")
        above = f"above {low:g}" if open_low else f"at least {low:g}"
        upto = "" if high in (math.inf, MAX_INT) else f" and at most {high:g}"
        raise ConfigError(f"{name} is {_shown(value)}: expected {kind} {above}{upto}")


def _shown(value: object) -> str:
    """`value` for a message: short, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INT:
        return "an integer beyond 64 bits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
