"""Ragged batches over a paged cache equal the full forward: any mix of sequences, any split, prefix hits, preemption, drafts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.chat.params import SamplingParams
from herd.engine.blocks import BlockPool
from herd.engine.pack import RaggedBatch, pack
from herd.engine.paged import PagedCache
from herd.engine.request import Request
from herd.engine.runner import Runner, TorchRunner
from herd.engine.scheduler import Chunk, Scheduler, StepPlan
from herd.engine.virtual import VirtualTokens
from herd.kernels.paged import dequantize_rows, quantize_rows
from herd.model.attend import Causal
from herd.model.llama import Llama
from tests.build import TINY, build, tiny, tokens
from tests.modes.pairs import pairs
from tests.modes.test_compiled import Graphs
from tests.modes.test_modes import LENGTH, MODES_BOUND, TABLE

Measured = Callable[[str, str, float], None]

HALF_BOUND = {torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Logits of order one after a few layers: a few units of the last place (2^-8, 2^-11), since sums run in another order."""
INT8_BOUND = 5e-3
"""Sums in another order move a number now and then over a rounding step of int8: one element of one key or value is then off
by 1/127 of the largest. The rounding of all of them, which both sides share, moves logits several times as much."""
TEXTS = 6


@cache
def texts(name: str) -> list[list[int]]:
    """Ids of several lengths; some begin alike, two are equal."""
    rows = tokens(tiny(name), LENGTH, batch=TEXTS).tolist()
    rows[1][:40] = rows[0][:40]
    rows[2] = list(rows[0])
    return [row[: LENGTH - 7 * i] for i, row in enumerate(rows)]


@cache
def whole(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The logits of every text alone, in one plain forward."""
    model = Llama(tiny(name)).eval()
    model.load_state_dict(build(name).state_dict())
    with torch.no_grad():
        return [model.to(dtype)(torch.tensor([ids])).float()[0] for ids in texts(name)]


@dataclass
class Seen:
    """What happened on the way."""

    worst: float = 0.0
    rows: int = 0
    cached: int = 0
    preempted: int = 0
    drafted: int = 0
    mixed: int = 0


def run(
    name: str,
    expected: list[Tensor],
    *,
    model: Llama | None = None,
    runner: Runner | None = None,
    seed: int = 0,
    block_size: int = 8,
    spare: int = 6,
    drafts: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scratch: bool = False,
    cache: Callable[..., PagedCache] = PagedCache,
    virtual: VirtualTokens | None = None,
    late: bool = False,
) -> Seen:
    """Feed every text through scheduler, pack and runner, each token after a random prompt as if it had been sampled, and hold
    the logits of every row against `expected`. `spare` blocks beyond what the longest text needs: few mean preemption. With
    `virtual` tokens before every text but each third. `late`: prompts are half of their texts at least, so that there are fewer
    steps, for runners that take long for one.
    """
    draw = random.Random(seed)
    model = build(name) if model is None else model
    config = model.config
    max_len = LENGTH + 4 + (0 if virtual is None else virtual.count)
    pool = BlockPool(-(-max_len // block_size) + spare, block_size)
    scheduler = Scheduler(pool, max_seqs=4, max_tokens=48, max_len=max_len)
    kv = cache(config, blocks=pool.n_blocks, block_size=block_size, dtype=dtype, device=device, spare=scratch)
    runner = TorchRunner(model) if runner is None else runner
    if virtual is not None:
        virtual.put(kv, scheduler.pin("virtual", virtual.count))
    seen = Seen()
    sequences = []
    for i, ids in enumerate(texts(name)):
        cut = draw.randint(len(ids) // 2 if late else 1, len(ids) - 1)
        params = SamplingParams(max_tokens=len(ids) - cut)
        adapter = None if virtual is None or i % 3 == 2 else "virtual"
        sequences += scheduler.add(Request(str(i), tuple(ids[:cut]), params, adapter=adapter))
    while not scheduler.idle:
        scheduler.max_tokens = draw.randint(4, 40)
        if drafts:
            for s in scheduler.running:
                s.drafts = _guess(draw, texts(name)[int(s.request.id)][len(s.tokens) :], config.vocab_size)
        plan = scheduler.plan()
        kv.copy(plan.copies)
        every = StepPlan([replace(chunk, logits=chunk.count) for chunk in plan.rows])
        logits = runner.logits(pack(every, block_size, device), kv).cpu()
        seen.mixed += len({chunk.count > 1 for chunk in plan.rows}) == 2
        sampled = []
        for chunk, rows in zip(plan.rows, logits.split([c.count for c in plan.rows]), strict=True):
            i = int(chunk.sequence.request.id)
            new = _forced(chunk, texts(name)[i])
            good = chunk.count - len(chunk.drafts) + max(len(new) - 1, 0)  # rows whose ids are those of the text
            difference = (rows[:good] - expected[i][chunk.start : chunk.start + good]).abs().max()
            seen.worst = max(seen.worst, float(difference))
            seen.rows += good
            seen.drafted += len(new) - 1 if chunk.drafts else 0
            sampled.append(new)
        scheduler.commit(plan, sampled)
        scheduler.check()
    assert [s.tokens for s in sequences] == texts(name)
    seen.cached = sum(s.cached_tokens or 0 for s in sequences)
    seen.preempted = sum(s.preemptions for s in sequences)
    return seen


def _guess(draw: random.Random, truth: list[int], vocab: int) -> tuple[int, ...]:
    right = draw.randint(0, 3)
    return (*truth[:right], *(draw.randrange(vocab) for _ in range(draw.randint(0, 2))))


def _forced(chunk: Chunk, ids: list[int]) -> list[int]:
    """The tokens of the text that this chunk would have sampled."""
    if not chunk.sample:
        return []
    at = chunk.start + chunk.count - len(chunk.drafts)
    right = 0
    while right < len(chunk.drafts) and at + right + 1 < len(ids) and chunk.drafts[right] == ids[at + right]:
        right += 1
    return ids[at : at + right + 1]


@pytest.mark.parametrize(("name", "block_size"), pairs(TINY, [4, 8, 16]))
def test_any_mix_equals_the_full_forward(name: str, block_size: int, measured: Measured) -> None:
    seen = run(name, whole(name), seed=block_size, block_size=block_size, spare=96 // block_size)
    measured(TABLE, f"{name}, paged, blocks of {block_size}", seen.worst)
    assert seen.worst <= MODES_BOUND
    assert seen.mixed  # prompts and decode rows in one step
    assert seen.cached
    assert seen.drafted


@pytest.mark.parametrize("name", TINY)
def test_after_preemption(name: str, measured: Measured) -> None:
    """A pool hardly larger than the longest text: sequences lose their blocks and are computed again."""
    seen = run(name, whole(name), seed=1, block_size=4, spare=3)
    measured(TABLE, f"{name}, paged, preempted", seen.worst)
    assert seen.preempted
    assert seen.worst <= MODES_BOUND


@pytest.mark.parametrize("name", ["llama-3.2", "llama-4-scout"])
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 1000), block_size=st.sampled_from([1, 3, 4, 16, 32]), spare=st.integers(0, 12))
def test_any_split_and_pressure(name: str, seed: int, block_size: int, spare: int) -> None:
    assert run(name, whole(name), seed=seed, block_size=block_size, spare=spare).worst <= MODES_BOUND


@pytest.mark.parametrize(
    ("name", "dtype"), pairs(["llama-2", "llama-3.2", "llama-guard-4"], [torch.bfloat16, torch.float16])
)
def test_half_precision(name: str, dtype: torch.dtype, measured: Measured) -> None:
    """Dense models: with experts, rounding decides between two that are nearly as good, and the outputs are not comparable."""
    model = Llama(tiny(name)).eval()
    model.load_state_dict(build(name).state_dict())
    seen = run(name, whole(name, dtype), model=model.to(dtype), dtype=dtype)
    measured(f"{dtype} logits against the full forward, max abs difference", f"{name}, paged", seen.worst)
    assert seen.worst <= HALF_BOUND[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_on_a_gpu(name: str, measured: Measured) -> None:
    model = Llama(tiny(name)).eval()
    model.load_state_dict(build(name).state_dict())
    seen = run(name, whole(name), model=model.cuda(), device="cuda")
    measured(TABLE, f"{name}, paged, GPU", seen.worst)
    assert seen.worst <= 10 * MODES_BOUND  # other matrix kernels than those of the full forward, which ran on the CPU


class Rounded:
    """Causal attention over keys and values as an int8 cache keeps them."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        k, v = (dequantize_rows(*quantize_rows(t), t.dtype) for t in (k, v))
        return Causal()(q, k, v, chunk)


@pytest.mark.parametrize("name", TINY)
def test_int8_cache(name: str, measured: Measured) -> None:
    """An int8 cache gives what a full forward gives that rounds keys and values the same way."""
    model = build(name)
    see = [Rounded()] * model.config.n_layers
    with torch.no_grad():
        expected = [model(torch.tensor([ids]), None, see)[0] for ids in texts(name)]
    seen = run(name, expected, dtype=torch.int8)
    measured(TABLE, f"{name}, paged, int8", seen.worst)
    assert seen.worst <= INT8_BOUND
    off = max(float((a - b).abs().max()) for a, b in zip(expected, whole(name), strict=True))
    assert off > 2 * INT8_BOUND  # a cache that does not round, or not like this, would be seen


@pytest.mark.parametrize("name", ["llama-3", "llama-4-maverick"])
def test_continuations_of_one_prompt(name: str) -> None:
    """n replies from one prompt whose last block is partly filled: each has its own copy of it."""
    model, config = build(name), tiny(name)
    prompt, own = tokens(config, 21).tolist()[0], tokens(config, 9, batch=3, seed=5).tolist()
    scheduler = Scheduler(BlockPool(24, 8), max_seqs=4, max_tokens=64, max_len=64)
    kv = PagedCache(config, blocks=24, block_size=8)
    sequences = scheduler.add(Request("a", tuple(prompt), SamplingParams(n=3, max_tokens=9)))
    last: dict[int, Tensor] = {}
    copies = 0
    while not scheduler.idle:
        plan = scheduler.plan()
        kv.copy(plan.copies)
        copies += len(plan.copies)
        logits = TorchRunner(model).logits(pack(plan, 8), kv)
        for chunk, row in zip(plan.rows, logits, strict=True):
            last[chunk.sequence.index] = row
        scheduler.commit(plan, [[own[c.sequence.index][c.sequence.made]] for c in plan.rows])
    assert copies == 2
    with torch.no_grad():
        for s, reply in zip(sequences, own, strict=True):
            assert s.reply == reply
            full = model(torch.tensor([s.tokens[:-1]]))[0, -1]
            assert (last[s.index] - full).abs().max() <= MODES_BOUND


@pytest.fixture
def _one_graph() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_one_graph")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("llama-3.2", torch.float32, marks=pytest.mark.slow),
        pytest.param("llama-4-scout", torch.float32, marks=pytest.mark.slow),
        ("llama-4-maverick", torch.float32),
        ("llama-3.2", torch.int8),
    ],
)
def test_decode_step_compiles_once(name: str, dtype: torch.dtype) -> None:
    """Two sequences, 24 decode steps over the paged cache in one graph: what changes from step to step is in tensors."""
    model, steps, prompts = build(name), 24, (11, 26)
    ids = [row[: n + steps] for row, n in zip(tokens(model.config, 50, batch=2).tolist(), prompts, strict=True)]
    scheduler = Scheduler(BlockPool(32, 8), max_seqs=2, max_tokens=64, max_len=128)
    kv = PagedCache(model.config, blocks=32, block_size=8, dtype=dtype)
    for i, n in enumerate(prompts):
        scheduler.add(Request(str(i), tuple(ids[i][:n]), SamplingParams(max_tokens=steps)))
    graphs = Graphs()

    @torch.compile(backend=graphs, fullgraph=True, dynamic=False)
    def step(batch_tokens: Tensor, positions: Tensor, slots: Tensor, spans: Tensor, tables: Tensor) -> Tensor:
        batch = RaggedBatch(batch_tokens, positions, slots, spans, tables, logit_rows=positions)
        return model.output(model.hidden(model.embed(batch.tokens), batch.positions, kv.bind(batch)))

    see = [Rounded() if dtype == torch.int8 else Causal()] * model.config.n_layers
    with torch.no_grad():
        expected = [model(torch.tensor([row]), None, see)[0] for row in ids]
        while not scheduler.idle:
            plan = scheduler.plan()
            batch = pack(plan, 8, table_width=16)
            if all(chunk.count == 1 for chunk in plan.rows):
                logits = step(batch.tokens, batch.positions, batch.slots, batch.spans, batch.tables)
                for chunk, row in zip(plan.rows, logits, strict=True):
                    full = expected[int(chunk.sequence.request.id)][chunk.start]
                    assert (row - full).abs().max() <= (INT8_BOUND if dtype == torch.int8 else MODES_BOUND)
            else:
                TorchRunner(model).logits(batch, kv)
            scheduler.commit(plan, [[ids[int(c.sequence.request.id)][len(c.sequence.tokens)]] for c in plan.rows])
    assert graphs.count == 1
