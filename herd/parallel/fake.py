"""A run of any size on one processor, without numbers: what every rank would hold, and what it would send in a step.

A fake process group answers at once and moves nothing, and fake tensors have shapes and no storage. What is found is what a
cluster would do, as far as shapes, meshes and exchanges go: values, speed and what a network does are not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from herd.model.attend import Attend
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.model.rope import Rope
from herd.parallel.collective import gather
from herd.parallel.config import ParallelPart
from herd.parallel.loss import nll_sum
from herd.parallel.mesh import Mesh
from herd.parallel.pipeline import Stage
from herd.parallel.prepare import Spread, prepare
from herd.parallel.settle import settle
from herd.parallel.tensor import sum_gradients

__all__ = ["Trial", "pretend", "trial"]

_KINDS = {
    "all_gather": "gather",
    "allgather": "gather",
    "reduce_scatter": "scatter",
    "allreduce": "sum",
    "all_reduce": "sum",
    "send": "send",
    "recv": "receive",
    "broadcast": "broadcast",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one rank of a run holds and does in one micro-batch, which is also a step's last.

    `shapes`: local parameters by name. `held` bytes of parameters; with their gradients and two means of AdamW in fp32 it is
    `states`. `exchanges`: how many of each kind (gather, scatter, sum), and `sent` their bytes as results are counted.
    """

    rank: int
    shapes: dict[str, tuple[int, ...]]
    held: int
    layers: range
    exchanges: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)

    @property
    def states(self) -> int:
        """Bytes of parameters, gradients and AdamW's means in fp32."""
        return 4 * self.held


@contextmanager
def pretend(world: int, rank: int) -> Iterator[None]:
    """A process group of `world` ranks of which this is `rank`; nobody else exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def trial(
    config: ModelConfig, part: ParallelPart, rank: int, *, rows: int = 1, length: int = 8192, step: bool = True
) -> Trial:
    """What `rank` of `part` would hold of a model of `config`, and with `step` what it would exchange.

    Raises ConfigError as a real run would. Experts have no `step`: where tokens go is data.
    """
    with pretend(part.world, rank):
        mesh = Mesh.of(part)
        with torch.device("meta"):
            model = Llama(config)
        model.rope = Rope(config)
        stages: list[Stage] = []
        spread = prepare(model, mesh, built=stages)
        local = {name: _local(weight) for name, weight in model.named_parameters()}
        here = [i for i, block in enumerate(model.layers) if any(True for _ in block.parameters())]
        held = Trial(
            rank=rank,
            shapes={name: tuple(weight.shape) for name, weight in local.items()},
            held=sum(4 * weight.numel() for weight in local.values()),
            layers=range(here[0], here[-1] + 1),
        )
        if not step:
            return held
        with FakeTensorMode(allow_non_fake_inputs=True):
            settle(model, _empty)
            if part.tp > 1 and not mesh.spread:
                sum_gradients(model)
            counted = _Counted()
            with counted:
                _micro_batch(spread, stages, rows, length)
        return replace(held, exchanges=dict(counted.times), sent=dict(counted.bytes))


def _empty(_: nn.Module, __: str, weight: Tensor) -> Tensor:
    return torch.empty(_local(weight).shape, dtype=weight.dtype)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _micro_batch(spread: Spread, stages: list[Stage], rows: int, length: int) -> None:
    """Forward and backward of this rank's first stage, or of the whole model."""
    mesh, model = spread.mesh, spread.model
    own = length // mesh.part.cp
    tokens = torch.zeros(rows, own, dtype=torch.int64)
    positions = torch.arange(own).expand(rows, own)
    see = _seeing(mesh)
    if not stages:
        hidden = model.hidden(model.embed(tokens), positions, [see] * model.config.n_layers)
        _descend(model.output(hidden.flatten(0, 1)), tokens.flatten())
        return
    stage = stages[0]
    stage.see = lambda config, _: [see] * config.n_layers
    x = tokens if stage.first else torch.zeros(rows, own // mesh.part.tp, model.config.dim, requires_grad=True)
    out = stage(x, positions=positions)
    if stage.output is None:
        out.sum().backward()
    else:
        _descend(stage.output(out.flatten(0, 1)), tokens.flatten())


def _seeing(mesh: Mesh) -> Attend:
    """Something with attention's shapes, gradients and exchanges; its arithmetic is of no interest."""

    def see(q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        both = torch.cat([k, v], -2)
        return q * (both if mesh.sequences is None else gather(both, mesh.sequences)).mean()

    return see


def _descend(logits: Tensor, labels: Tensor) -> None:
    loss = nll_sum(logits, labels) if isinstance(logits, DTensor) else logits.sum()
    loss.backward()


class _Counted(TorchDispatchMode):
    """Counts exchanges and the bytes of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = str(func).removeprefix("torch.ops.").partition(".")
        if space in ("c10d", "_c10d_functional"):
            kind = next((word for part, word in _KINDS.items() if part in name), None)
            if kind is not None:
                self.times[kind] += 1
                self.bytes[kind] += _size(args[0] if space == "c10d" else result)
        return result


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_size(item) for item in value) if isinstance(value, list | tuple) else 0
