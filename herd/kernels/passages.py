"""Attention inside documents, and its gradients, in the native library: what `herd.kernels.documents` takes where it can.

Arithmetic is float32 whatever is read and written. Every document and key head is computed by one thread in one order, so results
are the same bits for any number of threads and whatever other documents lie beside it.

Letters: T positions of all documents, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from herd.kernels import native
from herd.kernels.border import Documents, library

__all__ = ["attend", "attend_backward", "takes"]

_KINDS = {torch.float32: 0, torch.bfloat16: 30}


def takes(q: Tensor) -> bool:
    """Whether the library computes with tensors like this one."""
    return q.is_cpu and q.dtype in _KINDS and q.shape[-1] % 16 == 0 and native.isa() is not None


def attend(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """As `document_attention`: (result [T, H, Dh], log-sums [T, H] float32)."""
    out, sums = torch.empty_like(q), torch.empty(q.shape[:2])
    begins, asked = _asked(q, k, v, first)
    asked.out, asked.sums = out.data_ptr(), sums.data_ptr()
    _run(asked, False, begins)
    return out, sums


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, which `attend` gave `out` and `sums` for."""
    _check(grad, q.dtype, q.shape)
    _check(out, q.dtype, q.shape)
    _check(sums, torch.float32, q.shape[:2])
    begins, asked = _asked(q, k, v, first)
    by_q, by_k, by_v = torch.empty(q.shape), torch.empty_like(k), torch.empty_like(v)
    asked.out, asked.sums, asked.grad = out.data_ptr(), sums.data_ptr(), grad.data_ptr()
    asked.by_q, asked.by_k, asked.by_v = by_q.data_ptr(), by_k.data_ptr(), by_v.data_ptr()
    _run(asked, True, begins)
    return by_q.to(q.dtype), by_k, by_v


def _asked(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Documents]:
    """(where documents begin and where the last one ends, the operands): the first has to live as long as the second."""
    rows, heads, dim = q.shape
    _check(q, q.dtype, (rows, heads, dim))
    _check(k, q.dtype, (rows, k.shape[1], dim))
    _check(v, q.dtype, k.shape)
    assert heads % k.shape[1] == 0
    assert first.shape == (rows,)
    begins = torch.cat([first.nonzero().flatten(), torch.tensor([rows])])
    assert rows > 0, "there is something to attend"
    assert begins[0] == 0, "the first position begins a document"
    pointers = q.data_ptr(), k.data_ptr(), v.data_ptr()
    return begins, Documents(_KINDS[q.dtype], heads, k.shape[1], dim, begins.data_ptr(), len(begins) - 1, *pointers)


def _check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The library sees an address only."""
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.shape == shape, (tensor.shape, shape)
    assert tensor.is_contiguous()
    assert tensor.is_cpu


def _run(asked: Documents, backward: bool, begins: Tensor) -> None:
    assert begins.dtype == torch.int64
    threads = torch.get_num_threads()
    scratch = torch.empty(library().herd_documents_scratch(byref(asked), backward, threads), dtype=torch.uint8)
    library().herd_documents(byref(asked), backward, threads, scratch.data_ptr())
