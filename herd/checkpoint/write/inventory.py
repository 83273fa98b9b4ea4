"""What a format holds of a model: its tensors in order, and how each is made from canonical ones when its turn comes.

Works in both directions of the one name table: `sources` says which canonical parameters a foreign tensor is made of, `join`
makes it. Nothing is read before `make` is called, and the pages behind a tensor are let go when the next one is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from herd.checkpoint.fill import check_store, read_as, stored_dtype
from herd.checkpoint.names import Column, Home, join, shapes, sources
from herd.checkpoint.store import HoldsPacked, Releases, TensorInfo, TensorStore, packed_of
from herd.checkpoint.write.planned import Planned
from herd.errors import CheckpointError
from herd.quant.numbers import torch_dtype
from herd.quant.scheme import BlockType, QuantTensor, block_type

__all__ = ["Foreign", "Form", "foreign", "kept", "planned", "written_dtype"]

Form = Callable[[str, TensorInfo], str]
"""(canonical name, what the source says of it) -> how to store it: a name of BLOCK_TYPES."""


@runtime_checkable
class HasBlocks(Protocol):
    """A store whose quantized tensors can be had as they are."""

    def raw(self, name: str) -> Tensor | QuantTensor: ...


@dataclass(frozen=True, slots=True)
class Foreign:
    """One tensor of a format: its name there, the homes of its parts, how it is to be stored, and `parts`, which reads the
    canonical tensors behind it in the dtype they are stored in (float32 for quantized forms)."""

    name: str
    homes: tuple[Home, ...]
    type: BlockType
    parts: Callable[[], list[Tensor]]


def planned(store: TensorStore, column: Column, form: Form, prefix: str = "") -> list[Planned]:
    """Every tensor of the model in `store` as `column` names and arranges it, in model order; `prefix` goes before each name.

    Where `form` asks for the block type that the source already has, blocks are copied as they are. Raises CheckpointError
    when the store lacks a parameter, or the format cannot hold the model or a row does not hold whole blocks.
    """
    reader = _Reader(store)
    return [_plan(reader, tensor, prefix) for tensor in _foreign(reader, column, form)]


def foreign(store: TensorStore, column: Column, form: Form) -> list[Foreign]:
    """The tensors of `column` in model order, before they are joined (Meta's ranks cut the parts first). Raises
    CheckpointError."""
    return _foreign(_Reader(store), column, form)


def kept(store: TensorStore, dtype: torch.dtype | None = None) -> Form:
    """The rule for plain (not quantized) files: `dtype`, or else every tensor's own.

    Quantized blocks become bfloat16 (what other tools quantized: the 16-bit dtype of the plain tensors beside them), and small
    float32 tensors (norms, routers: GGUF widens them) beside 16-bit matrices go back to the matrices' dtype when every value
    of them is exact in it. Reads those small tensors.
    """
    if dtype is not None:
        return lambda name, info: _word(dtype)
    check_store(store)
    usual = stored_dtype(store)

    def form(name: str, info: TensorInfo) -> str:
        kind = block_type(info.stored)
        if kind is not None and kind.decode is not None:
            return _word(torch.bfloat16)
        if isinstance(store, HoldsPacked) and store.packed(name) is not None:
            return _word(torch_dtype(store.dequantized))
        if info.dtype == torch.float32 and usual.itemsize == 2 and _small(name, info):
            values = store.read(name)
            if torch.equal(values.to(usual).float(), values):
                return _word(usual)
        return _word(info.dtype)

    return form


def written_dtype(plans: list[Planned]) -> torch.dtype:
    """The dtype of most numbers in `plans`, which must be plain: what a config says of the whole."""
    counts: dict[torch.dtype, int] = {}
    for plan in plans:
        kind = block_type(plan.stored)
        dtype = None if kind is None else kind.dtype
        assert kind is not None
        assert dtype is not None, plan.stored
        counts[dtype] = counts.get(dtype, 0) + plan.nbytes // kind.nbytes
    return max(counts, key=counts.__getitem__)


class _Reader:
    """Reads canonical tensors of a store, and lets go of the pages of the last ones before it reads the next."""

    def __init__(self, store: TensorStore) -> None:
        self.store = store
        self._last: tuple[Home, ...] = ()

    def parts(self, group: tuple[Home, ...], kind: BlockType) -> list[Tensor]:
        """The canonical tensors of `group` in the dtype of `kind`."""
        self._turn(group)
        return [read_as(self.store, home.canonical, kind.dtype or torch.float32, torch.device("cpu")) for home in group]

    def blocks(self, group: tuple[Home, ...], kind: BlockType) -> QuantTensor | None:
        """The stored blocks, when the source has just this type."""
        packed = packed_of(self.store, group[0].canonical)
        if packed is not None and packed.holds(kind.name):
            assert isinstance(self.store, HoldsPacked)
            self._turn(group)
            held = self.store.held(group[0].canonical, kind.name)
            return held if isinstance(held, QuantTensor) else None
        if not isinstance(self.store, HasBlocks) or self.store.info(group[0].canonical).stored != kind.name:
            return None
        assert not group[1:], group[0].name
        assert not group[0].cell.steps, group[0].name
        self._turn(group)
        raw = self.store.raw(group[0].canonical)
        return raw if isinstance(raw, QuantTensor) else None

    def _turn(self, group: tuple[Home, ...]) -> None:
        if isinstance(self.store, Releases):
            for home in self._last:
                self.store.release(home.canonical)
        self._last = group


def _foreign(reader: _Reader, column: Column, form: Form) -> list[Foreign]:
    store = reader.store
    check_store(store)
    found = []
    for name, group in sources(store.config, column).items():
        kind = _one_type(store, group, form)
        found.append(Foreign(name, group, kind, partial(reader.parts, group, kind)))
    return found


def _plan(reader: _Reader, tensor: Foreign, prefix: str) -> Planned:
    config, whole = reader.store.config, shapes(reader.store.config)
    outlines = [torch.empty(whole[home.canonical], device="meta") for home in tensor.homes]
    shape = tuple(join(tensor.homes, outlines, config).shape)

    def make() -> Tensor | QuantTensor:
        if tensor.type.decode is None:
            return join(tensor.homes, tensor.parts(), config)
        blocks = reader.blocks(tensor.homes, tensor.type)
        if blocks is not None:
            return blocks
        from herd.quant.encode import encode  # plain files need no encoder

        return encode(join(tensor.homes, tensor.parts(), config).contiguous(), tensor.type.name)

    plan = Planned(prefix + tensor.name, shape, tensor.type.name, make)
    try:
        _ = plan.nbytes
    except ValueError as error:
        raise CheckpointError(f"{error}: choose another type", path=reader.store.path, tensor=plan.name) from error
    return plan


def _one_type(store: TensorStore, group: tuple[Home, ...], form: Form) -> BlockType:
    """How a foreign tensor is stored: its parts' form, the widest when they differ."""
    kinds = [_known(form(home.canonical, store.info(home.canonical))) for home in group]
    if len({kind.name for kind in kinds}) == 1:
        return kinds[0]
    dtypes = [kind.dtype for kind in kinds if kind.dtype is not None]
    assert len(dtypes) == len(kinds), "quantized parts are never fused"
    return _known(_word(reduce(torch.promote_types, dtypes)))


def _known(word: str) -> BlockType:
    kind = block_type(word)
    assert kind is not None, word
    return kind


def _small(name: str, info: TensorInfo) -> bool:
    return len(info.shape) == 1 or name.endswith(".router.weight")


def _word(dtype: torch.dtype) -> str:
    return _WORDS[dtype]


_WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
