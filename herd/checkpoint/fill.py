"""Weights into a model: build without storage, check every name and shape, hand each tensor its home.

Tensors whose dtype and device already fit stay views of the mapped file; the others are cast one at a time and the file
pages they came from are released, so loading takes hardly more memory than the model itself.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from herd.checkpoint.mapped import slices
from herd.checkpoint.names import shapes
from herd.checkpoint.placement import device_named, dtype_named
from herd.checkpoint.store import ReadsInto, Releases, TensorStore
from herd.errors import CheckpointError
from herd.model.llama import Llama
from herd.model.rope import Rope

__all__ = ["check_store", "fill", "read_as", "stored_dtype"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fill(store: TensorStore, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu") -> Llama:
    """A Llama with the weights of `store`, in one dtype (default: `stored_dtype`), ready to run.

    Parameters do not require gradients. On the CPU they may be views of the file: writing to one copies what is written,
    the file never changes. Raises CheckpointError, and ConfigError for a dtype or device that `placement` does not know.
    """
    dtype, device = dtype_named(dtype), device_named(device)
    check_store(store)
    dtype = stored_dtype(store) if dtype is None else dtype
    _say_skipped(store)
    with without_storage():
        model = Llama(store.config)
    with torch.device(device):
        model.rope = Rope(store.config)
    for name in shapes(store.config):
        home, _, field = name.rpartition(".")
        weight = nn.Parameter(read_as(store, name, dtype, device), requires_grad=False)
        model.get_submodule(home).register_parameter(field, weight)
    if store.config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


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


def stored_dtype(store: TensorStore) -> torch.dtype:
    """The floating dtype that most numbers of `store` are stored in; bfloat16 for quantized ones, whose exact float32 values
    would take eight times their file. Raises CheckpointError when there is none."""
    counts: Counter[torch.dtype] = Counter()
    for name in shapes(store.config):
        info = store.info(name)
        if info.dtype not in FLOATS:
            raise _meaningless(store, name)
        count = torch.Size(info.shape).numel()
        packed = info.nbytes < count * info.dtype.itemsize
        counts[torch.bfloat16 if packed else info.dtype] += count
    return counts.most_common(1)[0][0]


def read_as(store: TensorStore, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor in `dtype` on `device`: a view of the file when it already fits, otherwise a copy made a few rows at a time.

    Raises CheckpointError for a stored type that means nothing without scales.
    """
    info = store.info(name)
    if info.dtype not in FLOATS:
        raise _meaningless(store, name)
    if info.dtype == dtype and device.type == "cpu":
        tensor = store.read(name)
    else:  # the lasting tensor is allocated before the passing one, so that the heap does not fill with holes
        tensor = torch.empty(info.shape, dtype=dtype, device=device)
        _copy(store, name, tensor)
    if isinstance(store, Releases):
        store.release(name)  # what was copied is not needed again, and views bring their pages back when touched
    return tensor


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


def _meaningless(store: TensorStore, name: str) -> CheckpointError:
    stored = store.info(name).stored
    return CheckpointError(f"is stored as {stored}, which has no meaning without scales", path=store.path, tensor=name)


def _say_skipped(store: TensorStore) -> None:
    skipped: tuple[str, ...] = getattr(store, "skipped", ())
    if skipped:
        groups = sorted({name.split(".")[0] for name in skipped})
        warnings.warn(
            f"{store.path}: text model only; {len(skipped)} tensors of {', '.join(groups)} are not loaded",
            stacklevel=4,
        )
