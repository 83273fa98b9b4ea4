"""Operations of herd's own that a compiler sees as one: traced by name, never looked into.

`torch.library.custom_op` does the same, but its first call imports the compiler, which takes seconds that nobody asked for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["fake", "gradient", "on_cuda", "operation"]

F = TypeVar("F", bound=Callable[..., Any])
_LIBRARY = torch.library.Library("herd", "FRAGMENT")


def operation(*, mutates: Sequence[str] = ()) -> Callable[[F], F]:
    """Make a function over tensors the operation torch.ops.herd.<its name>; `mutates` names the arguments it writes to.

    Its result for tensors without data is given with `fake`; without `gradient` it has none.
    """

    def made(function: F) -> F:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        _LIBRARY.define(f"{name}{schema}")
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        overload = getattr(torch.ops.herd, name).default

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            return overload(*args, **named)

        return call  # type: ignore[return-value]

    return made


def fake(operation: Callable[..., Any]) -> Callable[[F], F]:
    """What `operation` gives for tensors without data: shapes and dtypes."""

    def made(function: F) -> F:
        torch.library.register_fake(f"herd::{operation.__name__}", function, lib=_LIBRARY)
        return function

    return made


def on_cuda(operation: Callable[..., Any], module: str) -> None:
    """For tensors on a CUDA device, the function of the same name in `herd.kernels.triton.<module>` computes `operation`; the
    plain one where Triton cannot be used. Triton is imported by the first such call."""
    name = operation.__name__

    @functools.cache
    def chosen() -> Callable[..., Any]:
        from herd.kernels import triton

        if not triton.usable():
            return operation.__wrapped__  # type: ignore[attr-defined]
        return getattr(importlib.import_module(f"herd.kernels.triton.{module}"), name)

    def call(*args: Any, **named: Any) -> Any:
        return chosen()(*args, **named)

    _LIBRARY.impl(name, call, "CUDA")


def gradient(operation: Callable[..., Any], *, saved: Callable[..., None]) -> Callable[[F], F]:
    """The gradients of `operation`, which must write to no argument: of (ctx, gradient of the result), one for each argument.

    `saved(ctx, inputs, output)` keeps in ctx what they need, as for `torch.autograd.Function`.
    """

    def made(function: F) -> F:
        name = f"herd::{operation.__name__}"
        torch.library.register_autograd(name, function, setup_context=saved, lib=_LIBRARY)
        return function

    return made
