"""Engines with drafters: the same replies as without, on every generation, whatever is guessed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as Seq

import numpy as np
import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine.config import EngineConfig
from herd.engine.draft_model import ModelDrafter, check_vocabularies
from herd.engine.engine import Engine
from herd.engine.ngram import NgramDrafter
from herd.engine.pace import Pace
from herd.engine.request import Request, Sequence, TokenEvent
from herd.engine.runner import TorchRunner
from herd.engine.speculate import Ask, Draft, Drafter, Speculation
from herd.errors import ConfigError
from herd.model.config import ModelConfig, plain
from herd.model.llama import Llama
from tests.build import TINY, build, tiny
from tests.engine.test_speculate import CONFIDENCE, fits
from tests.modes.pairs import pairs

PROMPTS = ([1, 2, 3, 4, 1, 2, 3], [5, 6, 7], [9] * 20, list(range(40)))


class Guesser:
    """Right guesses from replies that are known, wrong ones, and none, at random."""

    def __init__(self, known: dict[str, list[int]], seed: int, vocab: int) -> None:
        self.known, self.draw, self.vocab = known, random.Random(seed), vocab
        self.forgotten: list[str] = []

    def check(self, config: ModelConfig) -> None:
        pass

    def draft(self, asked: Seq[Ask]) -> list[Draft]:
        return [self._one(ask) for ask in asked]

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence.request.id)

    def _one(self, ask: Ask) -> Draft:
        rest = self.known[ask.sequence.request.id][ask.sequence.made :]
        ids = rest[: self.draw.randrange(ask.count + 1)]
        ids += [self.draw.randrange(self.vocab) for _ in range(self.draw.randrange(3))]
        return Draft(tuple(ids[: ask.count]))


def engine(model: Llama, drafter: Drafter | None = None, **config: object) -> Engine:
    config = {"blocks": 64, "block_size": 4, "max_len": 120, "max_tokens": 64, "debug": True, **config}
    made = Engine(model, EngineConfig(**config), runner=TorchRunner(model))  # type: ignore[arg-type]
    if drafter is not None:
        made.speculation = Speculation(drafter, model.config, pace=Pace(5, always=True))
    return made


def run(made: Engine, requests: Seq[Request]) -> dict[str, list[TokenEvent]]:
    """All events by request id."""
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        made.add(request)
    for _ in range(3000):
        if not made.busy:
            break
        for event in made.step():
            events[event.request_id].append(event)
    assert not made.busy
    for found in events.values():
        for index in {event.index for event in found}:
            ends = [event.finish is not None for event in found if event.index == index]
            assert ends == [False] * (len(ends) - 1) + [True]
        assert found[-1].error is None
    return events


def replies(events: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {name: [e.token for e in found if e.token is not None] for name, found in events.items()}


def requests(**params: object) -> list[Request]:
    params = {"max_tokens": 24, "seed": 3, **params}
    return [Request(f"r{i}", tuple(p), SamplingParams(**params)) for i, p in enumerate(PROMPTS)]  # type: ignore[arg-type]


def small(name: str) -> Llama:
    """A draft model for `name`: one layer, other weights."""
    config = tiny(name)
    return build(ModelConfig(**{f: getattr(config, f) for f in DRAFT_FIELDS}, layers=plain(1)), seed=5)


DRAFT_FIELDS = ("dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "rope_theta", "max_seq_len")
KINDS = {
    "prompt lookup": lambda name: NgramDrafter(5, shortest=1),
    "other model": lambda name: ModelDrafter(small(name), same_tokens=True),
    "the model itself": lambda name: ModelDrafter(build(name), same_tokens=True, runner=TorchRunner(build(name))),
}


@pytest.mark.parametrize(("name", "kind"), pairs(TINY, KINDS))
def test_greedy_is_the_same_token_for_token(name: str, kind: str) -> None:
    model = build(name)
    asked = requests(temperature=0)
    alone = replies(run(engine(model), asked))
    made = engine(model, KINDS[kind](name))
    assert replies(run(made, asked)) == alone
    assert made.speculation is not None
    assert made.speculation.pace.drafted > 0
    if kind == "the model itself":
        assert made.speculation.pace.accepted >= 0.9 * (made.speculation.pace.drafted - 5 * len(asked))


@pytest.mark.parametrize(("name", "kind"), pairs(["llama-3.2", "llama-4-scout"], KINDS))
def test_sampled_is_the_same_for_a_seed(name: str, kind: str) -> None:
    """Guesses made with the token's own random number, or with none, never change a token."""
    model = build(name)
    asked = requests(temperature=0.7, top_p=0.9, frequency_penalty=0.3, logprobs=2)
    alone, with_guesses = run(engine(model), asked), run(engine(model, KINDS[kind](name)), asked)
    assert replies(with_guesses) == replies(alone)
    for a, b in zip(itertools.chain(*alone.values()), itertools.chain(*with_guesses.values()), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert (a.top_logprobs or {}).keys() == (b.top_logprobs or {}).keys()


def test_several_replies_and_preemption() -> None:
    """n replies share a prompt; a pool that is too small preempts; replies are those of a large pool without guesses."""
    model = build("llama-3")
    asked = requests(temperature=0.9, n=3, max_tokens=20)
    expected = run(engine(model, max_seqs=16, blocks=400), asked)
    made = engine(model, NgramDrafter(5, shortest=1), max_seqs=16, blocks=34)
    found = run(made, asked)
    for name, events in expected.items():
        for index in range(3):
            one, other = (
                [e.token for e in es if e.index == index and e.token is not None] for es in (events, found[name])
            )
            assert one == other


@pytest.mark.parametrize("limit", ["max_tokens", "stop", "context"])
def test_an_end_inside_an_accepted_run(limit: str) -> None:
    """All guesses are right, and the reply ends in the middle of them: nothing comes after its end."""
    model = build("llama-3")
    (full,) = replies(
        run(engine(model, max_len=100), [Request("r", (1, 2, 3), SamplingParams(temperature=0, max_tokens=90))])
    ).values()
    at = 7
    params = {"max_tokens": {"max_tokens": 8}, "stop": {"stop_ids": frozenset([full[at]])}, "context": {}}[limit]
    made = engine(model, Guesser({"r": full}, 0, 2), max_len=11 if limit == "context" else 100)
    (events,) = run(made, [Request("r", (1, 2, 3), SamplingParams(temperature=0, **params))]).values()  # type: ignore[arg-type]
    tokens = [e.token for e in events]
    expected = full[:8] if limit != "stop" else full[: full.index(full[at]) + 1]
    assert tokens == expected
    assert events[-1].finish == {"max_tokens": "length", "stop": "stop", "context": "context_full"}[limit]


def test_min_tokens_inside_an_accepted_run() -> None:
    model = build("llama-3")
    for least in (3, 9):
        params = SamplingParams(temperature=0, max_tokens=30, min_tokens=least, stop_ids=frozenset(range(0, 384, 3)))
        asked = [Request("r", (1, 2, 3), params)]
        expected = replies(run(engine(model), asked))
        for seed in range(5):
            assert replies(run(engine(model, Guesser(expected, seed, 384)), asked)) == expected


def test_thousands_of_random_guesses() -> None:
    """Right, wrong and no guesses in random order, requests that come and go: every invariant holds after each step, replies
    are those without guesses, and the drafter hears of every end."""
    model = build("llama-3.2")
    draw = random.Random(4)
    asked = [
        Request(
            str(i),
            tuple(draw.randrange(384) for _ in range(draw.randrange(1, 30))),
            SamplingParams(max_tokens=draw.randrange(1, 40), temperature=draw.choice([0, 0.8]), seed=i),
        )
        for i in range(60)
    ]
    expected = replies(run(engine(model, max_seqs=8), asked))
    guesser = Guesser(expected, 1, 384)
    made = engine(model, guesser, blocks=40, max_seqs=8)
    found: dict[str, list[int]] = {request.id: [] for request in asked}
    waiting, aborted = list(asked), set()
    while waiting or made.busy:
        for _ in range(draw.randrange(3)):
            if waiting:
                made.add(waiting.pop())
        if draw.random() < 0.05:
            made.abort(victim := str(draw.randrange(60)))
            aborted.add(victim)
        for event in made.step():
            if event.token is not None:
                found[event.request_id].append(event.token)
    assert made.speculation is not None
    assert made.speculation.pace.drafted > 1000
    assert 100 < made.speculation.pace.accepted < made.speculation.pace.drafted
    for name, tokens in expected.items():
        assert found[name] == (tokens[: len(found[name])] if name in aborted else tokens)
    made.speculation.propose([], lambda s: s.state.sampling)
    assert len(guesser.forgotten) == len(set(guesser.forgotten)) > 40


def small_vocabulary(seed: int) -> Llama:
    """Four tokens, so that whole replies can be counted."""
    config = ModelConfig(
        dim=16, n_heads=1, n_kv_heads=1, head_dim=16, hidden_dim=32, vocab_size=4, layers=plain(1), max_seq_len=64
    )
    return build(config, seed)


@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("prompt lookup", "same tokens")), "standard rule"],
)
def test_exact_in_distribution_end_to_end(kind: str) -> None:
    """Joint distribution of three sampled tokens through the whole engine, against the model's own probabilities."""
    model, params, prompt = small_vocabulary(1), {"temperature": 1.3, "top_p": 0.95}, (0, 1, 2, 0, 1)
    drafter: Drafter = NgramDrafter(3, shortest=1)
    if kind != "prompt lookup":
        drafter = ModelDrafter(small_vocabulary(2), count=3, same_tokens=kind == "same tokens")
    made = engine(model, drafter, max_seqs=16, debug=False, blocks=200)
    asked = [
        Request(str(i), prompt, SamplingParams(max_tokens=3, seed=i, **params))  # type: ignore[arg-type]
        for i in range(700)
    ]
    counts = np.zeros((4, 4, 4))
    for tokens in replies(run(made, asked)).values():
        counts[tuple(tokens)] += 1
    assert made.speculation is not None
    assert 0.1 < made.speculation.pace.accepted / made.speculation.pace.drafted < 0.95
    chances = np.zeros((4, 4, 4))
    texts = list(itertools.product(range(4), repeat=3))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *text] for text in texts]))[:, len(prompt) - 1 :]
    for text, rows in zip(texts, logits, strict=True):
        p = torch.stack([nucleus(row / 1.3, 0.95) for row in rows[:3]])
        chances[text] = float(p[torch.arange(3), torch.tensor(text)].prod())
    assert fits(counts, chances) > CONFIDENCE


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Top-p written again: the likeliest tokens until the mass before them exceeds p."""
    p, order = logits.double().softmax(-1).sort(descending=True)
    p = p.where(p.cumsum(-1) - p <= top_p, 0)
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


def test_the_standard_rule_accepts_more() -> None:
    """What `same_tokens` costs, with the same draft model and requests."""
    model = small_vocabulary(1)
    rates = {}
    for same in (True, False):
        made = engine(model, ModelDrafter(small_vocabulary(2), count=3, same_tokens=same), debug=False)
        run(made, [Request(str(i), (0, 1), SamplingParams(max_tokens=40, seed=i)) for i in range(8)])
        assert made.speculation is not None
        rates[same] = made.speculation.pace.accepted / made.speculation.pace.drafted
    assert rates[False] > rates[True]


def test_a_draft_model_without_room_guesses_less() -> None:
    """The draft cache is too small for all: replies stay right, nothing leaks."""
    model = build("llama-3")
    asked = requests(temperature=0)
    expected = replies(run(engine(model), asked))
    drafter = ModelDrafter(build("llama-3"), tokens=64)
    made = engine(model, drafter)
    assert replies(run(made, asked)) == expected
    assert made.speculation is not None
    assert made.speculation.pace.accepted > 0
    made.speculation.propose([], lambda s: s.state.sampling)
    counts = drafter.pool.counts
    assert counts["free"] == counts["total"]


def test_a_drafter_that_fails_is_left_alone() -> None:
    class Broken(Guesser):
        def draft(self, asked: Seq[Ask]) -> list[Draft]:
            raise RuntimeError("no memory")

    model = build("llama-3")
    asked = requests(temperature=0)
    expected = replies(run(engine(model), asked))
    with pytest.warns(UserWarning, match="speculative decoding is switched off: RuntimeError: no memory") as said:
        assert replies(run(engine(model, Broken({}, 0, 2)), asked)) == expected
    assert len(said) == 1


def test_vocabularies_must_be_the_same() -> None:
    with pytest.raises(ConfigError, match=r"384 ids and the model one of 320"):
        Engine(build("llama-2"), EngineConfig(blocks=8, max_len=64), drafter=ModelDrafter(build("llama-3")))


class Words:
    """As much of a tokenizer as the comparison looks at."""

    def __init__(self, pieces: list[bytes], special: dict[str, int]) -> None:
        self.pieces, self.vocab_size = pieces, len(pieces)
        self.special = type("Special", (), {"ids": special})()

    def bytes_of(self, id: int) -> bytes:
        return self.pieces[id]


def test_pieces_must_be_the_same() -> None:
    ours = Words([b"a", b"b", b""], {"<s>": 2})
    check_vocabularies(ours, Words([b"a", b"b", b""], {"<s>": 2}))  # type: ignore[arg-type]
    for other, why in (
        (Words([b"a", b"b"], {"<s>": 2}), "has 2 tokens"),
        (Words([b"a", b"c", b""], {"<s>": 2}), "id 1 is b'b'"),
        (Words([b"a", b"b", b""], {"<s>": 1}), "'<s>' differs"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_vocabularies(ours, other)  # type: ignore[arg-type]


def test_deterministic_refuses_guesses_that_change_replies() -> None:
    config = EngineConfig(blocks=16, max_len=64, deterministic=True)
    with pytest.raises(ConfigError, match="same_tokens=True"):
        Engine(build("llama-3"), config, drafter=ModelDrafter(build("llama-3")))
    for drafter in (ModelDrafter(build("llama-3"), same_tokens=True), NgramDrafter()):
        Engine(build("llama-3"), config, drafter=drafter)
