"""The border to the native library (csrc/): the file is found, loaded, told which instruction set to use, and described.

No torch is imported here, but the library is to be loaded after torch: it then uses the OpenMP runtime that torch brought. Two
pools of spinning threads on the same cores would cost more than the kernels gain.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import herd.kernels

__all__ = [
    "ISAS",
    "VERSION",
    "Dense",
    "Documents",
    "Head",
    "Layer",
    "Matrix",
    "Model",
    "Pass",
    "Step",
    "library",
    "loaded",
]

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "neon", "scalar")
"""Best first. `HERD_ISA` chooses one, or `none` for torch alone."""

VERSION = 7
"""Of the structures below; csrc/abi.h has the same number."""


class Matrix(Structure):
    _fields_ = (("data", c_void_p), ("rows", c_int64), ("cols", c_int64), ("format", c_int64))


class Head(Structure):
    _fields_ = (("output", Matrix), ("norm", c_void_p), ("norm_eps", c_double))


class Layer(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
        *((name, Matrix) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        ("placement", c_int64),
        ("chunk", c_int64),
        ("n_experts", c_int64),
        ("top_k", c_int64),
        ("router", Matrix),
        ("experts", POINTER(Matrix)),
    )


class Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim")),
        ("norm_eps", c_double),
        ("layers", POINTER(Layer)),
    )


class Step(Structure):
    _fields_ = (
        ("rows", c_int64),
        *((name, c_void_p) for name in ("x", "cos", "sin", "temper", "slot", "spans")),
        ("n_spans", c_int64),
        ("tables", c_void_p),
        *((name, c_int64) for name in ("n_sequences", "table_stride", "n_blocks", "block_size", "kv_kind")),
        *((name, c_void_p) for name in ("k", "v", "k_scale", "v_scale")),
        ("first_layer", c_int64),
        ("last_layer", c_int64),
    )


class Documents(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("kind", "heads", "kv_heads", "head_dim")),
        ("begins", c_void_p),
        ("n_documents", c_int64),
        *((name, c_void_p) for name in ("q", "k", "v", "out", "sums", "grad", "by_q", "by_k", "by_v")),
    )


class Pass(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("what", "kind", "rows", "columns", "heads")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("a", "b", "weight", "out", "scales", "grad", "by_a", "by_b", "by_weight")),
        *((name, c_void_p) for name in ("cos", "sin", "labels", "losses")),
    )


class Dense(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "columns", "inner", "add")),
        *(("a", c_void_p), ("a_row", c_int64), ("a_inner", c_int64)),
        *(("b", c_void_p), ("b_inner", c_int64), ("b_column", c_int64)),
        *(("c", c_void_p), ("c_row", c_int64)),
    )


_FUNCTIONS = (
    ("herd_use", c_int, (c_char_p,)),
    ("herd_packed_bytes", c_int64, (c_int, c_int64, c_int64)),
    ("herd_pack", None, (c_int, c_void_p, c_int64, c_int64, c_void_p, c_int)),
    ("herd_values", None, (c_int, c_void_p, c_int64, c_int64, c_void_p, c_int)),
    ("herd_checksum", c_uint64, (c_void_p, c_int64, c_int)),
    ("herd_matmul_scratch", c_int64, (POINTER(Matrix), c_int64, c_int)),
    ("herd_matmul", None, (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int, c_void_p)),
    ("herd_head_scratch", c_int64, (POINTER(Head), c_int64, c_int)),
    ("herd_head", None, (POINTER(Head), c_void_p, c_void_p, c_int64, c_void_p, c_int, c_void_p)),
    ("herd_forward_scratch", c_int64, (POINTER(Model), POINTER(Step), c_int)),
    ("herd_documents_scratch", c_int64, (POINTER(Documents), c_int, c_int)),
    ("herd_documents", None, (POINTER(Documents), c_int, c_int, c_void_p)),
    ("herd_pass_scratch", c_int64, (c_int,)),
    ("herd_pass", None, (POINTER(Pass), c_int, c_void_p)),
    ("herd_dense_scratch", c_int64, (POINTER(Dense), c_int)),
    ("herd_dense", None, (POINTER(Dense), c_int, c_void_p)),
    ("herd_forward", c_char_p, (POINTER(Model), POINTER(Step), c_int, c_void_p)),
)


def library() -> ctypes.CDLL:
    """The library; callers have seen that there is one."""
    found = loaded()[0]
    assert found is not None, "callers ask isa() first"
    return found


@cache
def loaded() -> tuple[ctypes.CDLL | None, str | None, str | None]:
    """(library, instruction set, why there is none)."""
    wanted = os.environ.get("HERD_ISA", "").lower()
    if wanted == "none":
        return None, None, "HERD_ISA=none switches the native kernels off"
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    names = [Path(folder) / f"libherd{suffix}" for folder in herd.kernels.__path__]
    found = next((name for name in names if name.is_file()), None)
    if found is None:
        why = "herd was installed without its native kernels (no C++20 compiler?): install again with one, for example g++"
        return None, None, why
    try:
        library = ctypes.CDLL(str(found))
    except OSError as error:
        return None, None, f"the native kernels cannot be loaded: {error}"
    if not hasattr(library, "herd_version") or library.herd_version() != VERSION:
        return None, None, "the native kernels were built from other sources than this herd: install it again"
    for name, result, arguments in _FUNCTIONS:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    for name in (wanted,) if wanted else ISAS:
        if library.herd_use(name.encode()):
            return library, name, None
    why = f"HERD_ISA={wanted}: this processor or build does not have it; choose one of {', '.join(ISAS)}, none"
    return None, None, why
