"""Numbers into a model that was cut over ranks before it had any: each rank makes what it holds, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from herd.model.late import Index, broken, promises

__all__ = ["part_of", "settle"]

Fill = Callable[[nn.Module, str, Tensor], Tensor]
"""(module, key, the parameter without numbers) -> what this rank holds of it."""


def settle(model: nn.Module, fill: Fill | None = None) -> None:
    """Keep the promises of `model` in place (`herd.model.late`): parameters, buffers and what else was promised.

    Parameters that are tied stay tied. `fill` stands in for promises of parameters; a parameter without numbers and without
    either is a bug of the caller.
    """
    make, made = fill or _promised, dict[int, nn.Parameter]()
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not _bare(parameter):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _parameter(parameter, make(module, key, parameter))
            module._parameters[key] = made[id(parameter)]
        for key, give in promises(module).items():
            if key in module._buffers:
                module._buffers[key] = give()
            elif key not in module._parameters:
                setattr(module, key, give())
    broken(model)


def part_of(tensor: Tensor) -> Index | None:
    """Which part of the whole this rank holds of `tensor`; None for all of it."""
    if not isinstance(tensor, DTensor):
        return None
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) == tuple(tensor.shape):
        return None
    return tuple(slice(first, first + count) for first, count in zip(start, shape, strict=True))


def _bare(parameter: Tensor) -> bool:
    return (parameter._local_tensor if isinstance(parameter, DTensor) else parameter).is_meta


def _promised(module: nn.Module, key: str, parameter: Tensor) -> Tensor:
    make = promises(module).get(key)
    assert make is not None, f"nobody makes {key} of {type(module).__name__}"
    return make(part_of(parameter))


def _parameter(bare: nn.Parameter, values: Tensor) -> nn.Parameter:
    if not isinstance(bare, DTensor):
        return nn.Parameter(values, bare.requires_grad)
    spec: Any = bare._spec  # of a tensor cut twice along one dimension no public constructor knows the order
    local = values.contiguous().view(cast(Any, bare)._local_tensor.shape)
    made: Any = DTensor
    return nn.Parameter(made(local, spec, requires_grad=False), bare.requires_grad)
