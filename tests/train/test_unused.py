from __future__ import annotations

import pytest

from herd.train.forecast import forecast
from herd.train.overrides import load_config
from herd.train.recipes.catalog import names, recipe_file
from herd.train.unused import alone, unused

FILES = ["data.sources=texts", "model.source=nano", "model.shape=null", "model.tokenizer="]


@pytest.mark.parametrize("recipe", names())
def test_recipes_have_no_key_without_effect(recipe: str) -> None:
    config = load_config(recipe_file(recipe), FILES)
    assert [*unused(config), *alone(config)] == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            ["method.kind=full", "method.rank=4"],
            ["method.rank has no effect: it is for method.kind=lora or dora or qlora"],
        ),
        (["method.rank=4"], []),
        (
            ["method.tokens=4", "method.alpha=32"],
            ["method.tokens has no effect: it is for method.kind=prefix or prompt"],
        ),
        (["train.optim.kind=adamw", "train.optim.muon_lr=0.1"], ["train.optim.muon_lr has no effect"]),
        (["train.optim.kind=muon", "train.optim.muon_lr=0.1"], []),
        (
            ["train.schedule.kind=cosine", "train.schedule.decay_fraction=0.5"],
            ["train.schedule.decay_fraction has no effect"],
        ),
        (["train.average.kind=tail", "train.average.decay=0.5"], ["train.average.decay has no effect"]),
        (["train.average.kind=ema", "train.average.decay=0.5"], []),
        (
            ["parallel.schedule=gpipe"],
            ["parallel.schedule has no effect: it is for parallel.pp of 2 or more, and this is 1"],
        ),
        (["parallel.schedule=gpipe", "parallel.pp=2"], []),
        (["parallel.experts=number"], ["parallel.experts has no effect: it is for parallel.tp of 2 or more"]),
        (
            ["parallel.reshard=false", "parallel.dp_replicate=2"],
            ["parallel.reshard has no effect: it is for parallel.dp_shard or parallel.cp of 2 or more, and this is 1"],
        ),
        (["parallel.reshard=false", "parallel.cp=2"], []),
        (["parallel.reshard=false", "parallel.dp_shard=-1"], []),
        (
            ["report.project=a", "report.name=b"],
            ["report.project has no effect: report.to", "report.name has no effect"],
        ),
        (["report.to=wandb", "report.name=b"], []),
    ],
)
def test_keys_of_another_kind_are_told(changed: list[str], told: list[str]) -> None:
    config = load_config(recipe_file("lora"), [*FILES, *changed])
    found = [*unused(config), *alone(config)]
    assert len(found) == len(told)
    for line, beginning in zip(found, told, strict=True):
        assert line.startswith(beginning)


def test_a_run_tells_them_before_it_begins() -> None:
    changed = ["method.kind=full", "method.rank=4", "report.name=a"]
    told = forecast(load_config(recipe_file("lora"), [*FILES, *changed])).warnings
    assert any(text.startswith("method.rank has no effect") for text in told)
    assert any(text.startswith("report.name has no effect") for text in told)
