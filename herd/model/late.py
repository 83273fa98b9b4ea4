"""Numbers that come later: a model whose parameters have shape and dtype (on the meta device) and a promise of who makes them.

What holds a part of such a model makes that part alone, after it is known which (`herd.parallel.settle`). A promise stays with
its module whatever becomes of the parameter: cut, wrapped, of another class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

__all__ = [
    "Index", "Maker", "bare", "broken", "derived", "hand_on", "lent", "lives_on", "outline", "promise", "promises", "replayed",
    "room", "zeros",
]  # fmt: skip

Index = tuple[slice, ...]
"""A part of a tensor: a slice with start and stop for each dimension."""

_NAME = "herd_promises"


class Maker(Protocol):
    """Makes the tensor, or the part `index` of it, in memory of its own or as a view of a file, where the model lives."""

    def __call__(self, index: Index | None = None) -> Tensor: ...


def promise(module: nn.Module, key: str, make: Callable[..., Any]) -> None:
    """`make` gives what `module` has as `key`: a Maker for parameters and buffers; anything else is made whole, by a call."""
    module.__dict__.setdefault(_NAME, {})[key] = make


def promises(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """What `module` itself was promised, by key."""
    return module.__dict__.get(_NAME, {})


def broken(model: nn.Module) -> None:
    """Forget all promises: they were kept."""
    for module in model.modules():
        module.__dict__.pop(_NAME, None)


def outline(shape: tuple[int, ...], dtype: torch.dtype, *, trains: bool = False) -> nn.Parameter:
    """A parameter without numbers."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=trains)


def bare(shape: tuple[int, ...], make: Maker) -> Tensor:
    """A float32 tensor without numbers that knows who makes them; `hand_on` makes that a promise of who has it."""
    made: Any = torch.empty(shape, device="meta")
    setattr(made, _NAME, make)
    return made


def hand_on(module: nn.Module, key: str, tensor: Tensor | None) -> None:
    """What `tensor` knows (`bare`) as a promise of `key` of `module`, a copy of it."""
    make = getattr(tensor, _NAME, None)
    if make is not None:
        promise(module, key, make)


def replayed(draw: Callable[[], Tensor]) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
    """(the shape of what `draw` gives, how to draw it again). It is drawn now, too, so that what follows draws what it would."""
    state = torch.get_rng_state()
    shape = tuple(draw().shape)

    def again() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            return draw()

    return shape, again


def derived(make: Callable[[], Tensor]) -> Maker:
    """A Maker of which a part is cut from the whole."""

    def cut(index: Index | None = None) -> Tensor:
        return make() if index is None else make()[index].clone()

    return cut


def lives_on(model: nn.Module) -> torch.device:
    """Where the numbers of `model` are or will be: rotary frequencies are there from the beginning."""
    return cast(Any, model).rope.inv_freq.device


def zeros(shape: tuple[int, ...], where: torch.device) -> Maker:
    """A Maker of zeros."""

    def make(index: Index | None = None) -> Tensor:
        return torch.zeros(shape if index is None else [part.stop - part.start for part in index], device=where)

    return make


def room(model: nn.Module) -> None:
    """Give whatever of `model` trains memory, with any numbers in it, in place of promises: the caller fills it."""
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None and weight.requires_grad and weight.is_meta:
                promises(module).pop(key, None)
                module._parameters[key] = nn.Parameter(torch.empty_like(weight, device=lives_on(model)))


@contextmanager
def lent(
    model: nn.Module, units: Sequence[nn.Module] = (), before: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Inside, a model without numbers computes: each module has its own while it is called, one after the other.

    A module of `units` has all that is below it: what reads the numbers of its children (adapters do) has to be one. `before` is
    called before each has its own. Single quantized matrices make themselves for each product (`herd.quant.late`).
    """
    handles: list[Any] = []
    seen: set[nn.Module] = set()
    for unit in (*units, *model.modules()):
        below = list(unit.modules()) if unit in units else [unit]
        made = [(module, key, make) for module in below if module not in seen for key, make in _lendable(module)]
        seen.update(below)
        if made:
            handles += _lending(unit, made, before)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lendable(module: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """Promised parameters and buffers, and the matrices of experts, which are of one tensor: once for all, not once for each."""
    held = module._parameters.keys() | module._buffers.keys()
    return [(k, make) for k, make in promises(module).items() if k in held or isinstance(getattr(module, k), tuple)]


def _lending(
    unit: nn.Module, made: list[tuple[nn.Module, str, Callable[..., Any]]], before: Callable[[], object]
) -> list[Any]:
    kept = [(module, key, getattr(module, key)) for module, key, _ in made]

    def give(*_: Any) -> None:
        before()
        for module, key, make in made:
            if key in module._parameters:
                module._parameters[key] = nn.Parameter(make(), requires_grad=False)
            else:
                setattr(module, key, make())

    def take(*_: Any) -> None:
        for module, key, bare in kept:
            setattr(module, key, bare)

    return [unit.register_forward_pre_hook(give), unit.register_forward_hook(take, always_call=True)]
