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
from tests.build import TINY, build, tiny, tokens
from tests.checkpoint.folders import oracle, write_meta
from tests.parity.oracles import hf_logits

Measured = Callable[[str, str, float], None]

TABLE = "checkpoints: fp32 logits against transformers, max abs difference"


def divisible(name: str, ranks: int) -> ModelConfig:
    """A tiny config whose heads and widths can be cut for `ranks`."""
    config = tiny(name)
    kv = config.n_kv_heads if config.n_kv_heads % ranks == 0 else ranks
    heads = -(-config.n_heads // kv) * kv
    return replace(
        config, dim=heads * 16, n_heads=heads, n_kv_heads=heads if config.n_heads == config.n_kv_heads else kv
    )


EVERY_COUNT = ("llama-2", "llama-3", "llama-4-scout")


def runnable(name: str) -> bool:
    """Configs that params.json can describe: its NoPE pattern is regular and its dense width follows the rule."""
    return name not in ("llama-guard-4",)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param(name, ranks, marks=[] if ranks in (1, 4) or name in EVERY_COUNT else pytest.mark.slow)
        for name in TINY
        if runnable(name)
        for ranks in (1, 2, 4, 8)
    ],
)
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


def test_one_rank_is_not_copied(tmp_path: Path) -> None:
    """A single dense shard is handed out as views of the file, experts and fused parts included."""
    for name in ("llama-3", "llama-4-maverick"):
        model = build(name)
        store = MetaStore(write_meta(tmp_path / name, model))
        for parameter in store.names():
            first, second = store.read(parameter), store.read(parameter)
            assert first.data_ptr() == second.data_ptr(), parameter


def test_written_weights_do_not_reach_the_file(tmp_path: Path) -> None:
    store = MetaStore(write_meta(tmp_path, build("llama-3")))
    before = (tmp_path / "consolidated.00.pth").read_bytes()
    fill(store).norm.weight.zero_()
    assert (tmp_path / "consolidated.00.pth").read_bytes() == before


@pytest.mark.parametrize("said", [2, 4])
def test_copied_heads(tmp_path: Path, said: int) -> None:
    """405B for 16 ranks: key/value heads twice, with params.json giving either number."""
    model = build(replace(tiny("llama-3"), dim=64, n_heads=4, n_kv_heads=2))
    store = MetaStore(write_meta(tmp_path, model, 4, copies=2, n_kv_heads=said))
    assert store.config.n_kv_heads == 2
    loaded = fill(store)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_vocabulary_from_the_embedding(tmp_path: Path) -> None:
    """Llama 1 and 2 say vocab_size -1."""
    model = build("llama-2")
    for ranks, columns in ((1, True), (2, True), (2, False)):
        folder = write_meta(tmp_path / f"{ranks}{columns}", model, ranks, columns=columns, vocab_size=-1)
        assert MetaStore(folder).config.vocab_size == model.config.vocab_size


def test_tied_output_as_a_copy(tmp_path: Path) -> None:
    """The output matrix may be stored a second time: it is recognised by its bytes."""
    model = build("llama-3.2")
    write_meta(tmp_path, model)
    state = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    state["output.weight"] = state["output.weight"].clone()
    torch.save(state, tmp_path / "consolidated.00.pth")
    loaded = fill(MetaStore(tmp_path))
    assert loaded.output.weight is loaded.tok_embeddings.weight
    state["output.weight"][5, 3] += 1  # one number makes it another matrix
    torch.save(state, tmp_path / "consolidated.00.pth")
    assert torch.equal(fill(MetaStore(tmp_path)).output.weight, state["output.weight"])


def test_vision_half_is_said(tmp_path: Path) -> None:
    model = build("llama-4-maverick")
    write_meta(tmp_path, model)
    state = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    state["vision_embeddings.vision_encoder.class_embedding"] = torch.zeros(8)
    state["vision_projection.weight"] = torch.zeros(8, 8)
    torch.save(state, tmp_path / "consolidated.00.pth")
    with pytest.warns(UserWarning, match="2 tensors of vision_embeddings, vision_projection are not loaded"):
        fill(MetaStore(tmp_path))


def test_unknown_keys_are_said_once(tmp_path: Path) -> None:
    write_meta(tmp_path, build("llama-3"), new_key=1, newer_key=2)
    with pytest.warns(UserWarning, match="unknown keys are ignored: new_key, newer_key") as said:
        MetaStore(tmp_path)
    assert len(said) == 1
