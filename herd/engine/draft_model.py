"""Guessing the next tokens with a smaller model of the same vocabulary, which reads the same text through a cache of its own.

What its cache holds of a sequence is compared with the sequence each time: after accepted and rejected guesses, preemption or a
pause, only what is new is computed. All sequences are drafted side by side: one forward per guess.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from torch import Tensor

from herd.engine.blocks import BlockPool, blocks_of
from herd.engine.native import runner_for
from herd.engine.pack import pack
from herd.engine.paged import PagedCache
from herd.engine.request import Sequence
from herd.engine.runner import Runner
from herd.engine.sample import Weights, draw
from herd.engine.sampler import RowState, Sampler
from herd.engine.scheduler import Chunk, StepPlan
from herd.engine.speculate import DRAFT_LANE, Ask, Draft
from herd.errors import ConfigError, HerdError, TokenizerError
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["ModelDrafter", "check_vocabularies"]

BLOCK = 16
PIECE = 512
"""Rows of one forward while the draft model reads a prompt."""


@dataclass(slots=True)
class _Reading:
    """What the cache holds of one sequence: its first `known` tokens, then guesses `beyond`, in `blocks`."""

    known: int = 0
    beyond: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Growing:
    """A draft being made: the sequence's row with the guesses so far."""

    ask: Ask
    reading: _Reading
    row: RowState
    ids: list[int] = field(default_factory=list)
    weights: list[Weights] = field(default_factory=list)
    open: bool = True


class ModelDrafter:
    """Guesses with `model`, up to `count` tokens at a time, sampled with the parameters of the request.

    Its cache holds `tokens` positions of all sequences together; a sequence that finds no room is not guessed for. It reads each
    prompt, once.

    Guesses of sampled requests follow the standard rule: exact in distribution, but which reply a seed gives depends on where
    there were guesses. With `same_tokens` each guess is made with the random number of the token itself, and no token ever
    changes; far fewer guesses are then right (`herd.engine.speculate`). With greedy requests the two are the same.
    """

    def __init__(
        self,
        model: Llama,
        *,
        count: int = 6,
        tokens: int = 32_768,
        same_tokens: bool = False,
        runner: Runner | None = None,
    ) -> None:
        if count < 1 or tokens < BLOCK:
            raise ConfigError(f"{count} guesses with a cache of {tokens} tokens: give at least 1 and {BLOCK}")
        self.model, self.count, self.same_tokens = model, count, same_tokens
        self.runner = runner_for(model) if runner is None else runner
        blocks = tokens // BLOCK
        self.pool = BlockPool(blocks, BLOCK, prefix_cache=False)
        weight = model.norm.weight
        self.cache = PagedCache(model.config, blocks=blocks, block_size=BLOCK, dtype=weight.dtype, device=weight.device)
        self._readings: dict[Sequence, _Reading] = {}
        self._sampler = Sampler()

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError when the vocabularies have different sizes (`check_vocabularies` compares the pieces)."""
        if config.vocab_size != self.model.config.vocab_size:
            raise ConfigError(
                f"the draft model has a vocabulary of {self.model.config.vocab_size:,} ids and the model one of "
                f"{config.vocab_size:,}: guesses need the same; take a draft model of the same family"
            )

    def draft(self, asked: Seq[Ask]) -> list[Draft]:
        """Guesses for each, none where the cache or the draft model's context has no room for its text."""
        growing = [self._begin(ask) for ask in asked]
        for round in range(self.count):
            open = [one for one in growing if one is not None and one.open and round < one.ask.count]
            if not open:
                break
            for one, logits in zip(open, self._logits(open), strict=True):
                self._guess(one, logits)
        for one in growing:
            if one is not None:  # the last guess was not run
                one.reading.known, one.reading.beyond = len(one.ask.sequence.tokens), one.ids[:-1]
        return [_draft(one, self.same_tokens) for one in growing]

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        reading = self._readings.pop(sequence, None)
        if reading is not None:
            self.pool.free(reading.blocks)

    def _begin(self, ask: Ask) -> _Growing | None:
        """Everything of the sequence but its last token is in the cache, and there is room for the guesses; or None."""
        sequence, tokens = ask.sequence, ask.sequence.tokens
        total = len(tokens) + min(ask.count, self.count)
        reading = self._readings.get(sequence)
        if total > self.model.config.max_seq_len:
            return None
        if reading is None:
            reading = self._readings[sequence] = _Reading()
        missing = blocks_of(total, BLOCK) - len(reading.blocks)
        if missing > self.pool.available:
            return None
        reading.blocks += self.pool.allocate(max(0, missing))
        new = tokens[reading.known : reading.known + len(reading.beyond)]
        for guess, token in zip(reading.beyond, new, strict=False):
            if guess != token:
                break
            reading.known += 1
        reading.beyond = []
        reading.known = min(reading.known, len(tokens) - 1)
        while len(tokens) - reading.known > PIECE:
            self._run([Chunk(sequence, reading.known, PIECE, False, 0, reading.blocks)])
            reading.known += PIECE
        return _Growing(ask, reading, ask.row.fork())

    def _logits(self, open: list[_Growing]) -> list[Tensor]:
        """Logits [V] after the last guess of each, or after its text."""
        chunks = []
        for one in open:
            sequence, total = one.ask.sequence, len(one.ask.sequence.tokens)
            if one.ids:
                at = total + len(one.ids) - 1
                chunks.append(Chunk(sequence, at, 1, True, 1, one.reading.blocks, (one.ids[-1],)))
            else:
                known = one.reading.known
                chunks.append(Chunk(sequence, known, total - known, True, 1, one.reading.blocks))
        return list(self._run(chunks))

    def _run(self, chunks: list[Chunk]) -> Tensor:
        batch = pack(StepPlan(chunks), BLOCK, self.cache.device)
        return self.runner.logits(replace(batch, adapters=None), self.cache)  # adapters belong to the other model

    def _guess(self, one: _Growing, logits: Tensor) -> None:
        """One more token, unless nothing can be chosen: the model may still know what."""
        try:
            weights = self._sampler.distribution(logits, one.row)
            token = draw(weights, one.row.uniform(0 if self.same_tokens else DRAFT_LANE))
            if not self.same_tokens:
                one.weights.append(weights.copy())
            one.ids.append(token)
            if token in one.ask.sequence.request.stops:
                one.open = False
            else:
                one.row.append(token)
        except HerdError:
            one.open = False


def check_vocabularies(model: Tokenizer, draft: Tokenizer) -> None:
    """Raise ConfigError unless the same ids stand for the same pieces in both: equal sizes can be a coincidence."""
    if model.vocab_size != draft.vocab_size:
        raise ConfigError(
            f"the draft model's vocabulary has {draft.vocab_size:,} tokens, the model's {model.vocab_size:,}"
        )
    special = dict(model.special.ids), dict(draft.special.ids)
    if special[0] != special[1]:
        name = min(set(special[0].items()) ^ set(special[1].items()))[0]
        raise ConfigError(f"special token {name!r} differs between the draft model's vocabulary and the model's")
    for id in range(model.vocab_size):
        ours, theirs = _bytes(model, id), _bytes(draft, id)
        if ours != theirs:
            raise ConfigError(
                f"id {id} is {ours!r} for the model and {theirs!r} for the draft model: guesses need the same"
            )


def _bytes(tokenizer: Tokenizer, id: int) -> bytes | None:
    try:
        return tokenizer.bytes_of(id)
    except TokenizerError:  # an id in the middle that stands for nothing
        return None


def _draft(one: _Growing | None, same_tokens: bool) -> Draft:
    if one is None:
        return Draft(())
    return Draft(tuple(one.ids), None if same_tokens else tuple(one.weights))
