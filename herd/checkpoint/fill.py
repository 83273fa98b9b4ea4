"""Weights into a model: build without storage, check every name and shape, hand each tensor its home.

Tensors whose dtype and device already fit stay views of the mapped file; the others are cast one at a time and the file
pages they came from are released, so loading takes hardly more memory than the model itself. Quantized matrices can stay
quantized, see `herd.checkpoint.weights`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from herd.checkpoint.mapped import slices
from herd.checkpoint.names import shapes
from herd.checkpoint.packed import PackedCopy, open_packed
from herd.checkpoint.placement import device_named, dtype_named
from herd.checkpoint.portion import copy_portion
from herd.checkpoint.store import HoldsPacked, KeepsBlocks, ReadOften, ReadsInto, Releases, TensorStore, packed_of
from herd.checkpoint.weights import FLOATS, Plan, meaningless, plan_weights, stored_dtype
from herd.errors import CheckpointError
from herd.model.late import Index, outline, promise, promises
from herd.model.llama import Llama
from herd.model.rope import Rope
from herd.quant.apply import Stored, put
from herd.quant.encode import encode
from herd.quant.fp8 import FP8, Fp8Tensor, encode_fp8
from herd.quant.late import put_later
from herd.quant.nf4 import NF4, Nf4Tensor, encode_nf4
from herd.quant.scheme import BlockType, QuantTensor, block_type

__all__ = ["FLOATS", "check_store", "fill", "read_as", "read_portion", "stored_dtype"]


def fill(
    store: TensorStore,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    weights: str = "auto",
    tick: Callable[[int, int], None] | None = None,
    later: bool = False,
) -> Llama:
    """A Llama with the weights of `store`, ready to run: in one dtype (default: `stored_dtype`) or, as `weights` says (see
    `herd.checkpoint.weights`), with quantized matrices.

    Parameters do not require gradients. On the CPU they may be views of the file: writing to one copies what is written,
    the file never changes. `tick(done, total)` is told the bytes of the file that have been dealt with. With `later` nothing is
    read: every number is promised (`herd.model.late`), and who keeps the promises reads the parts that it holds. Raises
    CheckpointError, and ConfigError for a dtype or device that `placement` does not know and for unknown `weights`.
    """
    dtype, device = dtype_named(dtype), device_named(device)
    check_store(store)
    plan = plan_weights(store, weights, dtype, device)
    dtype = plan.dtype
    _say_skipped(store)
    if plan.notes:
        first, *others = plan.notes
        more = f" (and {len(others)} more)" if others else ""
        warnings.warn(f"{store.path}: {first}{more}", stacklevel=3)
    with without_storage():
        model = Llama(store.config)
    with torch.device(device):
        model.rope = Rope(store.config)
    if later:
        return _promised(model, store, plan, device)
    sizes = {name: store.info(name).nbytes for name in shapes(store.config)}
    done: set[str] = set()

    def one(name: str) -> None:
        done.add(name)
        if tick is not None:
            tick(sum(sizes[name] for name in done), sum(sizes.values()))

    if device.type == "cpu" and not plan.kinds and isinstance(store, ReadOften):
        store.large_pages()  # weights stay where they are mapped, and every step reads them
    copy = open_packed(store, plan.kinds, one) if device.type == "cpu" else None
    for name in sizes:
        _fill_one(model, store, name, plan, device, copy)
        one(name)
    if store.config.tie_embeddings and isinstance(model.output, nn.Linear):
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def _promised(model: Llama, store: TensorStore, plan: Plan, device: torch.device) -> Llama:
    """`model` without numbers, which are read from `store` when the time comes."""
    for name, shape in shapes(store.config).items():
        home, _, field = name.rpartition(".")
        kind = plan.kinds.get(name)
        if kind is None:
            module = model.get_submodule(home)
            module.register_parameter(field, outline(shape, plan.dtype))
            promise(module, field, partial(read_portion, store, name, plan.dtype, device))
        else:
            put_later(model, name, shape, kind, plan.dtype, partial(_stored, store, name, kind, device))
    if store.config.tie_embeddings and isinstance(model.output, nn.Linear):
        model.output.weight = model.tok_embeddings.weight
        promise(model.output, "weight", promises(model.tok_embeddings)["weight"])
    return model.eval()


def _stored(store: TensorStore, name: str, kind: BlockType, device: torch.device) -> Stored:
    made, _ = _in_form(store, name, kind, device)
    if isinstance(store, Releases):
        store.release(name)
    return made


def _fill_one(
    model: Llama, store: TensorStore, name: str, plan: Plan, device: torch.device, copy: PackedCopy | None
) -> None:
    """Give the parameter `name` its numbers: in the dtype of the plan, or in a stored form."""
    kind = plan.kinds.get(name)
    if kind is None:
        home, _, field = name.rpartition(".")
        weight = nn.Parameter(read_as(store, name, plan.dtype, device), requires_grad=False)
        model.get_submodule(home).register_parameter(field, weight)
        return
    stored, own = _in_form(store, name, kind, device)
    panels = copy.panels(name) if copy is not None and name in copy else None
    put(model, name, stored, plan.dtype, own=own, activations=plan.activations, panels=panels)
    if isinstance(store, Releases):
        store.release(name)  # panels replace what was read; look-ups bring back the rows they need


def _in_form(
    store: TensorStore, name: str, kind: BlockType, device: torch.device
) -> tuple[QuantTensor | Fp8Tensor | Nf4Tensor, bool]:
    """The tensor `name` as blocks of `kind`, and whether they are memory of their own."""
    info = store.info(name)
    packed = packed_of(store, name)
    if packed is not None and packed.holds(kind.name):
        assert isinstance(store, HoldsPacked)
        stored = store.held(name, kind.name)
        if isinstance(stored, Fp8Tensor):
            return Fp8Tensor(stored.weight.to(device), stored.scale.to(device)), True
        return QuantTensor(stored.blocks.to(device), kind, info.shape), True
    if kind is FP8:
        dtype = torch.float32 if _decoded(store, name) or info.dtype == torch.float64 else info.dtype
        made = encode_fp8(read_as(store, name, dtype, torch.device("cpu")), name=name)
        return Fp8Tensor(made.weight.to(device), made.scale.to(device)), True
    if kind is NF4:
        dtype = torch.float32 if _decoded(store, name) or info.dtype == torch.float64 else info.dtype
        return encode_nf4(read_as(store, name, dtype, torch.device("cpu")).to(device), name=name), True
    if info.stored == kind.name and isinstance(store, KeepsBlocks):
        raw = store.raw(name)
        blocks = raw.blocks if isinstance(raw, QuantTensor) else _bytes(raw)
        return QuantTensor(blocks.to(device), kind, info.shape), device.type != "cpu"
    if kind.dtype is not None:
        return QuantTensor(_bytes(read_as(store, name, kind.dtype, device)), kind, info.shape), True
    raw = store.raw(name) if isinstance(store, KeepsBlocks) else None
    if isinstance(raw, QuantTensor):  # from one quantized type to another: a few rows at a time are float32
        parts = [QuantTensor(raw.blocks[rows], raw.type, _cut(raw.shape, rows)) for rows in slices(raw.blocks)]
        made = torch.cat([_encoded(part.dequantize(), kind, name) for part in parts])
    else:
        double = info.dtype == torch.float64
        made = _encoded(read_as(store, name, torch.float32 if double else info.dtype, torch.device("cpu")), kind, name)
    return QuantTensor(made.to(device), kind, info.shape), True


def _decoded(store: TensorStore, name: str) -> bool:
    """Whether reading the tensor decodes it, to float32."""
    if packed_of(store, name) is not None:
        return True
    stored = block_type(store.info(name).stored)
    return stored is not None and stored.dtype is None


def _encoded(values: torch.Tensor, kind: BlockType, name: str) -> torch.Tensor:
    made = encode(values, kind.name, name=name)
    assert isinstance(made, QuantTensor)
    return made.blocks


def _cut(shape: tuple[int, ...], rows: slice) -> tuple[int, ...]:
    return (len(range(*rows.indices(shape[0]))), *shape[1:])


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


@contextmanager
def without_storage() -> Iterator[None]:
    """Inside, modules are built as outlines: shapes without data, to be given their tensors afterwards."""
    with _Unfilled(), torch.device("meta"):
        yield


class _Unfilled(TorchFunctionMode):
    """Construct modules without drawing their first weights: on the meta device that means nothing, yet torch imports a
    second's and 80 MB's worth of symbolic mathematics for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def check_store(store: TensorStore) -> None:
    """Hold names and shapes of `store` against its config. Raises CheckpointError naming the first tensor that differs."""
    expected, names = shapes(store.config), set(store.names())
    for name in expected:
        if name not in names:
            raise CheckpointError("is missing", path=store.path, tensor=name)
    for name in sorted(names - expected.keys()):
        raise CheckpointError("is no parameter of this model", path=store.path, tensor=name)
    for name, shape in expected.items():
        found = store.info(name).shape
        if found != shape:
            raise CheckpointError(f"has shape {found}, the model needs {shape}", path=store.path, tensor=name)


def read_as(store: TensorStore, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor in `dtype` on `device`: a view of the file when it already fits, otherwise a copy made a few rows at a time.

    Raises CheckpointError for a stored type that means nothing without scales.
    """
    info = store.info(name)
    if info.dtype not in FLOATS:
        raise meaningless(store, name)
    if info.dtype == dtype and device.type == "cpu":
        tensor = store.read(name)
    else:  # the lasting tensor is allocated before the passing one, so that the heap does not fill with holes
        tensor = torch.empty(info.shape, dtype=dtype, device=device)
        _copy(store, name, tensor)
    if dtype == torch.float16 and packed_of(store, name) is not None and bool(tensor.isinf().any()):
        raise CheckpointError("has values beyond float16: load it with dtype='bfloat16'", path=store.path, tensor=name)
    if isinstance(store, Releases):
        store.release(name)  # what was copied is not needed again, and views bring their pages back when touched
    return tensor


def read_portion(
    store: TensorStore, name: str, dtype: torch.dtype, device: torch.device, index: Index | None = None
) -> torch.Tensor:
    """The part `index` of one tensor in `dtype` on `device`; of the file no more is read than it lies in. All: `read_as`."""
    if index is None:
        return read_as(store, name, dtype, device)
    if store.info(name).dtype not in FLOATS:
        raise meaningless(store, name)
    out = torch.empty([part.stop - part.start for part in index], dtype=dtype, device=device)
    copy_portion(store, name, index, out)
    if isinstance(store, Releases):
        store.release(name)
    return out


def _copy(store: TensorStore, name: str, out: torch.Tensor) -> None:
    """Into `out`, letting go of the file's pages on the way: a large embedding is a fifth of a small model."""
    if isinstance(store, ReadsInto):
        store.read_into(name, out)
        return
    source = store.read(name)
    for rows in slices(out):
        out[rows].copy_(source[rows])
        if isinstance(store, Releases):
            store.release(name)


def _say_skipped(store: TensorStore) -> None:
    skipped: tuple[str, ...] = getattr(store, "skipped", ())
    if skipped:
        groups = sorted({name.split(".")[0] for name in skipped})
        warnings.warn(
            f"{store.path}: text model only; {len(skipped)} tensors of {', '.join(groups)} are not loaded",
            stacklevel=4,
        )
