"""Every tensor of two checkpoints held against each other, one at a time and a few rows at a time.

A is what B was, or is said to be, made from. B is exact when it holds A's numbers; when its stored type is lower it must be
what encoding A gives, or at least lie within the bound of the scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.checkpoint.fill import FLOATS
from herd.checkpoint.mapped import same_bytes, slices
from herd.checkpoint.names import shapes
from herd.checkpoint.store import Releases, TensorInfo, TensorStore
from herd.convert.report import TensorResult
from herd.quant.scheme import QuantTensor, block_type

__all__ = ["IMATRIX", "Tick", "compare_tensors", "encoded", "rows_of", "tensor_bytes", "weights_of"]

Tick = Callable[[int], None]
"""Told the number of bytes looked at since the last call."""

IMATRIX = "quantize.imatrix.file"
"""The GGUF key that says that a file was made with an importance matrix: such encoders minimize another error."""

UNBOUND = ("Q4_0", "Q5_0", "Q5_1")
"""Types that are not within `herd.quant.bound` when they were made with an importance matrix."""

_OUTPUT, _EMBEDDING = "output.weight", "tok_embeddings.weight"


def compare_tensors(
    a: TensorStore, b: TensorStore, tick: Tick, importance: Mapping[str, Tensor] | None = None
) -> Iterator[TensorResult]:
    """One result per tensor of either side, in model order. A tied output is the embedding on both sides.

    `importance` is what B was encoded with, where that is known: canonical name -> [columns].
    What is missing or extra in B is a failed result. Raises CheckpointError where a file cannot be read.
    """
    names_a, names_b = weights_of(a), weights_of(b)
    for name in [*names_a, *(name for name in names_b if name not in names_a)]:
        if name not in names_a or name not in names_b:
            yield _alone(a if name in names_a else b, (names_a | names_b)[name], name, missing=name in names_a)
        elif not (name == _OUTPUT and names_a[name] == names_b[name] == _EMBEDDING):  # tied on both sides: seen already
            columns = None if importance is None else importance.get(names_a[name])
            yield _compare(_View(a, names_a[name]), _View(b, names_b[name]), name, tick, columns)


def weights_of(store: TensorStore) -> dict[str, str]:
    """Parameter -> the canonical tensor that holds it, in model order; the output of a tied model is its embedding."""
    known = set(store.names())
    order = [name for name in shapes(store.config) if name in known]
    found = {name: name for name in [*order, *sorted(known - set(order))]}
    if store.config.tie_embeddings and _OUTPUT not in found and _EMBEDDING in found:
        found[_OUTPUT] = _EMBEDDING
    return found


def tensor_bytes(store: TensorStore) -> int:
    """Bytes of all tensors in the files."""
    return sum(store.info(name).nbytes for name in store.names())


def rows_of(store: TensorStore, name: str, step: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, rows) of the stored tensor `name` in float32, `step` rows or about eight megabytes at a time."""
    view = _View(store, name)
    raw, shape = view.raw(), view.info.shape
    cuts = _rows(raw, raw, shape)
    if step is not None:
        cuts = (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    for rows in cuts:
        yield rows.start or 0, _values(_part(raw, rows)).float()
        view.release()


def encoded(values: Tensor, stored: str, importance: Tensor | None = None) -> Tensor:
    """`values` as a file of type `stored` gives them back: cast, or encoded and decoded. float32 for quantized types."""
    kind = block_type(stored)
    assert kind is not None, stored
    if kind.dtype is not None:
        return values.to(kind.dtype)
    from herd.quant.encode import encode  # plain files need no encoder

    return encode(values.float().contiguous(), stored, importance=importance).dequantize()


@dataclass(frozen=True)
class _View:
    """One tensor of one store, given in rows."""

    store: TensorStore
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.store.info(self.name)

    def raw(self) -> Tensor | QuantTensor:
        """The blocks where the store has blocks, else the values."""
        get = getattr(self.store, "raw", None)
        return self.store.read(self.name) if get is None else get(self.name)

    def release(self) -> None:
        if isinstance(self.store, Releases):
            self.store.release(self.name)


def _alone(store: TensorStore, held: str, name: str, *, missing: bool) -> TensorResult:
    info = store.info(held)
    word = "is missing in B" if missing else "is in B, but not in A"
    stored = (info.stored, "-") if missing else ("-", info.stored)
    return TensorResult(name, info.shape, *stored, "failed", math.inf, why=word)


def _compare(a: _View, b: _View, name: str, tick: Tick, columns: Tensor | None = None) -> TensorResult:
    one, other = a.info, b.info
    result = _Result(name, one, other)
    if one.shape != other.shape:
        tick(one.nbytes + other.nbytes)
        return result.failed(f"has shape {one.shape} in A and {other.shape} in B")
    for info, side in ((one, "A"), (other, "B")):
        if info.dtype not in FLOATS:
            return result.failed(f"is stored as {info.stored} in {side}, which has no meaning without scales")
    left, right = a.raw(), b.raw()
    importance = b.store.metadata().get(IMATRIX) is not None
    for rows in _rows(left, right, one.shape):
        part_a, part_b = _part(left, rows), _part(right, rows)
        offset = rows.start or 0
        try:
            _compare_rows(result, part_a, part_b, offset, importance=importance, columns=columns)
        except ValueError as error:  # the encoder's: numbers that the type cannot hold
            return result.failed(f"cannot be {other.stored}: {error}")
        share = 1.0 if not one.shape else min(rows.stop, one.shape[0]) / one.shape[0] - rows.start / one.shape[0]
        tick(int(share * (one.nbytes + other.nbytes)))
        a.release()
        b.release()
    return result.done()


def _rows(left: Tensor | QuantTensor, right: Tensor | QuantTensor, shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of about eight megabytes in float32, whatever is stored."""
    return slices(torch.empty(shape, dtype=torch.float32, device="meta"))


def _part(stored: Tensor | QuantTensor, rows: slice) -> Tensor | QuantTensor:
    if isinstance(stored, Tensor):
        return stored[rows]
    blocks = stored.blocks[rows]
    return QuantTensor(blocks, stored.type, (len(blocks), *stored.shape[1:]))


def _values(part: Tensor | QuantTensor) -> Tensor:
    return part if isinstance(part, Tensor) else part.dequantize()


def _compare_rows(
    result: _Result,
    a: Tensor | QuantTensor,
    b: Tensor | QuantTensor,
    offset: int,
    *,
    importance: bool,
    columns: Tensor | None,
) -> None:
    """`importance`: B says that it was made with a matrix; `columns`: that matrix, where it is known."""
    if isinstance(a, QuantTensor) and isinstance(b, QuantTensor) and _same_blocks(a, b):
        return
    values_a, values_b = _values(a), _values(b)
    if isinstance(b, Tensor):
        _plain(result, values_a, values_b, offset)
        return
    if torch.equal(values_a.float(), values_b):  # already on the grid of the blocks: nothing was lost
        return
    if same_bytes(encoded(values_a, b.type.name, columns), values_b):
        result.seen("encoded", values_a.float(), values_b, offset)
        return
    from herd.quant.bound import bound

    if importance and b.type.name in UNBOUND:
        result.seen("failed", values_a.float(), values_b, offset)
        result.why += f"; with an importance matrix the scales of {b.type.name} come from a search that has no bound"
        return
    limits = bound(values_a.float(), b.type.name, b, importance=importance)
    result.seen("within", values_a.float(), values_b, offset, limits)


def _same_blocks(a: QuantTensor, b: QuantTensor) -> bool:
    return a.type is b.type and torch.equal(a.blocks, b.blocks)


def _plain(result: _Result, a: Tensor, b: Tensor, offset: int) -> None:
    """B is plain numbers: A's own, or A's rounded once to B's type."""
    cast = a.to(b.dtype)
    if not same_bytes(cast, b):
        result.seen("failed", a, b, offset)
    elif not same_bytes(cast.to(a.dtype), a):  # rounded
        if bool((cast.isinf() & ~a.isinf()).any()):
            result.overflow(a, cast, offset)
        else:
            result.seen("encoded", a, b, offset)


_ORDER = ("exact", "encoded", "within", "failed")


class _Result:
    """Collects the rows of one tensor."""

    def __init__(self, name: str, a: TensorInfo, b: TensorInfo) -> None:
        self.name, self.a, self.b = name, a, b
        self.status, self.error, self.bound = "exact", 0.0, None
        self.index: tuple[int, ...] | None = None
        self.why = ""
        self._excess = -math.inf
        self.wrong = 0

    def seen(self, status: str, a: Tensor, b: Tensor, offset: int, limits: Tensor | None = None) -> None:
        """Rows that are not exact: the largest error and where it is."""
        wide_a, wide_b = a.double(), b.double()
        error = (wide_a - wide_b).abs()
        same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
        error = error.nan_to_num(math.inf, math.inf).masked_fill(same, 0.0)
        limit = None if limits is None else limits.double().expand_as(error)
        excess = error if limit is None else error - limit
        if limit is not None and bool((excess > 0).any()):
            status = "failed"
        where = int(excess.argmax())
        if status == "failed":
            self.wrong += int(((error > 0) if limit is None else (excess > 0)).sum())
        if float(excess.flatten()[where]) > self._excess or _ORDER.index(status) > _ORDER.index(self.status):
            self._excess = float(excess.flatten()[where])
            self.error = max(self.error, float(error.flatten()[where]))
            self.bound = None if limit is None else float(limit.flatten()[where])
            at = [int(i) for i in torch.unravel_index(torch.tensor(where), error.shape)]
            self.index = (at[0] + offset, *at[1:]) if at else ()
            if status == "failed":
                beyond = "" if limit is None else f", the bound of {self.b.stored} is {self.bound:.3g}"
                self.why = (
                    f"at {list(self.index)} A has {float(wide_a.flatten()[where]):.6g}, "
                    f"B {float(wide_b.flatten()[where]):.6g}{beyond}"
                )
        self._raise(status)

    def overflow(self, a: Tensor, cast: Tensor, offset: int) -> None:
        """A number of A is too large for B's type."""
        self.seen("failed", a, cast, offset)
        self.why = (
            f"{float(a.abs().max()):.6g} is too large for {self.b.stored}: keep the type with --dtype bf16 or f32"
        )

    def failed(self, why: str) -> TensorResult:
        self._raise("failed")
        self.error, self.why = math.inf, why
        return self.done()

    def done(self) -> TensorResult:
        """The finished result."""
        why = self.why
        if self.status == "failed" and self.wrong:
            why = f"{self.wrong} of {math.prod(self.a.shape)} numbers differ: {why}"
        status = self.status
        assert status in _ORDER
        return TensorResult(
            self.name, self.a.shape, self.a.stored, self.b.stored, status, self.error, self.bound, self.index, why
        )  # fmt: skip

    def _raise(self, status: str) -> None:
        self.status = max(self.status, status, key=_ORDER.index)
