"""Pipeline parallelism: ranks hold different layers, and micro-batches travel through them (torch.distributed.pipelining).

Layers that are elsewhere become `Absent`, so that the names of those that are here stay. The objective runs on the last stage and
does not know: it is handed a `Tail`, whose `hidden` is what arrived. Rotary angles and masks are made on every stage from the
positions, which all ranks of a pipeline draw themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from herd.errors import ConfigError
from herd.model.attend import Attend
from herd.model.config import ModelConfig
from herd.model.llama import Llama

if TYPE_CHECKING:
    from herd.parallel.mesh import Mesh

__all__ = ["Absent", "Before", "Beside", "Pipeline", "Stage", "Tail", "layers_of", "split"]


class Beside(Protocol):
    """What some stages add to the loss beside its end: the losses of their routers (`herd.train.router`)."""

    def __call__(self, run: Callable[[], Tensor], index: int) -> tuple[Tensor, Tensor]:
        """(what `run`, the pass of micro-batch `index` through a stage, gives; what is added to the loss, a scalar)."""
        ...


class Before(Protocol):
    """Virtual tokens before the rows of a stage (`herd.adapters.prefix`), a module of the stage."""

    travels: bool
    """Whether their own states [1, P, D] go from stage to stage, beside x."""

    def __call__(
        self,
        through: Callable[[Tensor, Tensor, Sequence[Attend]], Tensor],
        see: Sequence[Attend],
        positions: Tensor,
        arrived: Tensor | None,
    ) -> tuple[Tensor, Sequence[Attend], Tensor | None]:
        """(positions behind them, the attention of the stage's layers to them and to what `see` sees, their states after it).

        `through` are the stage's layers, `arrived` the states that the stage before gave.
        """
        ...


See = Callable[[ModelConfig, Tensor], Sequence[Attend]]
"""The attention of all layers, from positions."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Absent(nn.Module):
    """A part of the model that another rank holds."""

    def forward(self, *_: object) -> Tensor:
        raise AssertionError("this part of the model is on another rank of the pipeline")


def layers_of(layers: int, stages: int) -> list[range]:
    """Which layers each stage holds. The first and the last also hold an end of the model, so they get the fewer ones."""
    if stages > layers:
        raise ConfigError(f"a pipeline of {stages} stages needs as many layers: there are {layers}")
    each, more = divmod(layers, stages)
    counts = [each] * stages
    for stage in sorted(range(stages), key=lambda s: (s in (0, stages - 1), s == stages - 1, s))[:more]:
        counts[stage] += 1
    starts = [sum(counts[:i]) for i in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


class Stage(nn.Module):
    """Some neighbouring layers of `model`, and its ends where they belong. x (tokens, or [B, S, D]) -> [B, S, D].

    Where virtual tokens travel, `states` [1, P, D] arrive with x, and leave with it unless this is the last stage.
    """

    def __init__(self, model: Llama, layers: range) -> None:
        super().__init__()
        self.first, self.last = layers.start == 0, layers.stop == model.config.n_layers
        self.config, self.rope, self.span = model.config, model.rope, layers
        self.layers = nn.ModuleList(model.layers[i] for i in layers)
        self.tok_embeddings = model.tok_embeddings if self.first else None
        self.norm = model.norm if self.last else None
        self.output = model.output if self.last else None
        virtual = getattr(model, "before", None)
        self.before: nn.Module | None = None if virtual is None else virtual(layers)
        self.see: See | None = None
        self.beside: Beside | None = None

    @property
    def travels(self) -> bool:
        """Whether states of virtual tokens go from stage to stage."""
        return self.before is not None and cast(Before, self.before).travels

    def forward(
        self, x: Tensor, states: Tensor | None = None, *, positions: Tensor, index: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        leaving: list[Tensor | None] = []

        def run() -> Tensor:
            after, left = self._pass(x, states, positions)
            leaving.append(left)
            return after

        if self.beside is None or index is None:
            after = run()
        else:
            after, extra = self.beside(run, int(index))
            after = cast(Tensor, _Added.apply(after, extra))
        (left,) = leaving
        return after if left is None or self.last else (after, left)

    def _pass(self, x: Tensor, states: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.see is not None
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        every, left = self.see(self.config, positions), None
        see: Sequence[Attend] = [every[i] for i in self.span]
        if self.before is not None:
            positions, see, left = cast(Before, self.before)(self._through, see, positions, states)
        x = self._through(x, positions, see)
        return x if self.norm is None else self.norm(x), left

    def _through(self, x: Tensor, positions: Tensor, see: Sequence[Attend]) -> Tensor:
        rotary = self.rope(positions)
        for block, attend in zip(self.layers, see, strict=True):
            x = block(x, rotary, attend)
        return x


class _Added(torch.autograd.Function):
    """x as it is; in the backward pass `extra` has the gradient 1, as if it had been added to the loss at the end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, extra: Tensor) -> Tensor:
        ctx.like = torch.ones_like(extra)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.like


def split(model: Llama, mesh: Mesh) -> list[Stage]:
    """This rank's stages; what they do not need leaves `model`."""
    spans = layers_of(model.config.n_layers, mesh.part.pp * mesh.part.stages)
    own = [spans[i] for i in range(mesh.along("pp").get_local_rank(), len(spans), mesh.part.pp)]
    stages = [Stage(model, span) for span in own]
    here = {i for span in own for i in span}
    for parts in (model.layers, getattr(model, "prefix", ())):
        for i in range(len(parts)):
            if i not in here:
                cast(Any, parts)[i] = Absent()
    gone = () if any(stage.first for stage in stages) else ("tok_embeddings", "prompt")
    if not any(stage.last for stage in stages):
        gone += ("norm", "output")
    for name in gone:
        if hasattr(model, name):
            setattr(model, name, Absent())
    return stages


class Tail:
    """What an objective sees of a model whose hidden states are there already."""

    def __init__(self, model: Llama, arrived: Tensor) -> None:
        self.config, self.output, self._arrived = model.config, model.output, arrived

    def embed(self, tokens: Tensor) -> Tensor:
        return self._arrived

    def hidden(self, x: Tensor, positions: Tensor | None = None, attend: Sequence[Attend] | None = None) -> Tensor:
        return self._arrived


class Pipeline:
    """The schedule of this rank's stages. `backward` does forward and backward of all micro-batches of a step."""

    def __init__(self, model: Llama, stages: Sequence[Stage], mesh: Mesh, *, tied: bool) -> None:
        """`tied`: the embedding is the output, and trains. The same on all ranks."""
        self.model, self.mesh = model, mesh
        count = mesh.part.pp * mesh.part.stages
        rank = mesh.along("pp").get_local_rank()
        self.stages = tuple(stages)
        for stage in stages:
            stage.see = mesh.packed
        self._stages = [
            PipelineStage(stage, rank + i * mesh.part.pp, count, mesh.device, group=mesh.group("pp"))
            for i, stage in enumerate(stages)
        ]
        self._has_first, self._has_last = any(s.first for s in stages), any(s.last for s in stages)
        self._schedules: dict[int, Any] = {}
        self._loss: Callable[[Any, int], tuple[Tensor, Any]] | None = None
        self._kept: dict[int, Any] = {}
        self._ends = _ends(mesh) if tied else None

    def backward(
        self, batches: Sequence[tuple[Tensor, Tensor]], loss: Callable[[Llama, int], tuple[Tensor, Any]]
    ) -> list[Any]:
        """Gradients of the sum of the losses of all micro-batches: `batches[i]` is (tokens, positions) [B, S], equal in shape.

        `loss(tail, i)` is called on the last stage only, with something that has the verbs of `Llama`, perhaps more than once;
        it returns what gradients are taken of, and anything else. That is returned for every i, and nothing on other ranks.
        """
        self._loss, self._kept = cast(Any, loss), {}
        tokens, positions = (torch.cat(parts) for parts in zip(*batches, strict=True))
        schedule = self._schedule(len(batches))
        arguments = (tokens,) if self._has_first else ()
        index = torch.arange(len(batches), device=tokens.device)
        losses: list[Tensor] | None = [] if self._has_last else None
        target = index if self._has_last else None
        schedule.step(*arguments, target=target, losses=losses, return_outputs=False, positions=positions, index=index)
        if self._ends is not None:
            self._sum_tied(self._ends)
        return [self._kept[i] for i in range(len(batches))] if self._has_last else []

    @torch.no_grad()
    def forward(self, tokens: Tensor, positions: Tensor, see: See | None = None) -> Tail | None:
        """One batch [B, S] through all stages, without gradients: a `Tail` on the rank of the last one, None on others.

        `see` stands in for `Mesh.packed`. All ranks of the pipeline have to call it with the same batch.
        """
        pp, own = self.mesh.part.pp, self.mesh.along("pp").get_local_rank()
        parts: tuple[Tensor, ...] = (tokens,)
        for number in range(pp * self.mesh.part.stages):
            if number % pp == own:
                stage = self.stages[number // pp]
                if number:
                    parts = tuple(self._receive((number - 1) % pp) for _ in range(1 + stage.travels))
                usual, stage.see = stage.see, see or stage.see
                out = stage(*parts, positions=positions)
                stage.see = usual
                parts = out if isinstance(out, tuple) else (out,)
                for part in () if stage.last else parts:
                    self._send(part, (number + 1) % pp)
        return Tail(self.model, parts[0]) if self._has_last else None

    def _send(self, x: Tensor, to: int) -> None:
        group = self.mesh.group("pp")
        facts = torch.tensor([_DTYPES.index(x.dtype), *x.shape], device=self.mesh.device)
        dist.send(facts, group=group, group_dst=to)
        dist.send(x.contiguous(), group=group, group_dst=to)

    def _receive(self, source: int) -> Tensor:
        group = self.mesh.group("pp")
        facts = torch.zeros(4, dtype=torch.int64, device=self.mesh.device)
        dist.recv(facts, group=group, group_src=source)
        dtype, *shape = (int(fact) for fact in facts)
        x = torch.empty(shape, dtype=_DTYPES[dtype], device=self.mesh.device)
        dist.recv(x, group=group, group_src=source)
        return x

    def whole(self, value: Tensor) -> Tensor:
        """`value` of the rank of the last stage (others give zeros), on every rank of the pipeline."""
        value = value.detach().to(self.mesh.device, copy=True)
        dist.all_reduce(value, group=self.mesh.group("pp"))
        return value

    def _schedule(self, count: int) -> Any:
        if count not in self._schedules:
            if self.mesh.part.schedule != "gpipe" and count < self.mesh.part.pp:
                raise ConfigError(
                    f"a pipeline of {self.mesh.part.pp} ranks needs as many micro-batches in a step, not {count}: "
                    "raise train.accumulate, or set parallel.schedule=gpipe"
                )
            kind: Any = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}[
                self.mesh.part.schedule
            ]
            stages = self._stages if self.mesh.part.schedule == "interleaved" else self._stages[0]
            self._schedules[count] = kind(stages, count, loss_fn=self._of_arrived, scale_grads=False)
        return self._schedules[count]

    def _of_arrived(self, hidden: Tensor, index: Tensor) -> Tensor:
        assert self._loss is not None
        loss, self._kept[int(index)] = self._loss(Tail(self.model, hidden), int(index))
        return loss

    def _sum_tied(self, ends: dist.ProcessGroup) -> None:
        """The embedding is on the first stage and, as the output, on the last: each has a part of its gradient."""
        if not (self._has_first or self._has_last):
            return
        weight: Any = self.model.tok_embeddings.weight if self._has_first else self.model.output.weight
        gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        dist.all_reduce(gradient, group=ends)
        weight.herd_counted_elsewhere = self._has_last


def _ends(mesh: Mesh) -> dist.ProcessGroup | None:
    """The group of this pipeline's first and last rank. Every rank has to help making every group."""
    assert mesh.devices is not None
    found = None
    lines = mesh.devices.mesh.flatten(1).T.tolist()  # one line for each pipeline: pp is the first dimension
    for line in lines:
        group = dist.new_group([line[0], line[-1]])
        if mesh.rank in line:
            found = group
    return cast(Any, found)
