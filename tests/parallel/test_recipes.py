"""Recipes over ranks, from a configuration to the result: what is measured, written and exported is what one process gives."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from herd.adapters.prefix import Prefix
from herd.chat.templates import template_of
from herd.checkpoint.open import open_store
from herd.checkpoint.peft import read_peft
from herd.checkpoint.peft_virtual import read_virtual
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.vocabulary import load_tokenizer
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.model.config import ModelConfig, plain
from herd.train import throughput
from herd.train.overrides import load_config
from herd.train.run import run_recipe
from herd.train.watch import Recorder
from tests.build import build, tiny
from tests.parallel.crew import Crew
from tests.train.conftest import measured_once

SAME = 1e-5
"""Of losses of some 8 nats and of figures: sums are taken in another order."""
NEAR = 1e-4
"""Of trained numbers after four steps of 1e-3: AdamW's steps hardly depend on how large a gradient is, so that of the smallest
ones what is lost in the last place shows."""
AVERAGE = "train.average={kind: ema, decay: 0.5}"
SHAPE = {"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 128, "tie_embeddings": True}


def described(folder: Path, out: str, **more: Any) -> Path:
    """The configuration of a short run as a file."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for i in range(12):
            text = f"Once upon a time dog number {i} found a ball in the garden and took it home. "
            (texts / f"{i}.txt").write_text(text * 3)
    run: dict[str, Any] = {
        "recipe": "pretrain",
        "out": str(folder / out),
        "model": {"shape": SHAPE, "tokenizer": "nano", "save_dtype": "float32"},
        "data": {
            "sources": [str(texts)], "length": 64, "rows": 2, "held_out": "20%", "processes": 1, "workers": 0,
            "shards": str(folder / "shards"),
        },
        "train": {
            "budget": {"steps": 4},
            "accumulate": 2,
            "optim": {"lr": 1e-3},
            "evaluate": {"every_steps": 2, "prompts": ["Once upon"], "max_tokens": 5},
        },
        "device": "cpu",
    }  # fmt: skip
    path = folder / f"{out}.json"
    path.write_text(json.dumps(run | more))
    return path


def train(config: Path, overrides: list[str], until: int | None = None, exact: bool = True) -> dict[str, Any]:
    """The run in this process, which may be one of several ranks; what it told."""
    names = {}
    if dist.is_initialized():
        names = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size()), "MASTER_ADDR": "127.0.0.1"}
        names["MASTER_PORT"] = "1"  # the group is there already
    os.environ.update(names)
    seen = Recorder()
    try:
        with patch.object(throughput, "_measured", measured_once):
            run_recipe(
                load_config(config, overrides), watchers=[seen], tell=lambda text: None, until=until, exact=exact
            )
    finally:
        for name in names:
            del os.environ[name]
    return {
        "losses": [step.loss for step in seen.steps],
        "metrics": [dict(step.metrics) for step in seen.steps],
        "figures": [figures for _, figures in seen.evaluations],
        "texts": seen.texts,
    }


def on_ranks(ranks: Crew, count: int, config: Path, overrides: list[str], **options: Any) -> dict[str, Any]:
    """What the main rank told."""
    more = options.get("until"), options.get("exact", True)
    return ranks.run("tests.parallel.test_recipes:train", count, config, overrides, *more)[0]


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert len(found["losses"]) == len(wanted["losses"]) > 1
    assert found["losses"] == pytest.approx(wanted["losses"], abs=SAME)
    assert len(found["figures"]) == len(wanted["figures"]) >= 1
    for one, other in zip(found["figures"], wanted["figures"], strict=True):
        assert one.keys() == other.keys() > {"bits_per_byte"}
        assert one == pytest.approx(other, rel=SAME)
    assert found["texts"] == wanted["texts"] != []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, Any]:
    """One process, full training with an average."""
    return train(described(home, "whole"), [AVERAGE])


@pytest.mark.parametrize(
    "spread",
    [
        {"tp": 2},
        {"pp": 2},
        pytest.param({"cp": 2}, marks=pytest.mark.slow),
        pytest.param({"dp_shard": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "dp_shard": 2}, marks=pytest.mark.slow),
        pytest.param({"dp_shard": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_evaluations_samples_and_averages(
    ranks: Crew, home: Path, whole: dict[str, Any], spread: dict[str, int]
) -> None:
    name = "-".join(f"{key}{value}" for key, value in spread.items())
    overrides = [AVERAGE, *(f"parallel.{key}={value}" for key, value in spread.items())]
    world = 1
    for value in spread.values():
        world *= value
    if "dp_shard" in spread:
        overrides.append("data.rows=1")
    same(on_ranks(ranks, world, described(home, name), overrides), whole)
    one, two = (open_store(home / run / "model") for run in ("whole", name))
    for key in one.names():
        torch.testing.assert_close(two.read(key), one.read(key), rtol=0, atol=NEAR)


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    """A model to adapt, whose rows are whole blocks of NF4 for two ranks, too."""
    sizes: dict[str, Any] = {"dim": 128, "n_heads": 8, "n_kv_heads": 4, "head_dim": 16, "hidden_dim": 256}
    return _written(replace(tiny("llama-3"), layers=plain(4), **sizes), home / "base")


@pytest.fixture(scope="module")
def with_experts(home: Path) -> Path:
    """The same of a model whose layers have routed experts."""
    sizes: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 20}
    return _written(replace(tiny("llama-4-scout"), **sizes), home / "experts")


def _written(config: ModelConfig, folder: Path) -> Path:
    vocabulary = load_tokenizer("nano")
    model = build(replace(config, vocab_size=vocabulary.vocab_size))
    kept = GenerationDefaults(vocabulary.special.stop)
    write_hf(Source(ModelStore(model), vocabulary, kept, template_of("llama3")), folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [
        ("dora", "tp", "pp"),
        pytest.param("lora", "pp", "dp_shard", marks=pytest.mark.slow),
        pytest.param("qlora", "tp", "", marks=pytest.mark.slow),
        pytest.param("qlora", "pp", "tp", marks=pytest.mark.slow),
        pytest.param("prefix", "tp", "cp", marks=pytest.mark.slow),
        pytest.param("prompt", "tp", "cp", marks=pytest.mark.slow),
        pytest.param("prefix", "pp", "dp_shard", marks=pytest.mark.slow),
        pytest.param("prompt", "pp", "", marks=pytest.mark.slow),
        pytest.param("prompt", "dp_shard", "pp", marks=pytest.mark.slow),
        pytest.param("experts", "tp", "pp", marks=pytest.mark.slow),
        pytest.param("experts", "dp_shard", "tp", marks=pytest.mark.slow),
    ],
)
def test_adapters_move_to_other_ranks_and_come_out_the_same(
    ranks: Crew, home: Path, base: Path, with_experts: Path, kind: str, first: str, then: str
) -> None:
    """Two steps spread one way, saved, two more spread another way: what one process does in four."""
    method: dict[str, Any] = {"kind": kind, "rank": 4, "tokens": 4}
    if kind == "experts":
        method, base = {"kind": "lora", "rank": 4, "targets": ["wq", "experts"]}, with_experts
    more = {"model": {"source": str(base)}, "method": method}
    wanted = train(described(home, f"{kind}-{first}-one", **more), [])
    moved = described(home, f"{kind}-{first}-two", **more)

    def over(spread: str) -> list[str]:
        return [f"parallel.{spread}=2", *(["data.rows=1"] if spread == "dp_shard" else [])]

    begun = on_ranks(ranks, 2, moved, over(first), until=2)
    assert begun["losses"] == pytest.approx(wanted["losses"][:2], abs=SAME)
    rest = on_ranks(ranks, 2, moved, over(then), exact=False) if then else train(moved, [], exact=False)
    assert begun["losses"] + rest["losses"] == pytest.approx(wanted["losses"], abs=SAME)
    assert rest["figures"][-1] == pytest.approx(wanted["figures"][-1], rel=SAME)
    assert rest["texts"][-1] == wanted["texts"][-1]
    geometry = open_store(base).config
    one, two = (home / f"{kind}-{first}-{run}" / "adapter" for run in ("one", "two"))
    if kind in ("prefix", "prompt"):
        kept, other = read_virtual(one, geometry), read_virtual(two, geometry)
        fields = ("keys", "values") if isinstance(kept, Prefix) else ("embeddings",)
        pairs = [(getattr(kept, field), getattr(other, field)) for field in fields]
    else:
        lora, again = read_peft(one, geometry), read_peft(two, geometry)
        assert lora.factors.keys() == again.factors.keys()
        both = [(pair, again.factors[name]) for name, pair in lora.factors.items()]
        pairs = [(a.b, b.b) for a, b in both] + [(a.a, b.a) for a, b in both]
        pairs += [(a.magnitude, b.magnitude) for a, b in both if a.magnitude is not None]
        assert all(bool(pair.b.any()) for pair in lora.factors.values())
    for a, b in pairs:
        torch.testing.assert_close(b, a, rtol=0, atol=NEAR)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "spread"),
    [
        ("prompt", {"pp": 2}),
        ("prefix", {"pp": 2}),
        ("experts", {"tp": 2, "experts": "number"}),
        ("full", {"pp": 2, "schedule": "interleaved", "stages": 2}),
    ],
    ids=["prompt", "prefix", "experts", "interleaved"],
)
def test_a_run_goes_on_to_the_bit(
    ranks: Crew, home: Path, base: Path, with_experts: Path, kind: str, spread: dict[str, Any]
) -> None:
    """Stopped after two steps and begun again on the same ranks, of which one may train nothing."""
    method: dict[str, Any] = {"kind": kind, "rank": 4, "tokens": 4}
    if kind == "experts":
        method, base = {"kind": "lora", "rank": 4, "targets": ["wq", "experts"]}, with_experts
    more = {"method": method} | ({} if kind == "full" else {"model": {"source": str(base)}})
    over = [AVERAGE, *(f"parallel.{key}={value}" for key, value in spread.items())]
    wanted = on_ranks(ranks, 2, described(home, f"on-{kind}-whole", **more), over)
    config = described(home, f"on-{kind}-parts", **more)
    begun, rest = on_ranks(ranks, 2, config, over, until=2), on_ranks(ranks, 2, config, over)
    assert begun["losses"] + rest["losses"] == wanted["losses"]
    assert rest["figures"][-1] == wanted["figures"][-1]
    assert rest["texts"][-1] == wanted["texts"][-1]


ROUTED = ["train.router_aux=0.5", "train.router_z=0.1", "train.optim.lr=1e-2"]


@pytest.fixture(scope="module")
def routed(home: Path) -> dict[str, Any]:
    return train(described(home, "routed", **EXPERTS), ROUTED)


EXPERTS: dict[str, Any] = {
    "model": {
        "shape": SHAPE | {"moe": {"n_experts": 4, "top_k": 1, "hidden_dim": 64}},
        "tokenizer": "nano",
        "save_dtype": "float32",
    }
}


@pytest.mark.parametrize(
    "spread",
    [["pp=2"], *(pytest.param(s, marks=pytest.mark.slow) for s in (["tp=2"], ["pp=2", "tp=2"]))],
    ids=str,
)
def test_router_losses(ranks: Crew, home: Path, routed: dict[str, Any], spread: list[str]) -> None:
    """Of two ranks one has the first layer with experts, the other the second: figures are means over both."""
    overrides = ROUTED + [f"parallel.{part}" for part in spread]
    found = on_ranks(ranks, 2 ** len(spread), described(home, f"routed-{len(spread)}{spread[0]}", **EXPERTS), overrides)
    same(found, routed)
    for one, other in zip(found["metrics"], routed["metrics"], strict=True):
        assert one.keys() == other.keys() >= {"router_balance", "router_z", "expert_load", "expert_idle"}
        assert one == pytest.approx(other, rel=SAME)
    without = train(described(home, f"unrouted-{len(spread)}{spread[0]}", **EXPERTS), ROUTED[2:])
    assert abs(without["losses"][-1] - routed["losses"][-1]) > 100 * SAME


VIRTUAL = {"rank": 4, "tokens": 4}
QAT = {"method": {"kind": "full", "qat": "q8_0"}}
MUON = ["train.optim={kind: muon, muon_lr: 1e-3}"]
INTERLEAVED = {"pp": 2, "schedule": "interleaved", "stages": 2}
DEALT = {"tp": 2, "experts": "number"}
SETTINGS: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "qat-tp": (QAT, ["train.budget.steps=2"], {"tp": 2}),
    "qat-pp": (QAT, [], {"pp": 2}),
    "qat-experts": (EXPERTS | QAT, [], DEALT),
    "muon-dp-tp": ({}, MUON, {"dp_shard": 2, "tp": 2}),
    "muon-pp-tp": ({}, MUON, {"pp": 2, "tp": 2}),
    "muon-experts": (EXPERTS, MUON, DEALT),
    "blocks-again": ({}, ["train.checkpointing=full"], {"pp": 2}),
    "exact": ({}, ["train.checkpointing=2", "train.exact_accumulation=true"], {"pp": 2}),
    "one-micro-batch": ({}, ["train.accumulate=1"], {"pp": 2, "schedule": "gpipe"}),
    "interleaved": ({}, [AVERAGE], INTERLEAVED),
    "interleaved-routers": (EXPERTS, ROUTED, INTERLEAVED),
    "copies": ({}, [AVERAGE], {"dp_replicate": 2, "pp": 2}),
    "prompt": ({"method": {"kind": "prompt", **VIRTUAL}}, [AVERAGE], {"pp": 2}),
    "prompt-interleaved": ({"method": {"kind": "prompt", **VIRTUAL}}, [], INTERLEAVED),
    "prefix-8bit": ({"method": {"kind": "prefix", **VIRTUAL}}, ["train.optim.kind=adamw8bit"], {"pp": 2, "tp": 2}),
    "early": ({"method": {"kind": "lora", "rank": 4, "targets": ["layers.0.attention.wq"]}}, [AVERAGE], {"pp": 2}),
}


@pytest.mark.parametrize(
    "name", ["qat-tp", *(pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS if n != "qat-tp")]
)
def test_settings_mean_on_ranks_what_they_mean_alone(ranks: Crew, home: Path, base: Path, name: str) -> None:
    """Optimisers, rounding, checkpointing, averages and schedules together with methods and spreads."""
    more, overrides, spread = SETTINGS[name]
    if "method" in more and more["method"]["kind"] != "full":
        more = more | {"model": {"source": str(base)}}
    wanted = train(described(home, f"{name}-one", **more), overrides)
    over = [*overrides, *(f"parallel.{key}={value}" for key, value in spread.items())]
    if {"dp_shard", "dp_replicate"} & spread.keys():
        over.append("data.rows=1")
    world = math.prod(spread.get(key, 1) for key in ("dp_shard", "dp_replicate", "tp", "pp"))
    same(on_ranks(ranks, world, described(home, f"{name}-ranks", **more), over), wanted)
