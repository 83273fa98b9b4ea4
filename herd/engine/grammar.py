"""Replies of a promised form: JSON Schema, JSON objects, regexes, choices and Lark grammars, as masks over the vocabulary.

The work is done by llguidance (the extra `herd[grammar]`): an Earley parser over regexes without backtracking, with fuel limits
for every step. What it cannot enforce it refuses, and so does herd, before a request starts: with the place in the schema where
that can be found. A reply is checked once more as a whole when it is complete (`Grammar.check`).
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from herd.chat.params import Constraint
from herd.engine.grammar_source import checked, children, json_source, reason, source_of
from herd.engine.grammar_trial import GrammarTrial, TooSlow
from herd.errors import ConfigError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Grammar", "GrammarState", "Grammars", "require_grammar"]

COMPILE_SECONDS = 1.0
"""A constraint that takes longer is refused. llguidance takes at most 0.23 s for any of MaskBench's 11,306 schemas."""
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,  # 1 to 2 kB each: a fifth of llguidance's own limit, so that one grammar stays below 128 MiB
    "max_grammar_size": 500_000,
}
MAX_STUCK = 2
"""Compilations over their time that may still be running; while there are so many, nothing new is compiled."""
KEPT = 64
KEPT_CHARACTERS = 2_000_000
"""Grammars are kept for the next request, up to so many, made from so much text."""
MAX_SEARCH = 300
"""Parts of a refused schema that are tried by themselves to find the place."""


def require_grammar() -> None:
    """Raise ConfigError when llguidance is not installed."""
    if find_spec("llguidance") is None:
        raise ConfigError('a reply of a given form needs llguidance: pip install "herd[grammar]"')


class Grammars:
    """Compiles constraints for one tokenizer, and keeps the last ones.

    `vocab_size` is the model's, when it is not the tokenizer's. The first constraint builds a table of the vocabulary (a
    second or two at 128k). `compile` may be called from any thread and blocks without holding Python's lock; call it through
    `asyncio.to_thread` where an event loop must stay responsive.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int | None = None, seconds: float = COMPILE_SECONDS
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.seconds = seconds
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._trial = GrammarTrial(LIMITS)
        self._stuck = 0
        self._table: Any = None
        self._limits: Any = None

    def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of `constraint`. Raises ConfigError saying what cannot be enforced, or is malformed, and where."""
        require_grammar()
        with self._lock:
            if (grammar := self._kept.get(constraint)) is not None:
                self._kept.move_to_end(constraint)
                return grammar
            if self._stuck >= MAX_STUCK:
                raise ConfigError("constraints that take too long are still being given up: try again in a moment")
            if self._table is None:
                self._open()
        schema = checked(constraint)
        text = ""
        try:
            text = source_of(constraint)
            wrong = self._trial.check(text, self.seconds)
        except TooSlow as error:
            raise ConfigError(f"{constraint.kind}: {error}: make it simpler") from None
        except ConfigError:
            raise
        except ValueError as error:  # llguidance's, when it cannot even read the schema
            wrong = str(error)
        if wrong is not None:
            where = "" if schema is None else self._where(schema, wrong)
            raise ConfigError(f"{constraint.kind}{where}: {reason(wrong)}")
        matcher = self._timed(constraint.kind, lambda: self._matcher(text))
        if isinstance(matcher, str):
            raise ConfigError(f"{constraint.kind}: {reason(matcher)}")
        grammar = Grammar(constraint, matcher, self._table, self._normal)
        with self._lock:
            self._kept[constraint] = grammar
            while len(self._kept) > KEPT or sum(len(c.text) for c in self._kept) > max(
                KEPT_CHARACTERS, len(constraint.text)
            ):
                self._kept.popitem(last=False)
        return grammar

    def _open(self) -> None:
        """Build the table of the vocabulary."""
        import llguidance

        self._limits = llguidance.LLParserLimits(**LIMITS, verbose_errors=False)  # type: ignore[arg-type]  # counts, all of them
        vocabulary = _Vocabulary(self.tokenizer, self.vocab_size)
        table = llguidance.LLTokenizer(vocabulary, n_vocab=self.vocab_size, eos_token=vocabulary.eos_token_id)  # type: ignore[arg-type]
        self._normal = _bits(vocabulary.normal, self.vocab_size)
        first = llguidance.LLMatcher(table, json_source('{"type":"object"}'), log_level=0)
        first.compute_bitmask()  # sorts the vocabulary for JSON strings: the first mask would take as long as a hundred others
        self._table = table

    def _matcher(self, text: str) -> Any:
        """A matcher at its start, with its first mask made, or the message that says why there is none."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._table, text, log_level=0, limits=self._limits)
        if not matcher.is_error():
            bits = _mask(matcher, self._normal)
            if not matcher.is_error() and not matcher.is_accepting() and not bits.any():
                return "nothing can satisfy it with the tokens of this vocabulary"
        return matcher.get_error() if matcher.is_error() else matcher

    def _where(self, schema: Any, message: str) -> str:
        """ " at " and the JSON pointer of the innermost part of `schema` that is refused in the same way; or nothing."""
        left, at, part = MAX_SEARCH, "", schema
        until = time.monotonic() + self.seconds
        definitions = {key: schema[key] for key in ("$defs", "definitions", "$schema") if key in schema}
        found = True
        while found:
            found = False
            for pointer, child in children(part):
                left -= 1
                if left < 0 or time.monotonic() > until:
                    break
                if self._refusal(definitions | child) == message:
                    at, part, found = at + pointer, child, True
                    break
        return f" at {at}" if at else ""

    def _refusal(self, schema: dict[str, Any]) -> str | None:
        """What is wrong with a schema by itself; nothing when it takes too long to say."""
        try:
            return self._trial.check(json_source(json.dumps(schema)), self.seconds)
        except TooSlow:
            return None
        except ValueError as error:
            return str(error)

    def _timed(self, kind: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, in a thread of its own. Raises ConfigError when it takes too long; it is then left behind."""
        result: list[Any] = []
        done = threading.Event()

        def run() -> None:
            try:
                result.append(work())
            except BaseException as error:
                result.append(error)
            done.set()
            if over.is_set():
                with self._lock:
                    self._stuck -= 1

        over = threading.Event()
        threading.Thread(target=run, name="herd-grammar", daemon=True).start()
        if not done.wait(self.seconds):
            with self._lock:
                if not done.is_set():
                    self._stuck += 1
                    over.set()
        if not result:
            raise ConfigError(f"{kind} takes more than {self.seconds:g} s to compile: make it simpler")
        if isinstance(result[0], Exception):
            raise ConfigError(f"{kind} cannot be compiled: {reason(str(result[0]))}")
        return result[0]


class Grammar:
    """A compiled constraint; each reply gets a state of its own from it."""

    def __init__(self, constraint: Constraint, matcher: Any, table: Any, normal: NDArray[np.int32]) -> None:
        self.constraint = constraint
        self._start, self._table, self._normal = matcher, table, normal

    def state(self, stop_ids: Iterable[int]) -> GrammarState:
        """Where a reply begins. `stop_ids` end it; at least one must be a special token.

        Raises ConfigError when none is: then nothing could end the reply.
        """
        size = 32 * len(self._normal)
        stops = [i for i in stop_ids if i < size and not self._normal[i // 32] >> (i % 32) & 1]
        if not stops:
            raise ConfigError(
                f"a reply held to {self.constraint.kind} must be able to end, but no special token ends it"
            )
        return GrammarState(self._start.deep_copy(), self._normal, _bits(stops, size))

    def check(self, text: str | bytes) -> str | None:
        """What is wrong with a finished reply, None when it is what was promised. A reply that was cut is incomplete."""
        data = text.encode() if isinstance(text, str) else text
        matcher = self._start.deep_copy()
        tokens = self._table.tokenize_bytes(data)
        accepted = matcher.try_consume_tokens(tokens)
        if matcher.is_error() or accepted < len(tokens):
            return (
                f"it leaves the {self.constraint.kind} after {len(self._table.decode_bytes(tokens[:accepted]))} bytes"
            )
        if not matcher.is_accepting():
            return f"it ends before the {self.constraint.kind} is complete"
        if self.constraint.kind in ("schema", "json_object"):
            try:
                json.loads(data, object_pairs_hook=_without_repeats)
            except ValueError as error:
                return f"it is not what JSON readers agree on: {error}"
            except RecursionError:
                return "it is nested more deeply than JSON readers take"
        if self.constraint.kind == "choices" and data.decode("utf-8", "replace") not in json.loads(
            self.constraint.text
        ):
            return "it is none of the choices"
        return None


class GrammarState:
    """How far one reply is: what may come next (`herd.engine.sampler.Mask`)."""

    def __init__(self, matcher: Any, normal: NDArray[np.int32], stops: NDArray[np.int32]) -> None:
        self._matcher, self._normal, self._stops = matcher, normal, stops
        self.ended = False
        """A stop id was accepted."""

    @property
    def complete(self) -> bool:
        """The reply so far is what was promised."""
        return self._matcher.is_accepting()

    def allowed(self) -> NDArray[np.int32]:
        """Bits of the ids that may come next; stop ids when the reply may end. Raises ConfigError when a limit was met."""
        matcher = self._matcher
        if matcher.is_error():
            raise ConfigError(f"the constraint cannot be followed any more: {reason(matcher.get_error())}")
        if matcher.is_stopped():
            return self._stops
        bits = _mask(matcher, self._normal)
        if matcher.is_error():
            raise ConfigError(f"the constraint cannot be followed any more: {reason(matcher.get_error())}")
        return bits | self._stops if matcher.is_accepting() else bits

    def accept(self, token: int) -> None:
        """`token` was chosen."""
        if self._stops[token // 32] >> (token % 32) & 1:
            self.ended = True
        else:
            self._matcher.consume_token(token)  # what does not fit makes the matcher fail, and `allowed` say so

    def fork(self) -> GrammarState:
        """The same state, independent of this one."""
        other = GrammarState(self._matcher.deep_copy(), self._normal, self._stops)
        other.ended = self.ended
        return other


class _Vocabulary:
    """The tokenizer as llguidance reads one: the bytes of every id, none for special ones."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        special = set(tokenizer.special.ids.values())
        self.eos_token_id = tokenizer.special.eos
        self._tokenizer = tokenizer
        self.tokens = [b""] * size
        for i in range(min(size, tokenizer.vocab_size)):
            data = b"" if i in special else tokenizer.bytes_of(i)
            # llguidance marks special tokens by a first byte of 0xFF, which no UTF-8 text has.
            self.tokens[i] = b"" if data.startswith(b"\xff") else data
        self._single = {data[0]: i for i, data in enumerate(self.tokens) if len(data) == 1}
        self.normal = [i for i, data in enumerate(self.tokens) if data]
        self.tokens[self.eos_token_id] = b"<end>"
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of `text` in the middle of a sequence: what llguidance proposes where only one text can follow."""
        data = text.encode() if isinstance(text, str) else text
        known = data.decode("utf-8", "ignore")
        for before in ("", "\n"):  # SentencePiece puts a space in front, which a line break keeps away from the text
            ids = self._tokenizer.encode(before + known)
            while ids and sum(len(self.tokens[i]) for i in ids) > len(data):
                ids.pop(0)
            if b"".join(self.tokens[i] for i in ids) == data:
                return ids
        return [self._single[byte] for byte in data]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object. A grammar cannot forbid that an undeclared key comes twice, so that counts are wrong."""
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("an object has the same key twice")
    return members


def _mask(matcher: Any, normal: NDArray[np.int32]) -> NDArray[np.int32]:
    """Bits of what may come next, of `normal` ids only."""
    return np.frombuffer(matcher.compute_bitmask(), dtype=np.int32, count=len(normal)) & normal


def _bits(ids: Iterable[int], size: int) -> NDArray[np.int32]:
    """Bit i % 32 of word i // 32 set for each of `ids`; words for `size` ids."""
    marked = np.zeros(-(-size // 32) * 32, dtype=np.uint8)
    marked[np.array(list(ids), dtype=np.int64)] = 1
    return np.packbits(marked, bitorder="little").view(np.int32)
