"""Foreign tensors planned from canonical ones: the same as the oracles', lazily, in the right dtype."""

from __future__ import annotations

import pytest
import torch

from herd.checkpoint.write.inventory import kept, planned, written_dtype
from herd.errors import CheckpointError
from tests.build import DENSE, LLAMA4, TINY, build
from tests.checkpoint.folders import meta_shards, oracle
from tests.checkpoint.write.stores import MemoryStore


@pytest.mark.parametrize("name", TINY)
def test_hugging_face_tensors(name: str) -> None:
    """Names, shapes and values are those of transformers' own state dict."""
    model = build(name)
    state = oracle(model).state_dict()
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    store = MemoryStore.of(model)
    plans = planned(store, "hf" if name in DENSE else "hf4", kept(store))
    assert store.read_names == []
    assert {p.name for p in plans} == set(state)
    for plan in plans:
        made = plan.make()
        assert made.shape == plan.shape == state[plan.name].shape
        assert plan.nbytes == made.numel() * made.itemsize
        assert torch.equal(made, state[plan.name]), plan.name


@pytest.mark.parametrize("name", LLAMA4)
def test_meta_tensors(name: str) -> None:
    model = build(name)
    (state,) = meta_shards(model, 1)
    store = MemoryStore.of(model)
    for plan in planned(store, "meta4", kept(store)):
        assert torch.equal(plan.make(), state[plan.name]), plan.name


def test_pages_are_released_one_tensor_later() -> None:
    store = MemoryStore.of(build("llama-3"))
    first, second, *_ = planned(store, "hf", kept(store))
    first.make()
    before = list(store.released)
    second.make()
    assert store.released[len(before)] == "tok_embeddings.weight"


def test_widened_norms_go_back() -> None:
    """A float32 norm beside bfloat16 matrices is written in bfloat16 when that is exact, and stays as it is when not."""
    model = build("llama-4-scout")
    store = MemoryStore.of(model, torch.bfloat16)
    exact, router, inexact = "norm.weight", "layers.0.feed_forward.router.weight", "layers.1.ffn_norm.weight"
    for name in (exact, router, inexact):
        store.tensors[name] = store.tensors[name].float()
    store.tensors[inexact][3] = 1 + 2**-12
    stored = {p.name: p.stored for p in planned(store, "gguf", kept(store))}
    assert stored.pop("blk.1.ffn_norm.weight") == "F32"
    assert set(stored.values()) == {"BF16"}
    assert {p.stored for p in planned(store, "gguf", kept(store, torch.float16))} == {"F16"}


def test_a_fused_tensor_takes_the_widest_dtype() -> None:
    store = MemoryStore.of(build("llama-4-scout"), torch.bfloat16)
    store.tensors["layers.0.attention.wk.weight"] = store.tensors["layers.0.attention.wk.weight"].float()
    plans = {p.name: p for p in planned(store, "meta4", kept(store))}
    assert plans["layers.0.attention.wqkv.weight"].stored == "F32"
    assert plans["layers.0.attention.wqkv.weight"].make().dtype == torch.float32
    assert plans["layers.1.attention.wqkv.weight"].stored == "BF16"
    assert written_dtype(list(plans.values())) == torch.bfloat16


def test_refusals() -> None:
    store = MemoryStore.of(build("llama-3"))
    with pytest.raises(CheckpointError, match="not whole Q4_K blocks of 256: choose another type"):
        planned(store, "gguf", lambda name, info: "Q4_K")
    with pytest.raises(CheckpointError, match="experts"):
        planned(MemoryStore.of(build("llama-4-scout")), "hf", lambda name, info: "F32")
    del store.tensors["norm.weight"]
    with pytest.raises(CheckpointError, match=r"norm\.weight.*is missing"):
        planned(store, "hf", lambda name, info: "F32")
