"""PEFT's LoRA on routed experts (`target_parameters`): one pair of matrices for all experts of a parameter.

The Hugging Face model keeps a layer's experts as `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D], used as x @ W. PEFT lays
the factors of all experts side by side: lora_A [E * r, ...] expert by expert, lora_B [..., r * E] with the expert as the fastest
index. Since 0.19.1 it takes every such parameter for [E, out, in], so that A has the parameter's last dimension (for Llama 4 its
outputs) and B its middle one; before, A had the inputs. Both are the same change, and which it is can be seen in the shapes, but
for square matrices, where the config's `peft_version` tells. Two parameters of one module are nested: the outer one has the
module's name, the inner one `.base_layer` behind it.
Source: peft tuners/lora/layer.py (`ParamWrapper`), tuners_utils.py (`_inject_parameters`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from herd.adapters.experts import fused, homes_of
from herd.adapters.lora import Factors, LoraAdapter
from herd.checkpoint.layout import Transpose
from herd.checkpoint.names import Home
from herd.errors import CheckpointError
from herd.model.config import ModelConfig

__all__ = ["VERSION", "Stacked", "outer", "stacked", "written"]

VERSION = "0.19.1"
"""From here on PEFT has the layout that herd writes."""

_INNER = ".base_layer"


@dataclass(frozen=True, slots=True)
class Stacked:
    """The experts of one layer in the Hugging Face model: module `name`, and the homes inside each of its parameters."""

    name: str
    parameters: Mapping[str, tuple[Home, ...]]

    def read(
        self, a: Tensor, b: Tensor, config: ModelConfig, version: str | None, path: Path
    ) -> tuple[str, dict[str, tuple[Tensor, Tensor]]]:
        """lora_A and lora_B -> the parameter's name in the Hugging Face model, and (a, b) by canonical name.

        Raises CheckpointError when they fit no parameter, or fit it either way and `version` does not tell.
        """
        found = [
            (full, turned)
            for full, group in self.parameters.items()
            for turned in (False, True)
            if _fits(a, b, _size(group, config), turned=turned)
        ]
        if not found:
            why = f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} fit neither of {', '.join(self.parameters)}"
            raise CheckpointError(why, path=path, tensor=self.name)
        full, turned = found[0]
        if len(found) > 1:  # inputs and outputs are as many
            if version is None:
                why = "lies either way, and the config has no peft_version that tells: write the one that trained it"
                raise CheckpointError(why, path=path, tensor=full)
            turned = _number(version) >= _number(VERSION)
        group = self.parameters[full]
        experts = _size(group, config)[0]
        by_expert = a.unflatten(0, (experts, -1))  # [E, r, x]
        other = b.unflatten(1, (-1, experts)).permute(2, 0, 1)  # [E, y, r]
        inputs, outputs = (other.mT, by_expert.mT) if turned else (by_expert, other)
        pairs = {}
        for home in group:
            assert home.cell.steps == (Transpose(),)
            cut = home.cell.fused
            rows = outputs if cut is None else cut.cut(outputs.mT, config).mT
            pairs[home.canonical] = inputs, rows
        return full, pairs


def stacked(found: Mapping[str, Home]) -> dict[str, Stacked]:
    """Every layer's experts by the name of their module, of a model's homes in the Hugging Face column."""
    grouped: dict[str, dict[str, list[Home]]] = {}
    for home in found.values():
        module = home.name.rpartition(".")[0]
        if module.endswith(".experts"):
            grouped.setdefault(module, {}).setdefault(home.name, []).append(home)
    return {
        module: Stacked(module, {name: tuple(group) for name, group in parameters.items()})
        for module, parameters in grouped.items()
    }


def written(adapter: LoraAdapter, found: Mapping[str, Home]) -> tuple[dict[str, Tensor], dict[str, Factors]]:
    """(tensors by their names after PEFT's prefix, the factors behind them by the parameter's name in the Hugging Face model)."""
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Factors] = {}
    for place in homes_of(adapter.factors):
        parts = fused(adapter, place)
        for part, key, other in (("w13", "w1", "w2"), ("w2", "w2", "w13")):
            if part not in parts:
                continue
            full, pair = found[f"{place}.{key}"].name, parts[part]
            parameters[full] = pair
            # The parameter that the module has first is wrapped first: gate and up are inside.
            module = full.rpartition(".")[0] + (_INNER if part == "w13" and other in parts else "")
            tensors[f"{module}.lora_A.weight"] = pair.b.mT.flatten(0, 1)
            tensors[f"{module}.lora_B.weight"] = pair.a.permute(2, 1, 0).flatten(1, 2)
    return tensors, parameters


def outer(module: str) -> str:
    """The name of a module without PEFT's wrappers around it."""
    while module.endswith(_INNER):
        module = module.removesuffix(_INNER)
    return module


def _size(group: tuple[Home, ...], config: ModelConfig) -> tuple[int, int, int]:
    """E, inputs and outputs of a parameter."""
    assert config.moe is not None
    width = config.moe.hidden_dim
    if len(group) > 1:
        return config.moe.n_experts, config.dim, len(group) * width
    return config.moe.n_experts, width, config.dim


def _fits(a: Tensor, b: Tensor, size: tuple[int, int, int], *, turned: bool) -> bool:
    experts, inputs, outputs = size
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0] or a.shape[0] % experts:
        return False
    return (a.shape[1], b.shape[0]) == ((outputs, inputs) if turned else (inputs, outputs))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", version)[:3])
