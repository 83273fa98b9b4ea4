"""Meta checkpoints: any number of ranks, every generation, equal to transformers' logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from herd.checkpoint.fill import fill
from herd.checkpoint.meta import MetaStore
from herd.checkpoint.open import open_store
from herd.model.config import ModelConfig
from tests.build import DENSE, TINY, build, tiny, tokens
from tests.checkpoint.folders import meta_shards, oracle, write_meta
from tests.parity.oracles import hf_logits

Measured = Callable[[str, str, float], None]

TABLE = "checkpoints: fp32 logits against transformers, max abs difference"


def divisible(name: str, ranks: int) -> ModelConfig:
    """A tiny config whose heads and widths can be cut for `ranks`."""
    config = tiny(name)
    heads = max(ranks, config.n_heads) if config.n_heads % ranks else config.n_heads
    groups = config.n_heads // config.n_kv_heads
    kv = heads if groups == 1 else max(ranks, config.n_kv_heads)
    return replace(config, dim=heads * 16, n_heads=heads, n_kv_heads=kv)


def runnable(name: str) -> bool:
    """Configs that params.json can describe: its NoPE pattern is regular and its dense width follows the rule."""
    return name not in ("llama-guard-4",)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", [name for name in TINY if runnable(name)])
def test_logits_equal(tmp_path: Path, name: str, ranks: int, measured: Measured) -> None:
    model = build(divisible(name, ranks))
    columns = name in ("llama-1", "llama-2", "llama-2-70b", "code-llama")
    high = {"rope_high_freq_factor": 1.0} if "scout" in name or "top-2" in name else {}
    write_meta(tmp_path, model, ranks, columns=columns, **high)
    store = open_store(tmp_path)
    assert store.kind == "meta"
    loaded = fill(store)
    assert loaded.config == replace(model.config, max_seq_len=loaded.config.max_seq_len)
    for ours, theirs in zip(loaded.state_dict().items(), model.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1]), ours[0]
    ids = tokens(model.config, 40, batch=2)
    worst = float((loaded(ids) - hf_logits(oracle(model), ids)).abs().max())
    measured(TABLE, f"Meta, {name}", worst)
    assert worst <= 1e-5
