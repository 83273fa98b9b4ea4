"""Everything that decides how a run goes on from here: trained tensors, optimiser states, random states, counters.

Only what trains is held: of an adapter's run the adapter, with whatever the base is made of.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, empty
from torch.optim import Optimizer

from herd.adapters.apply import trained
from herd.errors import ConfigError

__all__ = [
    "Counters", "RandomStates", "describe", "not_finite", "restore_optimisers", "seed_everything", "targets", "tensors_of",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """How far a run is. `tokens` and `supervised` are of all ranks, `seconds` is wall clock without pauses between resumes."""

    step: int = 0
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0


def tensors_of(model: nn.Module, optimisers: Sequence[Optimizer], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> tensor of all that a checkpoint holds. `more` are others' (averages), by names of their own."""
    found = {f"model.{name}": weight for name, weight in trained(model).items()}
    for prefix, weight, key, value in _states(model, optimisers):
        if isinstance(value, Tensor):
            if isinstance(weight, DTensor) and not isinstance(value, DTensor) and value.ndim:
                raise ConfigError(
                    f"the optimiser's {key} of {prefix} belongs to this rank alone and cannot be saved with several ranks: "
                    "choose train.optim.kind=adamw or muon"
                )
            found[f"{prefix}.{key}"] = value
    return found | dict(more)


def describe(model: nn.Module, optimisers: Sequence[Optimizer]) -> dict[str, Any]:
    """What `targets` needs to make room for optimiser states before they are read: JSON-able."""
    made: dict[str, Any] = {}
    for prefix, weight, key, value in _states(model, optimisers):
        if not isinstance(value, Tensor):
            if value is not None and not isinstance(value, bool | int | float | str):
                raise ConfigError(
                    f"the optimiser keeps {type(value).__name__} as {key}: tensors and numbers can be saved"
                )
            made[f"{prefix}.{key}"] = {"value": value}
            continue
        like = value.shape == weight.shape and (isinstance(value, DTensor) or not isinstance(weight, DTensor))
        made[f"{prefix}.{key}"] = {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "place": "weight"
            if like and value.device == weight.device
            else "device"
            if value.device.type != "cpu"
            else "cpu",
        }
    return made


def targets(model: nn.Module, optimisers: Sequence[Optimizer], described: Mapping[str, Any]) -> dict[str, Tensor]:
    """Room for every tensor that `describe` and `tensors_of` named: weights are the model's own, states are new."""
    names = dict(_prefixes(model, optimisers))
    weights = {f"model.{name}": weight.detach() for name, weight in trained(model).items()}
    for name, facts in described.items():
        if "value" in facts:
            continue
        prefix = name.rpartition(".")[0]
        if prefix not in names:  # of a layer on another rank of the pipeline
            continue
        weight = names[prefix]
        dtype, shape = getattr(torch, facts["dtype"]), facts["shape"]
        if shape == list(weight.shape) and facts["place"] != "cpu":
            weights[name] = torch.empty_like(weight.detach(), dtype=dtype)
        elif isinstance(weight, DTensor) and len(shape) > 1 and shape[:-1] == list(weight.shape[:-1]):
            weights[name] = empty(  # a number for some neighbours of a row, cut where the row's matrix is cut
                shape, dtype=dtype, device_mesh=weight.device_mesh, placements=weight.placements
            )
        else:
            device = "cpu" if facts["place"] == "cpu" else weight.device
            weights[name] = torch.empty(facts["shape"], dtype=dtype, device=device)
    return weights


def restore_optimisers(
    model: nn.Module, optimisers: Sequence[Optimizer], described: Mapping[str, Any], read: Mapping[str, Tensor]
) -> None:
    """Give every optimiser the states that `targets` made room for and a payload filled. Rates stay this run's own."""
    names = dict(_prefixes(model, optimisers))
    for optimiser in optimisers:
        optimiser.state.clear()
    owners = {f"optimiser.{i}": optimiser for i, optimiser in enumerate(optimisers)}
    for name, facts in described.items():
        prefix, _, key = name.rpartition(".")
        if prefix not in names:
            continue
        optimiser = owners[".".join(prefix.split(".")[:2])]
        optimiser.state[names[prefix]][key] = facts["value"] if "value" in facts else read[name]


@dataclass(frozen=True, slots=True)
class RandomStates:
    """Every random state of this process at a moment: torch (and each CUDA device), Python, numpy."""

    torch: Tensor
    cuda: tuple[Tensor, ...]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> RandomStates:
        """Those of this moment; cheap, for every step has one."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=True))

    def restore(self) -> None:
        """Make them those of this process again."""
        torch.set_rng_state(self.torch)
        for device, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a file."""
        version, words, gauss = self.python
        kind, keys, position, has_gauss, cached = self.numpy
        return {
            "torch": _text(self.torch),
            "cuda": [_text(state) for state in self.cuda],
            "python": [version, list(words), gauss],
            "numpy": [kind, [int(word) for word in keys], int(position), int(has_gauss), float(cached)],
        }

    @classmethod
    def of_json(cls, kept: Mapping[str, Any]) -> RandomStates:
        """The inverse of `as_json`."""
        version, words, gauss = kept["python"]
        kind, keys, position, has_gauss, cached = kept["numpy"]
        return cls(
            _bytes(kept["torch"]),
            tuple(_bytes(state) for state in kept["cuda"]),
            (version, tuple(words), gauss),
            (kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached),
        )


def seed_everything(seed: int, part: int) -> None:
    """Start every random state from `seed`; `part` tells ranks that see different tokens or have other layers apart (dropout)."""
    mixed = int(np.random.SeedSequence([seed, part]).generate_state(1, np.uint32)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, with how many."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.is_floating_point() and not bool(local.isfinite().all()):
            bad = int((~local.isfinite()).sum())
            return f"{name} ({bad} of {local.numel()} values)"
    return None


def _prefixes(model: nn.Module, optimisers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """Where the states of each parameter of each optimiser go: ("optimiser.0.layers.0.attention.wq.weight", parameter)."""
    for prefix, weight, _ in _owned(model, optimisers):
        yield prefix, weight


def _states(model: nn.Module, optimisers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor, str, Any]]:
    """(prefix, parameter, key, value) of every entry of every optimiser's state."""
    for prefix, weight, optimiser in _owned(model, optimisers):
        for key, value in optimiser.state.get(weight, {}).items():
            yield prefix, weight, key, value


def _owned(model: nn.Module, optimisers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor, Optimizer]]:
    """(prefix, parameter, its optimiser); frozen ones have no state and are left out."""
    names = {id(weight): name for name, weight in trained(model).items()}
    for i, optimiser in enumerate(optimisers):
        for group in optimiser.param_groups:
            for weight in group["params"]:
                if weight.requires_grad:
                    assert id(weight) in names, "an optimiser has a parameter that is not the model's"
                    yield f"optimiser.{i}.{names[id(weight)]}", weight, optimiser


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
