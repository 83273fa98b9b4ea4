"""Tensor parallelism for training: matrices cut by the plan, tokens cut between the matrices (Megatron with sequence parallel).

Parameters become DTensors, so that optimisers, checkpoints and FSDP know what each rank holds. Arithmetic does not: a block
computes with its local pieces as plain tensors, and only four exchanges a layer cross its borders (gather before attention and
feed-forward, summed scatter after them). What is inside a block (a float8 linear, a compiled graph) sees no DTensor.

Between blocks x is [B, S / tp, D]; `hidden` returns whole rows; `output` returns logits that are cut along the vocabulary, a
DTensor, for `herd.parallel.loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.functional import embedding

from herd.errors import ConfigError
from herd.model.attention import Attention
from herd.model.llama import Block, Llama
from herd.model.moe import Experts
from herd.parallel.collective import gather, scatter
from herd.parallel.plan import check, cut_of, kv_copies

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["shard"]


def shard(model: Llama, devices: DeviceMesh, *, experts: str = "width") -> Llama:
    """Cut `model` in place over `devices` (one dimension); all ranks must hold the same values. Returns it.

    Positions must be given to the model from now on: it cannot count rows of which it sees a part. Raises ConfigError for what
    these ranks cannot share.
    """
    config, ranks, group = model.config, devices.size(), devices.get_group()
    check(config, ranks, experts=experts)
    _known(model)
    copies = kv_copies(config, ranks)
    for name, module in list(model.named_modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                full = f"{name}.{key}"
                whole = copies > 1 and full.endswith(("attention.wk.weight", "attention.wv.weight"))
                cut = None if whole else cut_of(full, experts=experts)
                module.register_parameter(key, _distributed(parameter, cut, devices))
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    for block in model.layers:
        _localise(block)
        for module in block.modules():
            if isinstance(module, Attention) and copies > 1:
                head = group.rank() // copies
                for linear in (module.wk, module.wv):
                    object.__setattr__(linear, "herd_rows", slice(head * config.head_dim, (head + 1) * config.head_dim))
            elif isinstance(module, Experts) and experts == "number":
                _own_experts(module, group)
        for child in (cast(Block, block).attention, cast(Block, block).feed_forward):
            _border(child, group)
    _embedding(model.tok_embeddings, group)
    _localise(model.norm)
    _after(model.norm, lambda x: gather(x, group))
    _localise(model.output)
    _after(model.output, lambda logits: _cut_logits(logits, config.vocab_size, devices))
    return model


def _known(model: Llama) -> None:
    """Refuse what has parameters that the plan does not know: adapters, quantized bases."""
    for name, parameter in model.named_parameters():
        if cut_of(name) is None and not (parameter.ndim == 1 or name.endswith("router.weight")):
            raise ConfigError(
                f"parallel.tp cannot cut {name}: tensor parallelism trains whole models; use parallel.dp_shard for this method"
            )


def _distributed(parameter: nn.Parameter, cut: int | None, devices: DeviceMesh) -> nn.Parameter:
    placement = Replicate() if cut is None else Shard(cut)
    made = nn.Parameter(
        distribute_tensor(parameter.detach(), devices, [placement], src_data_rank=None), parameter.requires_grad
    )
    if cut is None and parameter.requires_grad:
        # Each rank has the share of the gradient that its tokens or heads gave. FSDP sums such gradients itself.
        made.register_hook(lambda gradient: gradient.redistribute(placements=[Replicate()]))
    return made


@contextmanager
def _local(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `module` and its children are the plain local pieces."""
    kept: list[tuple[nn.Module, str, Tensor]] = []
    for child in module.modules():
        for key, parameter in child._parameters.items():
            if isinstance(parameter, DTensor):
                kept.append((child, key, parameter))
    try:
        for child, key, parameter in kept:
            child._parameters[key] = _piece(child, cast(DTensor, parameter))  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for child, key, parameter in kept:
            child._parameters[key] = cast(nn.Parameter, parameter)


def _piece(module: nn.Module, parameter: DTensor) -> Tensor:
    placement = parameter.placements[0]
    local = parameter.to_local(grad_placements=[Partial() if placement.is_replicate() else placement])
    rows = getattr(module, "herd_rows", None)
    return local if rows is None else local[rows]


def _localise(module: nn.Module) -> None:
    """Make `module` compute with local pieces, under the same name and with the same hooks."""
    plain: Any = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _local(self):
            return plain.forward(self, *args, **kwargs)

    module.__class__ = type(f"Sharded{plain.__name__}", (plain,), {"forward": forward})


def _border(module: nn.Module, group: ProcessGroup) -> None:
    """Whole rows go into `module`; of its output, a summand on each rank, every rank keeps its tokens."""
    module.register_forward_pre_hook(lambda _, args: (gather(args[0], group), *args[1:]))
    _after(module, lambda out: scatter(out, group))


def _after(module: nn.Module, do: Callable[[Tensor], Tensor]) -> None:
    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        return do(out)

    module.register_forward_hook(hook)


def _cut_logits(logits: Tensor, vocabulary: int, devices: DeviceMesh) -> DTensor:
    whole = torch.empty(*logits.shape[:-1], vocabulary, device="meta")
    cut = [Shard(logits.ndim - 1)]
    return DTensor.from_local(logits, devices, cut, run_check=False, shape=whole.shape, stride=whole.stride())


def _embedding(module: nn.Embedding, group: ProcessGroup) -> None:
    """Rows of other ranks count as zero, and the sum over the ranks is the whole."""
    plain: Any = type(module)

    def forward(self: nn.Embedding, tokens: Tensor) -> Tensor:
        ranks, rows = group.size(), -(-self.num_embeddings // group.size())
        if tokens.shape[1] % ranks:
            raise ConfigError(
                f"{tokens.shape[1]} tokens in a row cannot be shared by parallel.tp={ranks}: the length must be a multiple"
            )
        with _local(self):
            own = tokens - group.rank() * rows
            inside = (own >= 0) & (own < self.weight.shape[0])
            found = embedding(torch.where(inside, own, 0), self.weight) * inside[..., None]
        return scatter(found, group).clone()  # FSDP wants no view of what a root method returns

    module.__class__ = type(f"Sharded{plain.__name__}", (plain,), {"forward": forward})


def _own_experts(module: Experts, group: ProcessGroup) -> None:
    """Experts dealt out whole: rows are sorted by expert, so this rank's are one span; rows of others stay zero."""
    plain: Any = type(module)

    def forward(self: Experts, x: Tensor, counts: Tensor) -> Tensor:
        own = counts.chunk(group.size())
        start = int(sum(int(part.sum()) for part in own[: group.rank()]))
        stop = start + int(own[group.rank()].sum())
        out = plain.forward(self, x[start:stop], own[group.rank()])
        return torch.cat([out.new_zeros(start, out.shape[1]), out, out.new_zeros(x.shape[0] - stop, out.shape[1])])

    module.__class__ = type(f"Own{plain.__name__}", (plain,), {"forward": forward})
