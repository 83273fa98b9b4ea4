"""Values to the form a file stores them in: blocks for the quantized types, one rounding for the plain ones.

`encode` is the inverse of `QuantTensor.dequantize`. What the bytes equal, and which errors they may have, is in
docs/formats/quantization.md. Work goes in pieces, each of them on one of as many threads as torch uses
(`torch.set_num_threads`): scratch memory does not grow with the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import torch
from torch import Tensor

from herd.errors import CheckpointError
from herd.quant import encode_k, encode_legacy
from herd.quant.scheme import BlockType, QuantTensor, block_type

__all__ = ["ENCODED", "WEIGHTED", "encode"]

PIECE = 1 << 17
"""Values encoded at a time on a CPU: enough that starting operations costs little, at most 5 MB of scratch a thread."""

_ENCODERS: dict[str, Callable[..., Tensor]] = {
    "Q4_0": encode_legacy.q4_0,
    "Q5_0": encode_legacy.q5_0,
    "Q5_1": encode_legacy.q5_1,
    "Q8_0": encode_legacy.q8_0,
    "Q4_K": encode_k.q4_k,
    "Q5_K": encode_k.q5_k,
    "Q6_K": encode_k.q6_k,
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INFINITE = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # infinity as bits; larger ones are NaN
_HALVES = {
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # where the fp16 numbers are, if not only at 0

WEIGHTED: tuple[str, ...] = ("Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K")
"""The types whose encoders make use of an importance matrix."""

FAINT = 1e-6
"""Of the mean importance: what a column has at least. Columns that no text has used still are weights."""

ENCODED: tuple[str, ...] = (*_PLAIN, *_ENCODERS)
"""The types that `encode` can make."""


def encode(
    values: Tensor, kind: str, *, name: str | None = None, importance: Tensor | None = None
) -> Tensor | QuantTensor:
    """`values` [..., columns] float32, bfloat16 or float16 as a file of type `kind` (a name in ENCODED) stores them.

    F32, F16 and BF16 give a Tensor of that dtype (the same tensor when it already has it), every other kind a QuantTensor,
    on the device of `values`. On a CPU Q4_0, Q5_0, Q5_1 and Q8_0 equal the bytes of llama.cpp and of the `gguf` package, Q4_K,
    Q5_K and Q6_K those of llama.cpp (without importance matrix, built for x86-64).

    `importance` [columns], numbers of at least 0 (the mean square of each column's inputs), makes types in WEIGHTED minimize the
    error weighted by it, and no block's is larger than without; other types take no notice. Such bytes are herd's own.

    Raises CheckpointError, naming the tensor `name`, for rows that are not whole blocks, for values that are infinite or not a
    number, and for finite values that the type cannot hold (fp16 and the fp16 scales end at 65504); ValueError for a kind or
    dtype that herd cannot encode.
    """
    target = block_type(kind)
    if target is None or kind not in ENCODED:
        raise ValueError(f"herd cannot encode {kind!r}; it can make {', '.join(ENCODED)}")
    if values.dtype not in _PLAIN.values():
        raise ValueError(f"{values.dtype} values: encode takes float32, bfloat16 or float16")
    values = values.detach()
    if kind in _PLAIN:
        return _cast(values, _PLAIN[kind], name)
    if not values.dim() or values.shape[-1] % target.values:
        columns = values.shape[-1] if values.dim() else 1
        raise CheckpointError(
            f"rows of {columns} values are not whole {kind} blocks of {target.values}: choose another type for this tensor",
            tensor=name,
        )
    if importance is not None and kind in WEIGHTED:
        return _encode(values, target, name, _weights(importance, values.shape[-1], name))
    return _encode(values, target, name)


def _weights(importance: Tensor, columns: int, name: str | None) -> Tensor | None:
    """float32 with mean 1 and a floor; None when nothing is known. Raises ValueError for what is no importance of `columns`."""
    if importance.shape != (columns,) or not bool(importance.isfinite().all()) or bool((importance < 0).any()):
        raise ValueError(
            f"importance of {name}: {tuple(importance.shape)} numbers for {columns} columns, all at least 0"
        )
    mean = importance.float().mean()
    return None if mean == 0 else (importance.float() / mean).clamp_(min=FAINT)


def _cast(values: Tensor, dtype: torch.dtype, name: str | None) -> Tensor:
    """One rounding to `dtype`, to nearest, ties to even. Widening is exact and lets infinities and NaN pass."""
    cast = values.to(dtype)
    if dtype in (values.dtype, torch.float32):
        return cast
    for start, before, after in _pieces(values, cast, 1, 1):
        magnitude = after.view(torch.int16) & 0x7FFF  # as bits: several times faster than isfinite
        if magnitude.numel() and int(magnitude.amax()) >= _INFINITE[dtype]:
            _refuse(before, magnitude >= _INFINITE[dtype], start, values.shape, str(dtype).removeprefix("torch."), name)
    return cast


def _encode(values: Tensor, kind: BlockType, name: str | None, importance: Tensor | None = None) -> QuantTensor:
    encoder, halves = _ENCODERS[kind.name], _HALVES.get(kind.name, (0,))
    weights = None if importance is None else importance.to(values.device).view(-1, kind.values)
    blocks = torch.empty(
        (*values.shape[:-1], kind.row_bytes(values.shape[-1])), dtype=torch.uint8, device=values.device
    )

    def work(piece: tuple[int, Tensor, Tensor]) -> None:
        start, source, out = piece
        with torch.inference_mode():
            x = source.reshape(-1, kind.values).float().contiguous()
            made = encoder(x)
            if weights is not None:
                first = start // kind.values
                here = weights[torch.arange(first, first + len(x), device=x.device) % len(weights)]
                made = _better(made, encoder(x, here), x, here, kind)
            out.copy_(made.view(out.shape))
            scales = torch.cat([made[:, at : at + 2] for at in halves], dim=1).view(torch.float16)
            finite = scales.isfinite().all(dim=1, keepdim=True)
            if not finite.all():
                _refuse(source, ~finite.expand(-1, kind.values), start, values.shape, kind.name, name)

    pieces = _pieces(values, blocks, kind.values, kind.nbytes)
    threads = torch.get_num_threads()
    if threads == 1 or values.numel() <= PIECE // 4 or not values.is_cpu:
        for piece in pieces:
            work(piece)
    else:
        _in_threads(work, pieces, threads)
    return QuantTensor(blocks, kind, tuple(values.shape))


def _better(made: Tensor, other: Tensor, x: Tensor, weights: Tensor, kind: BlockType) -> Tensor:
    """Of two encodings, block by block the one of less weighted squared error; `other` only where it is really less."""
    assert kind.decode is not None
    errors = [kind.decode(blocks).sub_(x).square_().mul_(weights).sum(1, keepdim=True) for blocks in (made, other)]
    return torch.where(errors[1] < errors[0], other, made)


def _in_threads(
    work: Callable[[tuple[int, Tensor, Tensor]], None], pieces: Iterable[tuple[int, Tensor, Tensor]], threads: int
) -> None:
    """`work` on every piece, each thread computing alone: torch's own threads wait for each other after every operation, and
    that makes them slower than one where other programs run too."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for _ in pool.map(work, pieces):
                pass
        finally:
            torch.set_num_threads(threads)  # the workers' 1 is also what threads started later would begin with


def _pieces(
    values: Tensor, out: Tensor, width: int, nbytes: int, first: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number of the first value, part of `values`, the same part of `out`): about PIECE values each.

    `out` has `nbytes` elements for every `width` values. A tensor that is not contiguous is taken row by row, so that no copy
    of all of it is made; `first` is the number of its first value.
    """
    size = (PIECE if values.is_cpu else 128 * PIECE) // width  # elsewhere, starting an operation costs more
    if values.is_contiguous():
        flat, target = values.view(-1, width), out.view(-1, nbytes)
        for start in range(0, len(flat), size):
            yield first + start * width, flat[start : start + size], target[start : start + size]
    elif values.dim() > 2:
        for i, (part, target) in enumerate(zip(values, out, strict=True)):
            yield from _pieces(part, target, width, nbytes, first + i * part.numel())
    else:
        rows, target = torch.atleast_2d(values), torch.atleast_2d(out)
        step = max(1, size * width // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            yield first + start * rows.shape[1], rows[start : start + step], target[start : start + step]


def _refuse(piece: Tensor, bad: Tensor, first: int, shape: Sequence[int], kind: str, name: str | None) -> NoReturn:
    """Raise CheckpointError for the worst value of `piece` where `bad`; `first` is the number of its first value in `shape`."""
    flat = piece.reshape(-1).float()
    inside = int(flat.abs().nan_to_num(nan=math.inf).masked_fill_(~bad.reshape(-1), -1.0).argmax())
    value, index, rest = float(flat[inside]), [], first + inside
    for extent in reversed(shape):
        rest, here = divmod(rest, extent)
        index.insert(0, here)
    if math.isfinite(value):
        problem = f"the value {value:g} at {index} is too large for {kind}; store this tensor as F32 or BF16"
    else:
        problem = f"the value at {index} is {value} and cannot be stored as {kind}: the weights are damaged or diverged"
    raise CheckpointError(problem, tensor=name)
