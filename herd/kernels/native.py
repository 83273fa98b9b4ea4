"""The native library for processors (csrc/): found, loaded, told which instruction set to use, and described to ctypes.

It is optional. Without it (no compiler at install time, an unknown processor) every caller has a torch path, and `missing`
says why and what is slower. The library is loaded after torch, whose OpenMP runtime it then shares: two pools of spinning
threads on the same cores would cost more than the kernels gain.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch  # first: see above
from torch import Tensor

import herd.kernels

__all__ = ["Decoder", "LayerWeights", "Span", "Weight", "isa", "matmul", "missing", "pack", "packs", "plain"]

ISAS = ("avx512", "avx2", "neon", "scalar")
"""Best first. `HERD_ISA` chooses one, or `none` for torch alone."""

PACKED = {2: "Q4_0", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
"""GGML types with panels, by id."""

_PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
PLACEMENTS = {"rope": 0, "rope_norm": 1, "none": 2, "tempered": 3}


class _Matrix(Structure):
    _fields_ = (("data", c_void_p), ("rows", c_int64), ("cols", c_int64), ("format", c_int64))


class _Layer(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
        *((name, _Matrix) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        ("placement", c_int64),
        ("chunk", c_int64),
        ("n_experts", c_int64),
        ("top_k", c_int64),
        ("router", _Matrix),
        ("experts", POINTER(_Matrix)),
    )


class _Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim")),
        ("norm_eps", c_double),
        ("layers", POINTER(_Layer)),
    )


class _Span(Structure):
    _fields_ = tuple((name, c_int64) for name in ("row", "rows", "position", "sequence"))


class _Step(Structure):
    _fields_ = (
        ("rows", c_int64),
        *((name, c_void_p) for name in ("x", "cos", "sin", "temper", "slot", "spans")),
        ("n_spans", c_int64),
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("block_size", c_int64),
        ("kv_kind", c_int64),
        ("k", c_void_p),
        ("v", c_void_p),
        ("first_layer", c_int64),
        ("last_layer", c_int64),
    )


class Weight:
    """A matrix as the library reads it: panels of a quantized type, or the rows of a float32, float16 or bfloat16 tensor.

    `storage` is kept alive; `type_id` is GGML's. y = x @ W^T with W [rows, columns].
    """

    __slots__ = ("columns", "matrix", "rows", "storage", "type_id")

    def __init__(self, storage: Tensor, type_id: int, rows: int, columns: int) -> None:
        assert storage.is_contiguous()
        assert storage.device.type == "cpu"
        self.storage, self.type_id, self.rows, self.columns = storage, type_id, rows, columns
        self.matrix = _Matrix(storage.data_ptr(), rows, columns, type_id)

    @property
    def nbytes(self) -> int:
        """Bytes read for one product."""
        return self.storage.nbytes


class Span(tuple[int, int, int, int]):
    """(first row, rows, first position, sequence): rows of one sequence that lie side by side at neighbouring positions."""


class LayerWeights:
    """One layer for `Decoder`: two norm weights [dim] and seven matrices, in the order of `NAMES`.

    In a layer of experts, w1 to w3 are the expert that all tokens share, `router` is a plain matrix [experts, dim], and
    `experts` has (w1, w2, w3) of each, all in the same formats; `top_k` of them see each token.
    """

    NAMES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

    def __init__(
        self,
        attention_norm: Tensor,
        ffn_norm: Tensor,
        matrices: Sequence[Weight],
        placement: str,
        chunk: int | None,
        *,
        router: Weight | None = None,
        experts: Sequence[tuple[Weight, Weight, Weight]] = (),
        top_k: int = 0,
    ) -> None:
        self.norms = tuple(t.detach().float().contiguous() for t in (attention_norm, ffn_norm))
        self.matrices = tuple(matrices)
        self.placement, self.chunk = placement, chunk
        assert (router is not None) == bool(experts) == bool(top_k)
        assert router is None or router.type_id in _PLAIN.values()
        self.router, self.experts, self.top_k = router, tuple(experts), top_k


class Decoder:
    """The layers of a Llama over a paged cache: x [T, D] float32 through all layers in one call.

    What it computes equals `Block.forward` layer by layer with activations quantized to 8 bits before quantized matrices
    (scale per 128 columns); a row's result is the same bits whatever rows are computed beside it. head_dim must be a
    multiple of 16.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        *,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        norm_eps: float,
    ) -> None:
        assert head_dim % 16 == 0
        self._layers = layers  # keeps every tensor alive
        self._structs = (_Layer * len(layers))()
        self._experts = []
        hidden = 0  # the widest feed-forward
        for struct, layer in zip(self._structs, layers, strict=True):
            struct.attention_norm, struct.ffn_norm = (t.data_ptr() for t in layer.norms)
            for name, weight in zip(layer.NAMES, layer.matrices, strict=True):
                setattr(struct, name, weight.matrix)
            hidden = max(hidden, layer.matrices[4].rows)
            struct.placement, struct.chunk = PLACEMENTS[layer.placement], layer.chunk or 0
            struct.n_experts, struct.top_k = len(layer.experts), layer.top_k
            if layer.router is not None:
                matrices = [weight.matrix for expert in layer.experts for weight in expert]
                self._experts.append((_Matrix * len(matrices))(*matrices))
                struct.router, struct.experts = layer.router.matrix, self._experts[-1]
                hidden = max(hidden, layer.experts[0][0].rows)
        layers_at = ctypes.cast(self._structs, POINTER(_Layer))
        self._model = _Model(dim, len(layers), n_heads, n_kv_heads, head_dim, hidden, norm_eps, layers_at)

    def __call__(
        self,
        x: Tensor,
        *,
        cos: Tensor,
        sin: Tensor,
        temper: Tensor,
        slots: Tensor,
        spans: Tensor,
        tables: Tensor,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        layers: range | None = None,
    ) -> None:
        """Run `layers` (default all) on x [T, D] float32, in place.

        cos, sin [T, Dh / 2] and temper [T] float32; slots [T] int64, where each row's key and value go (block * block_size +
        offset); spans [n, 4] int64 (see Span); tables [sequences, blocks] int32; k, v per layer
        [blocks, block_size, Hkv, Dh] float32, float16 or bfloat16, all contiguous on the CPU.
        """
        span = layers if layers is not None else range(len(self._layers))
        pointers = [(c_void_p * len(t))(*(one.data_ptr() for one in t)) for t in (k, v)]
        step = _Step(
            x.shape[0], x.data_ptr(), cos.data_ptr(), sin.data_ptr(), temper.data_ptr(), slots.data_ptr(), spans.data_ptr(),
            spans.shape[0], tables.data_ptr(), tables.shape[-1], k[0].shape[1], _PLAIN[k[0].dtype],
            ctypes.addressof(pointers[0]), ctypes.addressof(pointers[1]), span.start, span.stop,
        )  # fmt: skip
        _library().herd_forward(byref(self._model), byref(step), torch.get_num_threads())


def isa() -> str | None:
    """The instruction set in use, or None without the library (`missing` says why)."""
    return _loaded()[1]


def missing() -> str | None:
    """Why there is no native library, as a sentence for the user; None when there is one."""
    return _loaded()[2]


def packs(type_id: int) -> bool:
    """Whether the library multiplies with this GGML type."""
    return type_id in PACKED and isa() is not None


def pack(type_id: int, blocks: Tensor, columns: int) -> Weight:
    """GGML blocks [rows, row bytes] uint8 -> panels. The numbers are the same; they lie where a vector load finds them."""
    assert blocks.dtype == torch.uint8
    assert blocks.is_contiguous()
    library, rows = _library(), blocks.shape[0]
    out = torch.empty(library.herd_packed_bytes(type_id, rows, columns), dtype=torch.uint8)
    library.herd_pack(type_id, blocks.data_ptr(), rows, columns, out.data_ptr(), torch.get_num_threads())
    return Weight(out, type_id, rows, columns)


def plain(weight: Tensor) -> Weight:
    """A float32, float16 or bfloat16 matrix [rows, columns] as it is."""
    return Weight(weight.detach().contiguous(), _PLAIN[weight.dtype], *weight.shape)


def matmul(weight: Weight, x: Tensor) -> Tensor:
    """x [..., columns] float32 on the CPU -> x @ W^T [..., rows] float32."""
    assert x.dtype == torch.float32
    flat = x.reshape(-1, weight.columns).contiguous()
    out = torch.empty(flat.shape[0], weight.rows)
    _library().herd_matmul(
        byref(weight.matrix), flat.data_ptr(), flat.shape[0], out.data_ptr(), torch.get_num_threads()
    )
    return out.view(*x.shape[:-1], weight.rows)


def _library() -> ctypes.CDLL:
    library = _loaded()[0]
    assert library is not None, "callers ask isa() first"
    return library


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None, str | None]:
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
    library.herd_use.argtypes, library.herd_use.restype = (c_char_p,), c_int
    library.herd_packed_bytes.argtypes, library.herd_packed_bytes.restype = (c_int, c_int64, c_int64), c_int64
    library.herd_pack.argtypes = (c_int, c_void_p, c_int64, c_int64, c_void_p, c_int)
    library.herd_matmul.argtypes = (POINTER(_Matrix), c_void_p, c_int64, c_void_p, c_int)
    library.herd_forward.argtypes = (POINTER(_Model), POINTER(_Step), c_int)
    for function in (library.herd_pack, library.herd_matmul, library.herd_forward):
        function.restype = None
    for name in (wanted,) if wanted else ISAS:
        if library.herd_use(name.encode()):
            return library, name, None
    return (
        None,
        None,
        f"HERD_ISA={wanted}: this processor or build does not have it; choose one of {', '.join(ISAS)}, none",
    )
