"""Tensor parallelism for training: matrices cut by the plan, tokens cut between the matrices (Megatron with sequence parallel).

Parameters become DTensors, so that optimisers, checkpoints and FSDP know what each rank holds. Arithmetic does not: a block
computes with its local pieces as plain tensors, and only four exchanges a layer cross its borders (gather before attention and
feed-forward, summed scatter after them). What is inside a block (a float8 linear, a compiled graph) sees no DTensor.

Adapters are cut as the matrices they change; what holds more than parameters (a quantized matrix, the lengths of DoRA) has a
method `share(dim, cut, total)` that makes it one rank's part.

Between blocks x is [B, S / tp, D]; `hidden` returns whole rows; `output` returns logits that are cut along the vocabulary, a
DTensor, for `herd.parallel.loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from herd.errors import ConfigError
from herd.model.llama import Block, Llama
from herd.model.moe import MoE
from herd.parallel.collective import gather, scatter
from herd.parallel.plan import check, cut_of, known, kv_copies

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["shard", "sum_gradients"]

PREFIX = "prefix."
"""Virtual keys and values [P, Hkv, Dh] of a layer (`herd.adapters.prefix`), cut as its heads."""
PROMPT = "prompt"
"""Virtual embeddings [P, D]: whole on every rank, and computed with as tokens are, each rank its part."""


def shard(model: Llama, devices: DeviceMesh, *, experts: str = "width") -> Llama:
    """Cut `model` in place over `devices` (one dimension); all ranks must hold the same values. Returns it.

    Positions must be given to the model from now on: it cannot count rows of which it sees a part. Raises ConfigError for what
    these ranks cannot share.
    """
    config, ranks, group = model.config, devices.size(), devices.get_group()
    check(config, ranks, experts=experts)
    _known(model)
    copies = kv_copies(config, ranks)
    made: dict[int, nn.Parameter] = {}  # a tied matrix is one
    for name, module in list(model.named_modules()):
        whole = copies > 1 and _matrix(name).endswith(("attention.wk.weight", "attention.wv.weight"))
        head = group.rank() // copies
        dim = cut_of(_matrix(name), experts=experts)
        if dim is not None and hasattr(module, "share"):
            _share(module, dim, group, ranks // copies if whole else ranks, head if whole else group.rank())
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                cut = cut_of(f"{name}.{key}" if name else key, experts=experts)
                if whole and cut is not None:
                    _pieces(module)[key] = slice(head * config.head_dim, (head + 1) * config.head_dim)
                elif name == PROMPT:
                    _pieces(module)[key] = _tokens_of(len(parameter), group)
                elif copies > 1 and name.startswith(PREFIX):
                    _pieces(module)[key], cut = (slice(None), slice(head, head + 1)), None
                if id(parameter) not in made:
                    made[id(parameter)] = _distributed(parameter, None if whole else cut, devices)
                module.register_parameter(key, made[id(parameter)])
    for block in model.layers:
        _localise(block)
        for module in block.modules():
            if isinstance(module, MoE) and experts == "number":
                _own_experts(module.experts, group)
        for child in (cast(Block, block).attention, cast(Block, block).feed_forward):
            _localise(child)  # activation checkpointing calls it again, alone
            _border(child, group)
    for virtual in (*getattr(model, "prefix", ()), getattr(model, PROMPT, None)):
        if virtual is not None:
            _locally(virtual)
    _embedding(model.tok_embeddings, config.vocab_size, group)
    _locally(model.norm)
    _after(model.norm, lambda x: gather(x, group))
    _locally(model.output)
    _after(model.output, lambda logits: _cut_logits(logits, config.vocab_size, devices))
    return model


def _known(model: Llama) -> None:
    """Refuse what has numbers that the plan does not know."""
    for name, _ in model.named_parameters():
        if not known(name):
            raise ConfigError(f"parallel.tp cannot cut {name}: use parallel.dp_shard and parallel.cp for this method")


def _matrix(home: str) -> str:
    """The name of the matrix that the module `home` holds, or changes; of experts the first one."""
    home = home.removesuffix(".base")
    return home + (".w1" if home.endswith(".experts") else ".weight")


def _share(module: Any, dim: int, group: ProcessGroup, parts: int, own: int) -> None:
    """Let `module` make itself the part `own` of `parts`."""

    def cut(size: int) -> tuple[int, int]:
        count = -(-size // parts)  # as DTensor cuts: the last ranks may have less
        return min(own * count, size), min(count, size - min(own * count, size))

    def total(value: Tensor) -> Tensor:
        dist.all_reduce(value, group=group)
        return value

    module.share(dim, cut, total)


def _tokens_of(count: int, group: ProcessGroup) -> slice:
    """This rank's part of `count` virtual tokens. Raises ConfigError."""
    if count % group.size():
        raise ConfigError(
            f"{count} virtual tokens cannot be shared by parallel.tp={group.size()}: method.tokens must be a multiple"
        )
    each = count // group.size()
    return slice(group.rank() * each, (group.rank() + 1) * each)


def _pieces(module: nn.Module) -> dict[str, Any]:
    """What of its parameters `module` computes with, where several ranks hold all of them: an index for each."""
    if "herd_pieces" not in module.__dict__:
        object.__setattr__(module, "herd_pieces", {})
    return cast(Any, module).herd_pieces


def _distributed(parameter: nn.Parameter, cut: int | None, devices: DeviceMesh) -> nn.Parameter:
    placement = Replicate() if cut is None else Shard(cut)
    cut_up = distribute_tensor(parameter.detach(), devices, [placement], src_data_rank=None)
    return nn.Parameter(cut_up, parameter.requires_grad)


def sum_gradients(model: nn.Module) -> None:
    """Without FSDP, which does so itself: sum the gradients of what all ranks hold whole. Each has the share of it that its
    tokens or heads gave."""
    for parameter in model.parameters():
        if parameter.requires_grad and cast(DTensor, parameter).placements[0].is_replicate():
            parameter.register_hook(lambda gradient: gradient.redistribute(placements=[Replicate()]))


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
            child._parameters[key] = _piece(child, key, cast(DTensor, parameter))  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for child, key, parameter in kept:
            child._parameters[key] = cast(nn.Parameter, parameter)


def _piece(module: nn.Module, key: str, parameter: DTensor) -> Tensor:
    placement = parameter.placements[0]
    local = parameter.to_local(grad_placements=[Partial() if placement.is_replicate() else placement])
    index = getattr(module, "herd_pieces", {}).get(key)
    return local if index is None else local[index]


def _localise(module: nn.Module) -> None:
    """Make `module` compute with local pieces, under the same name and with the same hooks."""
    plain: Any = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _local(self):
            return plain.forward(self, *args, **kwargs)

    module.__class__ = type(f"Sharded{plain.__name__}", (plain,), {"forward": forward})


def _locally(module: nn.Module) -> None:
    """The same by hooks, around whatever class it is or becomes (`herd.train.precision` knows classes)."""
    entered: list[Any] = []

    def enter(_: nn.Module, __: Any) -> None:
        pieces = _local(module)
        pieces.__enter__()
        entered.append(pieces)

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


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


def _embedding(module: nn.Module, vocabulary: int, group: ProcessGroup) -> None:
    """Rows of other ranks count as zero, and the sum over the ranks is the whole."""
    ranks = group.size()
    rows = -(-vocabulary // ranks)
    first, last = group.rank() * rows, min((group.rank() + 1) * rows, vocabulary)
    found_here: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[0]
        if tokens.shape[1] % ranks:
            raise ConfigError(
                f"{tokens.shape[1]} tokens in a row cannot be shared by parallel.tp={ranks}: the length must be a multiple"
            )
        inside = (tokens >= first) & (tokens < last)
        found_here.append(inside)
        return (torch.where(inside, tokens - first, 0),)

    def after(rows: Tensor) -> Tensor:
        return scatter(
            rows * found_here.pop()[..., None], group
        ).clone()  # FSDP wants no view of what a root method returns

    module.register_forward_pre_hook(before)
    _locally(module)
    _after(module, after)


def _own_experts(module: nn.Module, group: ProcessGroup) -> None:
    """Experts dealt out whole: rows are sorted by expert, so this rank's are one span; rows of others stay zero.

    The class stays, and may become another: `herd.train.precision` knows classes.
    """

    def forward(x: Tensor, counts: Tensor) -> Tensor:
        own = counts.chunk(group.size())
        start = int(sum(int(part.sum()) for part in own[: group.rank()]))
        stop = start + int(own[group.rank()].sum())
        plain: Any = type(module)
        out = plain.forward(module, x[start:stop], own[group.rank()])
        return torch.cat([out.new_zeros(start, out.shape[1]), out, out.new_zeros(x.shape[0] - stop, out.shape[1])])

    module.__dict__["forward"] = forward
