"""What a CUDA graph does, on a CPU: the operations of one run, done again to the very same tensors.

A recording knows nothing of Python: numbers that were read or decided while it was made stay as they were. So whatever a step
takes from the host in any other way than through its buffers gives wrong logits here as it would there; reading from a tensor
while recording is an error, as it would be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HostRead", "Tape", "no_reading"]

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero")
SIZES_FROM_NUMBERS = ("nonzero", "masked_select", "unique", "_local_scalar_dense", "bincount", "repeat_interleave")


class HostRead(AssertionError):
    """A recorded step asked the device for a number."""


@contextmanager
def no_reading() -> Iterator[None]:
    """Inside, no number leaves a tensor."""

    def refuse(name: str) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            raise HostRead(f"Tensor.{name} while a step is recorded")

        return call

    own = {name: torch.Tensor.__dict__.get(name) for name in READS}
    for name in READS:
        setattr(torch.Tensor, name, refuse(name))
    try:
        yield
    finally:
        for name, method in own.items():
            if method is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, method)


class Tape:
    """A `herd.engine.graphs.Capture`. `replays` counts replays, `made` recordings."""

    def __init__(self) -> None:
        self.made = 0
        self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # as a GPU's capture does, whose recording run itself computes nothing
        recorder = _Recorder()
        with no_reading(), recorder:
            run()
        self.made += 1

        def replay() -> None:
            self.replays += 1
            with no_reading():
                for function, args, kwargs, results in recorder.calls:
                    again = function(*args, **kwargs)
                    for old, new in zip(results, tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

        return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in SIZES_FROM_NUMBERS and "int" not in func._overloadname:
            raise HostRead(f"{func} while a step is recorded")
        result = func(*args, **kwargs)
        if name not in ("view", "_unsafe_view", "detach", "alias"):
            self.calls.append((func, args, kwargs, tree_leaves(result)))
        return result
