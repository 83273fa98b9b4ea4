"""Ranks say how far the numbers of their model are, which come last: nothing takes longer before the first step."""

from __future__ import annotations

import itertools
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from herd.checkpoint.fill import fill
from herd.checkpoint.names import shapes
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.model.llama import Llama
from herd.parallel.settle import settle
from herd.quant.apply import held
from herd.train.config import MethodPart
from herd.train.overrides import load_config
from herd.train.run import run_recipe
from herd.train.start import adapt, random_model, start
from tests.build import build
from tests.parallel import cases, test_recipes
from tests.parallel.crew import Crew

CPU = torch.device("cpu")
Ticks = list[tuple[int, int]]


def _settled(model: Llama) -> Ticks:
    seen: Ticks = []
    settle(model, tick=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, seen[0][1])
    assert all(one < other for (one, _), (other, _) in itertools.pairwise(seen))
    return seen


@pytest.mark.parametrize("name", ["tied", "llama4"])
def test_every_tensor_is_told(name: str) -> None:
    """A tied one once."""
    sizes = [4 * prod(shape) for shape in shapes(cases.CONFIGS[name]).values()]
    model = random_model(cases.CONFIGS[name], 0, torch.float32, CPU)
    seen = _settled(model)
    assert len(seen) == 1 + len(sizes)
    assert seen[-1] == (sum(sizes), sum(sizes))
    again: Ticks = []
    settle(model, tick=lambda done, total: again.append((done, total)))
    assert again == [], "nothing was left to make"


def test_quantized_matrices_are_told(tmp_path: Path) -> None:
    """In bytes of what they take, to a few of tables."""
    write_hf(Source(ModelStore(build(cases.CONFIGS["wide4"])), None, GenerationDefaults(), None), tmp_path)
    model = adapt(
        fill(open_store(tmp_path), torch.float32, CPU, weights="nf4", later=True),
        MethodPart(kind="qlora", rank=4, targets=("experts", "wq")),
        0,
    )
    seen = _settled(model)
    assert seen[-1][0] == seen[-1][1] == pytest.approx(sum(held(model).values()), rel=0.01)
    assert "NF4" in held(model)


def ticks(config: Path, overrides: list[str]) -> list[tuple[str, int, int]]:
    """What one rank of a run was told before its first step."""
    seen: list[Any] = []
    with patch.object(test_recipes, "run_recipe", partial(run_recipe, tick=seen.append)):
        test_recipes.train(config, overrides, until=1)
    return [(one.doing, one.done, one.total) for one in seen if one.doing in ("loading", "drawing weights")]


def test_a_run_tells_how_far_its_model_is(ranks: Crew, tmp_path: Path) -> None:
    """One process of the whole, ranks of their share."""
    config = test_recipes.described(tmp_path, "run")
    whole: Ticks = []
    start(load_config(config), CPU, lambda done, total: whole.append((done, total)))
    assert whole[-1][0] == whole[-1][1]
    over = [
        "parallel.dp_shard=2",
        "data.rows=1",
        "train.budget.steps=2",
        "train.evaluate.prompts=[]",
        "data.held_out=null",
    ]
    over += ["train.evaluate.every_steps=null"]
    for seen in ranks.run("tests.parallel.test_ticks:ticks", 2, config, over):
        assert {doing for doing, _, _ in seen} == {"drawing weights"}
        assert len(seen) == len(whole)
        assert seen[-1][1] == seen[-1][2] <= 0.6 * whole[-1][1]
