"""Numbers into a model that was cut over ranks before it had any: each rank makes what it holds, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from herd.model.late import Index, broken, promises

__all__ = ["part_of", "settle"]

Fill = Callable[[nn.Module, str, Tensor], Tensor]
"""(module, key, the parameter without numbers) -> what this rank holds of it."""


def settle(model: nn.Module, fill: Fill | None = None, tick: Callable[[int, int], None] | None = None) -> None:
    """Keep the promises of `model` in place (`herd.model.late`): parameters, buffers and what else was promised.

    Parameters that are tied stay tied. `fill` stands in for promises of parameters; a parameter without numbers and without
    either is a bug of the caller. `tick(done, total)` is told how many bytes of how many this rank has of what it is to hold.
    """
    make, made, due = fill or _promised, dict[int, nn.Parameter](), list(_due(model))
    sizes = {id(bare): _bytes(bare) for *_, bare in due}
    done, total = 0, sum(sizes.values())
    if tick is not None and due:
        tick(done, total)
    due.reverse()
    while due:  # what was without numbers goes as soon as nobody needs it
        module, key, bare = due.pop()
        if key not in module._parameters:
            setattr(module, key, promises(module)[key]())
        else:
            if id(bare) not in made:
                made[id(bare)] = _parameter(bare, make(module, key, bare))
            module._parameters[key] = made[id(bare)]
        if tick is not None and id(bare) in sizes:
            done += sizes.pop(id(bare))
            tick(done, total)
    broken(model)


def part_of(tensor: Tensor) -> Index | None:
    """Which part of the whole this rank holds of `tensor`; None for all of it."""
    if not isinstance(tensor, DTensor):
        return None
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape) == tuple(tensor.shape):
        return None
    return tuple(slice(first, first + count) for first, count in zip(start, shape, strict=True))


def _due(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, key, what is there without numbers): parameters, and whatever else was promised."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and _local(parameter).is_meta:
                yield module, key, parameter
        for key in promises(module):
            if key not in module._parameters:
                yield module, key, getattr(module, key)


def _bytes(bare: Any) -> int:
    """Of a tensor, a matrix (`herd.quant.late`) or several, when they are made."""
    return sum(_bytes(one) for one in bare) if isinstance(bare, tuple) else _local(bare).nbytes


def _local(tensor: Any) -> Any:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


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
