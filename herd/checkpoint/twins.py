"""Whether two stored tensors are the same bytes: tied matrices saved twice, key/value heads copied for more ranks."""

from __future__ import annotations

from herd.checkpoint.mapped import SLICE, same_bytes, slices
from herd.checkpoint.store import TensorFile

__all__ = ["same_stored"]

SAMPLES, SAMPLE = 16, 4096
"""Places spread over a tensor, and bytes at each: two different matrices differ in the first of them."""


def same_stored(one: TensorFile, name: str, other: TensorFile, twin: str, *, sampled: bool = False) -> bool:
    """Whether tensor `name` of `one` and `twin` of `other` have one shape and dtype and the same bytes.

    Slice by slice until the first difference, letting go of the file pages after each; no torch, unless a tensor is stored
    with unusual strides. `sampled` looks at SAMPLES of the bytes only, for who must not read the data.
    """
    a, b = one.describe(name), other.describe(twin)
    left, right = (getattr(file, "packed_tensor", lambda _: None)(of) for file, of in ((one, name), (other, twin)))
    if left is not None and right is not None:  # quantized matrices are the same when all their parts are
        parts, others = left.parts(), right.parts()
        same = (a.shape, a.stored, len(parts)) == (b.shape, b.stored, len(others))
        return same and all(same_stored(*x, *y, sampled=sampled) for x, y in zip(parts, others, strict=True))
    if (a.shape, a.number) != (b.shape, b.number):
        return False
    here, there = one.span(name), other.span(twin)
    if here is None or there is None:
        return _same_values(one, name, other, twin)
    if one.path == other.path and here == there:
        return True
    step, most = (max(1, here.size // SAMPLES), SAMPLE) if sampled else (SLICE, SLICE)
    for at in range(0, here.size, step):
        size = min(most, here.size - at)
        same = one.map.bytes(here.start + at, size) == other.map.bytes(there.start + at, size)
        one.map.release(here.start + at, size)
        other.map.release(there.start + at, size)
        if not same:
            return False
    return True


def _same_values(one: TensorFile, name: str, other: TensorFile, twin: str) -> bool:
    a, b = one.tensor(name), other.tensor(twin)
    if not a.ndim:
        return same_bytes(a, b)
    for rows in slices(a):
        same = same_bytes(a[rows], b[rows])
        one.release(name)
        other.release(twin)
        if not same:
            return False
    return True
