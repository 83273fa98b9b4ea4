"""The next token of every row of a batch, each by its own parameters.

Order of what happens to a row: logit bias, minimum length (stop ids banned), the constraint's mask, repetition, presence and
frequency penalties, temperature, top-k, typical-p, top-p, min-p, one draw. Greedy rows (temperature 0) take the best token after
the penalties, ties by id. vLLM and transformers go the same way, except that vLLM has min-p before top-k, and transformers
typical-p after top-p.

Log-probabilities are those of the model: log-softmax of the logits as they came, without temperature and filters, as the
OpenAI API and vLLM report them. So a token that a mask forced shows how unlikely the model found it.

**Random numbers.** A draw takes one uniform number, which is a hash of the row's seed, its index among the n replies of its
request and the number of tokens made before: no state, so the same wherever and whenever it is computed, after preemption, with
any neighbours. As every row is handled alone and by the same code, a row's token is bitwise independent of its batch.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from herd.chat.params import SamplingParams
from herd.engine import device_sample
from herd.engine.logits import Uses, add_bias, ban, keep_allowed, penalize, penalize_repetition
from herd.engine.logprobs import chosen_and_best
from herd.engine.sample import Weights, draw, weigh
from herd.errors import ConfigError

__all__ = ["Mask", "RowState", "Sampled", "Sampler", "uniform"]

NOT_FINITE = (
    "the model gave numbers that are not finite, so no next token can be chosen: its weights are damaged, or they overflow in "
    "this dtype (try bfloat16 or float32)"
)
NOTHING_LEFT = "no token is left to choose from: logit_bias, min_tokens and the constraint rule out all of them"


class Mask(Protocol):
    """What a constrained reply may go on with (`herd.engine.grammar.GrammarState`)."""

    def allowed(self) -> NDArray[np.int32]:
        """Bits [ceil(V / 32)] of the ids that may come next. Raises ConfigError when that cannot be computed."""
        ...

    def accept(self, token: int) -> None:
        """`token` was chosen."""
        ...

    def fork(self) -> Mask:
        """The same state, independent of this one."""
        ...


def uniform(seed: int, index: int, position: int, lane: int = 0) -> float:
    """A uniform number from 0 up to, not including, 1: 53 bits of blake2b over the four integers (64 bits each).

    `lane` separates several draws for one position (0 is the token itself; speculative decoding uses others).
    """
    data = blake2b(struct.pack("<QQQQ", seed, index, position, lane), digest_size=8).digest()
    return (int.from_bytes(data, "little") >> 11) / (1 << 53)


class RowState:
    """What choosing the next token of one sequence needs: parameters, seed, what was used so far, and a mask.

    `prompt` and `generated` are ids; `index` is the sequence's among the replies of its request. `stop_ids` are all ids that
    end the reply (empty when they are ignored): they are banned before `min_tokens`. `seed` is that of the parameters, or a
    fresh one when they have none: give the same to all replies of a request. A sequence that was preempted can keep its state,
    or get a new one with the tokens it already made as `generated`.

    Raises ConfigError when a bias names an id outside the vocabulary of `vocab_size`.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Iterable[int] = (),
        *,
        vocab_size: int,
        index: int = 0,
        stop_ids: Iterable[int] = (),
        seed: int | None = None,
        mask: Mask | None = None,
        generated: Iterable[int] = (),
    ) -> None:
        self.params, self.index, self.mask = params, index, mask
        self.seed = seed if seed is not None else params.seed if params.seed is not None else secrets.randbits(63)
        self.position = 0
        """Tokens made so far."""
        self._stops = np.array(sorted(stop_ids), dtype=np.int64)
        bias = dict(params.logit_bias)
        self.bias = np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)
        """Ids and what is added to their logits."""
        if len(bias) and max(bias) >= vocab_size:
            raise ConfigError(f"logit_bias names id {max(bias)}, but the vocabulary has {vocab_size}")
        self.counted = Uses() if params.presence_penalty or params.frequency_penalty else None
        """Uses in the reply, when they are penalised."""
        self.seen = Uses(prompt) if params.repetition_penalty != 1 else None
        """Uses in prompt and reply, when they are penalised."""
        for token in generated:
            self.append(token)

    @property
    def wants_logprobs(self) -> int | None:
        """How many alternatives to report, 0 for the chosen token's log-probability alone, None for nothing."""
        if self.params.logprobs is None and self.params.candidates > self.params.n:
            return 0  # best_of compares them
        return self.params.logprobs

    def append(self, token: int) -> None:
        """`token` was chosen (by the sampler, or accepted from a draft)."""
        self.position += 1
        for uses in (self.counted, self.seen):
            if uses is not None:
                uses.add(token)
        if self.mask is not None:
            self.mask.accept(token)

    def fork(self, index: int | None = None) -> RowState:
        """The same state, independent of this one; with `index` as another reply of the same request."""
        other = object.__new__(RowState)
        other.__dict__.update(self.__dict__)
        other.counted = None if self.counted is None else self.counted.copy()
        other.seen = None if self.seen is None else self.seen.copy()
        other.mask = None if self.mask is None else self.mask.fork()
        other.index = self.index if index is None else index
        return other

    def uniform(self, lane: int = 0, *, ahead: int = 0) -> float:
        """The uniform number of this position, or of one that is `ahead`, see `uniform`."""
        return uniform(self.seed, self.index, self.position + ahead, lane)

    @property
    def plain(self) -> bool:
        """Nothing changes the logits before temperature and filters."""
        free = self.mask is None and self.counted is None and self.seen is None
        return free and not len(self.bias[0]) and not len(self.banned)

    @property
    def banned(self) -> NDArray[np.int64]:
        """Ids that may not come at this position: stop ids before the minimum length."""
        return self._stops if self.position < self.params.min_tokens else self._stops[:0]

    def adjust(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """`row` [V] with bias, bans, mask and penalties: itself when there are none, otherwise a copy."""
        if self.plain:
            return row
        row = row.copy()
        add_bias(row, *self.bias)
        ban(row, self.banned)
        if self.mask is not None:
            keep_allowed(row, self.mask.allowed())
        if self.seen is not None:
            penalize_repetition(row, self.seen.ids, self.params.repetition_penalty)
        if self.counted is not None:
            penalize(row, self.counted, self.params.presence_penalty, self.params.frequency_penalty)
        return row


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome: a token, or None and what is wrong (that request alone ends with it).

    `logprob` is given when the row wants log-probabilities; `top` maps its `params.logprobs` likeliest ids to theirs, best first.
    """

    token: int | None
    logprob: float | None = None
    top: dict[int, float] | None = None
    error: str | None = None


class Sampler:
    """Chooses the next tokens of a batch. It has no state; rows do."""

    def sample(self, logits: Tensor, rows: Sequence[RowState]) -> list[Sampled]:
        """One outcome per row of `logits` [R, V]; logits are not changed.

        A NaN, a positive infinity or nothing that may be chosen makes that row an error. Rows are not advanced: call
        `row.append(token)` for what is kept.
        """
        assert logits.shape[:-1] == (len(rows),), f"{tuple(logits.shape)} for {len(rows)} rows"
        if logits.device.type != "cpu":
            return self.on_device(logits, rows)
        values = _host(logits)
        return [self._one(values[i], row) for i, row in enumerate(rows)]

    def on_device(self, logits: Tensor, rows: Sequence[RowState]) -> list[Sampled]:
        """The same as `sample`, for logits on a GPU: all rows at once, where they lie (see `herd.engine.device_sample`)."""
        masks, errors = _masks(rows)
        chosen = device_sample.choose(logits, rows, masks)
        found = [
            Sampled(None, error=error or (NOTHING_LEFT if finite else NOT_FINITE))
            if error or not finite or not left
            else Sampled(token)
            for (token, finite, left), error in zip(chosen, errors, strict=True)
        ]
        asked = [i for i, row in enumerate(rows) if row.wants_logprobs is not None and found[i].error is None]
        if asked:
            counts = [rows[i].wants_logprobs or 0 for i in asked]
            scores = device_sample.logprobs(logits[asked], [chosen[i][0] for i in asked], counts)
            for i, (logprob, top) in zip(asked, scores, strict=True):
                found[i] = Sampled(chosen[i][0], logprob, None if rows[i].params.logprobs is None else top)
        return found

    def distribution(self, logits: Tensor, row: RowState) -> Weights:
        """What one row would be drawn from, logits [V]: for speculative decoding. Greedy is all on one id.

        Raises ConfigError with the reason when nothing can be chosen.
        """
        found = self._weights(_host(logits), row)
        if isinstance(found, str):
            raise ConfigError(found)
        if isinstance(found, int):
            return Weights(np.array([found]), np.ones(1, dtype=np.float32))
        return found.copy()

    def _one(self, values: NDArray[np.float32], row: RowState) -> Sampled:
        found = self._weights(values, row)
        if isinstance(found, str):
            return Sampled(None, error=found)
        token = found if isinstance(found, int) else draw(found, row.uniform())
        if (count := row.wants_logprobs) is None:
            return Sampled(token)
        logprob, top = chosen_and_best(values, token, count)
        return Sampled(token, logprob, None if row.params.logprobs is None else top)

    def _weights(self, values: NDArray[np.float32], row: RowState) -> Weights | int | str:
        """The distribution of a row, its best token when it is greedy, or what is wrong."""
        best = int(values.argmax())  # a NaN counts as the largest
        if not isfinite(values[best]):
            return NOT_FINITE
        try:
            adjusted = row.adjust(values)
        except ConfigError as error:
            return str(error)
        if adjusted is not values:
            best = int(adjusted.argmax())
            if not isfinite(adjusted[best]):
                return NOTHING_LEFT
        return best if row.params.temperature == 0 else weigh(adjusted, row.params)


def _masks(rows: Sequence[RowState]) -> tuple[list[NDArray[np.int32] | None], list[str | None]]:
    """The allowed bits of the rows that have a constraint, and what went wrong in getting them."""
    masks: list[NDArray[np.int32] | None] = [None] * len(rows)
    errors: list[str | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if row.mask is not None:
            try:
                masks[i] = row.mask.allowed()
            except ConfigError as error:
                errors[i] = str(error)
    return masks, errors


def _host(logits: Tensor) -> NDArray[np.float32]:
    """The same numbers as a float32 array in main memory; a view where they already are."""
    return logits.detach().to("cpu", torch.float32).numpy()
