"""Meta folders written by herd: Meta's own code loads, merges and runs them, torch.load reads them, herd reads them back."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from herd.checkpoint.fill import fill
from herd.checkpoint.meta import MetaStore
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.hf_config import is_dense
from herd.checkpoint.write.meta import rank_counts, write_meta
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.errors import CheckpointError
from herd.model.config import ModelConfig
from herd.model.presets import RELEASES
from tests import vocabularies
from tests.build import TINY, build, tiny, tokens
from tests.checkpoint.folders import meta_shards
from tests.checkpoint.folders import write_hf as by_transformers
from tests.checkpoint.test_meta_load import divisible
from tests.checkpoint.write.test_hf_config import ODD
from tests.parity.meta import _one_rank as one_rank
from tests.parity.meta import meta_logits

EARLY = ("llama-1", "llama-2", "llama-2-70b", "code-llama")

PARITY = 1e-5
"""Meta's fp32 logits of order one, summed in another order."""


def bare(store: Any) -> Source:
    return Source(store, None, GenerationDefaults(), None)


def shards(folder: Path) -> list[dict[str, Tensor]]:
    files = sorted(folder.glob("consolidated.*.pth"))
    return [torch.load(file, weights_only=True, mmap=True) for file in files]


def meant(name: str, ranks: int) -> list[dict[str, Tensor]]:
    """What the format's description asks for, without what is ignored."""
    found = meta_shards(build(divisible(name, ranks)), ranks, columns=name in EARLY)
    return [
        {k: v for k, v in state.items() if not k.endswith(("_extra_state", "rope.freqs", "stats_3E"))}
        for state in found
    ]


def equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(
            name,
            ranks,
            marks=[] if ranks in (2, 8) or name in ("llama-2", "llama-3", "llama-4-scout") else pytest.mark.slow,
        )
        for name in TINY
        for ranks in (1, 2, 4, 8)
    ],
)
def test_every_rank(tmp_path: Path, name: str, ranks: int) -> None:
    """Names, shapes and bytes of every rank, held against the description of the format; herd reads the folder back."""
    model = build(divisible(name, ranks))
    told: list[int] = []
    write_meta(bare(ModelStore(model)), tmp_path, shards=ranks, tick=told.append)
    equal(shards(tmp_path), meant(name, ranks))
    again = fill(open_store(tmp_path))
    assert again.config == model.config
    for (one, ours), (other, theirs) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert one == other
        assert torch.equal(ours, theirs), one


@pytest.mark.parametrize("name", ODD)
def test_odd_models(tmp_path: Path, name: str) -> None:
    model = build(ODD[name])
    write_meta(bare(ModelStore(model)), tmp_path)
    again = fill(open_store(tmp_path))
    assert again.config == model.config
    for name_of, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name_of], tensor), name_of


@pytest.mark.parametrize("name", ["llama-3", "llama-3.1", "llama-3.2", "llama-4-scout", "llama-4-maverick"])
def test_metas_model_runs_it(tmp_path: Path, name: str) -> None:
    """Meta's classes, built from our params.json, take the file strictly and compute the same logits."""
    config = tiny(name)
    if config.rope_scaling is not None and is_dense(config):  # Meta's code knows no other factor
        config = replace(config, rope_scaling=replace(config.rope_scaling, factor=8.0))
    if config.temper is not None:
        config = replace(config, temper=replace(config.temper, floor_scale=8.0))
    model = build(config)
    write_meta(bare(ModelStore(model)), tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    with one_rank():
        if is_dense(config):
            from llama_models.llama3.args import ModelArgs
            from llama_models.llama3.model import Transformer
        else:
            from llama_models.llama4.args import ModelArgs
            from llama_models.llama4.model import Transformer
        theirs = Transformer(ModelArgs(max_seq_len=64, max_batch_size=2, **params))
        (state,) = shards(tmp_path)
        if is_dense(config):
            theirs.load_state_dict(state, strict=True)
        else:  # Meta loads Llama 4 with strict=False; the hooks rename what is fused
            loaded = theirs.load_state_dict(state, strict=False)
            assert not loaded.missing_keys
            assert not loaded.unexpected_keys
    ids = tokens(config, 40, batch=2)
    with torch.no_grad():
        assert float((meta_logits(theirs.eval(), ids) - model(ids)).abs().max()) <= PARITY


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["llama-3", "llama-3.2", "llama-4-scout", "llama-4-maverick"])
def test_metas_code_merges_the_ranks(tmp_path: Path, name: str, ranks: int) -> None:
    """Meta's own resharding of our files gives the tensors of the single file."""
    model = build(divisible(name, ranks))
    for count in (1, ranks):
        write_meta(bare(ModelStore(model)), tmp_path / str(count), shards=count)
    initialize = ModuleType("fairscale.nn.model_parallel.initialize")
    vars(initialize).update(get_model_parallel_rank=lambda: 0, get_model_parallel_world_size=lambda: 1)
    with one_rank(), mock.patch.dict(sys.modules, {initialize.__name__: initialize}):
        sys.modules.pop("llama_models.checkpoint", None)
        from llama_models.checkpoint import convert_moe_weights, reshard_mp
    states = shards(tmp_path / str(ranks))
    (single,) = shards(tmp_path / "1")
    if model.config.moe is not None:
        states = [convert_moe_weights(dict(s), model.config.moe.n_experts) for s in states]
        single = convert_moe_weights(dict(single), model.config.moe.n_experts)
    equal([reshard_mp(states, size=1, rank=0)], [single])


def test_copied_heads(tmp_path: Path) -> None:
    """Twice as many ranks as key/value heads, as Meta's 405B for 16: every head is on two ranks."""
    model = build(tiny("llama-3"))  # 4 heads in 2 groups
    write_meta(bare(ModelStore(model)), tmp_path, shards=4)
    equal(shards(tmp_path), [
        {k: v for k, v in state.items() if k != "rope.freqs"} for state in meta_shards(model, 4, copies=2)
    ])  # fmt: skip
    store = MetaStore(tmp_path)
    assert store.metadata().get("n_kv_heads", 4) == 4  # what each rank's module is built from
    assert store.config == model.config
    for name in store.names():
        assert torch.equal(store.read(name), model.state_dict()[name]), name


@pytest.mark.parametrize("name", ["llama-2", "llama-3.2", "llama-4-scout", "llama-4-maverick"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    """Hugging Face -> Meta for 1, 2 and 4 ranks, each from the one before -> Hugging Face: the same bytes everywhere."""
    model = build(divisible(name, 4)).bfloat16()
    by_transformers(tmp_path / "0", model)
    for step, ranks in enumerate((1, 2, 4), 1):
        write_meta(bare(open_store(tmp_path / str(step - 1))), tmp_path / str(step), shards=ranks)
    write_hf(bare(open_store(tmp_path / "3")), tmp_path / "back", shards=2)
    first, last = open_store(tmp_path / "0"), open_store(tmp_path / "back")
    assert first.config == last.config
    for parameter in first.names():
        assert first.info(parameter) == last.info(parameter), parameter
        assert torch.equal(first.read(parameter).view(torch.int16), last.read(parameter).view(torch.int16)), parameter


def test_which_counts_are_possible() -> None:
    released = {r.id: r.config for r in RELEASES if r.config is not None}
    assert rank_counts(released["llama-3.1-8b"]) == [1, 2, 4, 8, 16]
    assert rank_counts(released["llama-3.1-405b"])[:5] == [1, 2, 4, 8, 16]
    assert rank_counts(released["llama-1-33b"], columns=True) == [1, 2, 4]  # 52 heads
    assert rank_counts(released["llama-4-scout"]) == [1, 2, 4, 8]
    config: ModelConfig = released["llama-2-70b"]
    assert rank_counts(config, columns=True) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("count", [0, 3, 5, 1000])
def test_counts_that_do_not_divide(tmp_path: Path, count: int) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be cut for {count} ranks.* divide by 1, 2, 4: choose"):
        write_meta(bare(ModelStore(build("llama-3"))), tmp_path / "a", shards=count)
    assert not (tmp_path / "a").exists()


def test_side_files(tmp_path: Path) -> None:
    tokenizer = vocabularies.llama3()
    model = build(
        replace(tiny("llama-3"), vocab_size=tokenizer.vocab_size, dim=16, n_heads=2, n_kv_heads=1, head_dim=8)
    )
    source = Source(ModelStore(model.bfloat16()), tokenizer, GenerationDefaults(temperature=0.5), "{{ template }}")
    notes = write_meta(source, tmp_path, shards=2)
    assert len(notes) == 2
    assert "no place for the chat template" in notes[0]
    assert "no place for the sampling defaults" in notes[1]
    names = ["checklist.chk", "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    lines = (tmp_path / "checklist.chk").read_text().splitlines()
    assert lines == [f"{hashlib.md5((tmp_path / name).read_bytes()).hexdigest()}  {name}" for name in names[1:]]
    assert shards(tmp_path)[0]["tok_embeddings.weight"].shape == (tokenizer.vocab_size // 2, 16)


def test_notes(tmp_path: Path) -> None:
    notes = write_meta(bare(ModelStore(build(ODD["irregular llama 4"]))), tmp_path)
    assert "there is no tokenizer" in notes[0]
    assert "Meta's own code does not read layers from params.json" in notes[1]


def test_a_vocabulary_that_metas_file_cannot_hold(tmp_path: Path) -> None:
    from herd.tokenizer.files import load_tokenizer

    nano = load_tokenizer(Path(__file__).parents[3] / "herd" / "embedded" / "nano")
    model = build(replace(tiny("llama-3"), vocab_size=nano.vocab_size))
    notes = write_meta(Source(ModelStore(model), nano, GenerationDefaults(), None), tmp_path)
    assert "Hugging Face's files, which herd reads and Meta's code does not" in notes[0]
    again = load_tokenizer(tmp_path)
    assert again.encode("A llama's wool.") == nano.encode("A llama's wool.")
