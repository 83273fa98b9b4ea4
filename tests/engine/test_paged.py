from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from herd.chat.params import SamplingParams
from herd.engine.blocks import BlockPool
from herd.engine.pack import pack
from herd.engine.paged import PagedCache, block_bytes, blocks_for
from herd.engine.request import Request
from herd.engine.runner import TorchRunner
from herd.engine.scheduler import Scheduler, StepPlan
from herd.errors import ConfigError
from tests.build import build, tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def scheduler(blocks: int = 16, size: int = 4, max_tokens: int = 16) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), max_seqs=4, max_tokens=max_tokens, max_len=32)


def test_batch_of_a_plan() -> None:
    s = scheduler()
    s.add(Request("a", (7,) * 5, SamplingParams(max_tokens=9)))
    s.commit(s.plan(), [[8]])
    s.add(Request("b", tuple(range(18)), SamplingParams(max_tokens=9)))
    plan = s.plan()
    batch = pack(plan, 4)
    a, b = (chunk.blocks for chunk in plan.rows)
    assert batch.tokens.tolist() == [8, *range(15)]
    assert batch.positions.tolist() == [5, *range(15)]
    assert batch.slots.tolist() == [a[1] * 4 + 1, *(b[p // 4] * 4 + p % 4 for p in range(15))]
    assert batch.spans.tolist() == [[0, 1, 5, 0], [1, 15, 0, 1]]
    assert batch.tables.tolist() == [[*a, 0, 0], b]
    assert batch.logit_rows.tolist() == [0]  # b's prompt goes on
    assert (batch.tables.dtype, batch.spans.dtype) == (torch.int32, torch.int64)
    assert batch.adapters is None
    assert pack(plan, 4, table_width=6).tables.shape == (2, 6)


def test_adapters_of_a_batch() -> None:
    s = scheduler()
    s.add(Request("a", (1, 2), adapter="x"))
    s.add(Request("b", (1, 2)))
    assert pack(s.plan(), 4).adapters == ("x", None)


def test_empty_plan() -> None:
    with pytest.raises(AssertionError):
        pack(StepPlan(), 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes(dtype: torch.dtype) -> None:
    config = tiny("llama-3")
    cache = PagedCache(config, blocks=5, block_size=8, dtype=dtype)
    assert cache.nbytes == 5 * block_bytes(config, 8, dtype)
    assert blocks_for(cache.nbytes, config, 8, dtype) == 5
    assert blocks_for(cache.nbytes - 1, config, 8, dtype) == 4


def test_a_cache_cannot_hold_anything() -> None:
    with pytest.raises(ConfigError, match="cannot hold int64: choose one of float32, bfloat16, float16, int8"):
        PagedCache(tiny("llama-3"), blocks=1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="holds nothing"):
        PagedCache(tiny("llama-3"), blocks=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_one_after_the_other(dtype: torch.dtype) -> None:
    cache = PagedCache(tiny("llama-3"), blocks=4, block_size=2, dtype=dtype)
    for tensor in cache.tensors:
        for block in range(4):
            tensor[block] = block + 1
    cache.copy([(0, 1), (1, 2), (3, 0)])
    for tensor in cache.tensors:
        assert [int(tensor[block].flatten()[0]) for block in range(4)] == [4, 1, 1, 4]


def test_only_wanted_rows_reach_the_output() -> None:
    model = build("llama-3.2")
    s = scheduler(max_tokens=4)
    s.add(Request("a", (1, 2, 3, 4, 5)))
    widths = []
    model.output.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[0]))
    cache = PagedCache(model.config, blocks=16, block_size=4)
    plan = s.plan()
    assert TorchRunner(model).logits(pack(plan, 4), cache).shape == (0, 384)
    s.commit(plan, [[]])
    logits = TorchRunner(model).logits(pack(s.plan(), 4), cache)
    assert logits.shape == (1, 384)
    assert logits.dtype == torch.float32
    assert widths == [0, 1]


def test_a_bf16_model_over_an_fp32_cache_and_back() -> None:
    """The cache's dtype is its own affair: what is read is cast to the model's."""
    for model_dtype, cache_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        model = build("llama-3").to(model_dtype)
        s = scheduler()
        s.add(Request("a", (1, 2, 3)))
        cache = PagedCache(model.config, blocks=16, block_size=4, dtype=cache_dtype)
        with torch.no_grad():
            full = model(torch.tensor([[1, 2, 3]]))[0, -1:].float()
        logits = TorchRunner(model).logits(pack(s.plan(), 4), cache)
        assert (logits - full).abs().max() <= 6e-2  # a few units of bfloat16's last place at order one


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of this process is read from /proc")
def test_a_large_cache_takes_memory_when_it_is_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    cache = PagedCache(tiny("llama-3"), blocks=100_000, dtype=torch.bfloat16)
    assert cache.nbytes > 300 << 20
    assert resident() - before < 100 << 20
    assert not cache.k[1][99_999].any()
    cache.k[1][5] = 1
    assert cache.k[1][4:7].sum() == cache.k[1][5].numel()
    del cache
    gc.collect()
    assert resident() - before < 100 << 20
