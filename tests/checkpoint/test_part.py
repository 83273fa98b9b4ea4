"""One rank's part of a checkpoint: the parts are the whole, in every format; each takes its share of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from herd.checkpoint.fill import fill as filled
from herd.checkpoint.open import open_store
from herd.checkpoint.part import PartStore
from herd.errors import CheckpointError, ConfigError
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.parallel.part import Part
from herd.parallel.plan import cut_of
from herd.quant.scheme import QuantTensor
from tests.build import fill, tiny
from tests.checkpoint.folders import oracle, write_hf, write_meta
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.peaks import needs_peaks, run
from tests.quant.wide import EXPERTS, WIDE

SCOUT = replace(tiny("llama-4-scout"), n_heads=10, n_kv_heads=2)


def as_hf(folder: Path, model: Llama) -> Path:
    write_hf(folder, model)
    return folder


def as_meta_4(folder: Path, model: Llama) -> Path:
    return write_meta(folder, model, 2)


def as_meta_2(folder: Path, model: Llama) -> Path:
    return write_meta(folder, model, 2, columns=True)


def as_gguf(folder: Path, model: Llama) -> Path:
    return write_gguf(folder / "model.gguf", oracle(model), GGMLQuantizationType.Q8_0)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("write", "config", "ranks"),
    [
        (as_hf, tiny("llama-3"), 2),
        (as_hf, SCOUT, 2),
        (write_meta, tiny("llama-2"), 4),
        (as_meta_4, tiny("llama-2"), 4),
        (as_meta_2, tiny("llama-2"), 2),
        (as_meta_2, tiny("llama-2"), 4),
        (as_gguf, WIDE, 4),
    ],
)
def test_the_parts_are_the_whole(
    write: Callable[[Path, Llama], Path], config: ModelConfig, ranks: int, tmp_path: Path
) -> None:
    store = open_store(write(tmp_path, fill(Llama(config))))
    parts = [PartStore(store, Part(store.config, rank, ranks)) for rank in range(ranks)]
    for name in store.names():
        whole = store.read(name)
        back, seen = torch.full_like(whole, float("nan")), 0
        for one in parts:
            cut = one.part.cut(name, tuple(whole.shape))
            own = one.read(name)
            assert tuple(own.shape) == one.info(name).shape
            again = torch.empty_like(own, dtype=torch.float32)
            one.read_into(name, again)
            assert torch.equal(again, own.float())
            (back if cut is None else back.narrow(*cut)).copy_(own)
            seen += one.info(name).nbytes
            blocks = one.raw(name)
            if isinstance(blocks, QuantTensor):
                assert torch.equal(blocks.dequantize(), own)
        assert torch.equal(back, whole), name
        if cut_of(name) is not None and config.n_kv_heads >= ranks:
            assert seen == store.info(name).nbytes, name  # what is cut is held once


def test_more_ranks_than_key_heads(tmp_path: Path) -> None:
    """Neighbours hold the same head."""
    store = open_store(write_meta(tmp_path, fill(Llama(tiny("llama-3")))))
    whole = store.read("layers.0.attention.wk.weight")
    for rank in range(4):
        own = PartStore(store, Part(store.config, rank, 4)).read("layers.0.attention.wk.weight")
        assert torch.equal(own, whole[rank // 2 * 16 : (rank // 2 + 1) * 16])


def test_blocks_are_not_cut(tmp_path: Path) -> None:
    """Rows of 512 numbers for four ranks are 128 each, and a block of Q6_K has 256."""
    path = write_gguf(tmp_path / "model.gguf", oracle(fill(Llama(WIDE))), GGMLQuantizationType.Q6_K)
    part = Part(WIDE, 1, 4)
    with pytest.raises(CheckpointError, match=r"feed_forward|attention.*Q6_K blocks of 256: 4 ranks"):
        filled(PartStore(open_store(path), part), weights="stored")
    plain = filled(PartStore(open_store(path), part), weights="plain", dtype=torch.float32)
    whole = filled(open_store(path), weights="plain", dtype=torch.float32)
    for layer, own in zip(whole.layers, plain.layers, strict=True):
        assert torch.equal(own.feed_forward.w2.weight, layer.feed_forward.w2.weight[:, 128:256])


@pytest.mark.parametrize(
    ("config", "ranks", "said"),
    [
        (tiny("llama-3"), 3, "2 key/value heads"),
        (tiny("llama-2"), 8, "4 query heads"),
        (replace(tiny("llama-2"), hidden_dim=175), 2, "175 units of hidden_dim"),
        (replace(EXPERTS, moe=replace(EXPERTS.moe, hidden_dim=255)), 2, "255 units of an expert"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_counts(config: ModelConfig, ranks: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Part(config, 0, ranks)


PEAK = """
import torch
from herd.checkpoint.open import open_store
from herd.checkpoint.part import PartStore
from herd.checkpoint.fill import fill
from herd.parallel.part import Part
torch.zeros(8) @ torch.zeros(8)
open_store(sys.argv[1])
for ranks in (1, 4):
    before = restart()
    store = open_store(sys.argv[1])
    model = fill(PartStore(store, Part(store.config, ranks - 1, ranks)), torch.float32)
    for weight in model.parameters():
        weight.sum()
    print(ranks, peak() - before)
    del model, store
"""
SLACK = 1.35
"""Beside its share a rank holds norms, one matrix that is being copied, and pages of the file that come in neighbourhoods."""


@needs_peaks
def test_a_rank_takes_its_share_of_memory(tmp_path: Path) -> None:
    config = replace(WIDE, dim=1024, hidden_dim=4096, vocab_size=8192, head_dim=64, n_heads=16, n_kv_heads=8)
    write_meta(tmp_path, Llama(config).to(torch.bfloat16))
    peaks = {int(ranks): int(grown) for ranks, grown in map(str.split, run(PEAK, tmp_path))}
    weights = 4 * sum(weight.numel() for weight in Llama(config).parameters())
    assert peaks[1] > 0.8 * weights  # some of it was free before
    assert peaks[4] < SLACK * weights / 4, (peaks, weights)
