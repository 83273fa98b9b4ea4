"""The recipes that come with herd, by name: a YAML file each, over a module. Imports no torch."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from herd.errors import ConfigError
from herd.train.overrides import read_yaml

__all__ = ["names", "recipe_file", "recipe_module", "recipe_text", "summary"]


def names() -> list[str]:
    """Every recipe, in the order in which people meet them."""
    order = ["pretrain", "sft", "lora", "qlora", "prefix", "extend"]
    found = {
        Path(entry.name).stem
        for entry in resources.files("herd.train.recipes").iterdir()
        if entry.name.endswith(".yaml")
    }
    return [name for name in order if name in found] + sorted(found - set(order))


NOT_YET = {
    "training by preference": ("dpo", "orpo", "kto", "simpo", "ipo", "ppo", "grpo", "rlhf", "rloo", "reward", "rm"),
    "distillation": ("distill", "distillation", "gkd", "kd"),
}
"""What herd does not train, by the names under which people ask for it."""


def recipe_file(name: str) -> Path:
    """Where the YAML of `name` lies. Raises ConfigError for a name that is none, with the nearest ones."""
    if name not in names():
        for what, asked in NOT_YET.items():
            if name.lower() in asked:
                raise ConfigError(
                    f"there is no recipe {name!r}: {what} is not there yet; there are {', '.join(names())}"
                )
        near = difflib.get_close_matches(name, names(), n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
        raise ConfigError(f"there is no recipe {name!r}: {hint}")
    return Path(str(resources.files("herd.train.recipes").joinpath(f"{name}.yaml")))


def recipe_text(name: str) -> str:
    """The YAML of a recipe."""
    return recipe_file(name).read_text(encoding="utf-8")


def recipe_module(name: str) -> Path:
    """The Python file that does what the recipe `name` describes."""
    return Path(str(resources.files("herd.train.recipes").joinpath(f"{read_yaml(recipe_file(name))['recipe']}.py")))


def summary(name: str) -> str:
    """Its first line."""
    return recipe_text(name).splitlines()[0].lstrip("# ").rstrip(".")
