"""Matrix products and whole decoder layers in the native library (csrc/), for tensors on a processor.

The library is optional. Without it (no compiler at install time, an unknown processor) every caller has a torch path, and
`missing` says why and what is slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_void_p
from operator import is_

import torch  # before the library is loaded: see border.py
from torch import Tensor

from herd.kernels.border import Head, Layer, Matrix, Model, Step, library, loaded

__all__ = [
    "Decoder",
    "LayerWeights",
    "OutputHead",
    "Span",
    "Weight",
    "checksum",
    "isa",
    "matmul",
    "missing",
    "pack",
    "packed_bytes",
    "packs",
    "plain",
    "values",
]

PACKED = {2: "Q4_0", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
"""GGML types with panels, by id."""

MAX_GROUP = 64
"""Query heads that may share a key head."""

_PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_KV = _PLAIN | {torch.int8: 24}
PLACEMENTS = {"rope": 0, "rope_norm": 1, "none": 2, "tempered": 3}


class Weight:
    """A matrix as the library reads it: panels of a quantized type, or the rows of a float32, float16 or bfloat16 tensor.

    `storage` is kept alive; `type_id` is GGML's. y = x @ W^T with W [rows, columns].
    """

    __slots__ = ("columns", "matrix", "rows", "storage", "type_id")

    def __init__(self, storage: Tensor, type_id: int, rows: int, columns: int) -> None:
        assert storage.is_contiguous()
        assert storage.device.type == "cpu"
        self.storage, self.type_id, self.rows, self.columns = storage, type_id, rows, columns
        self.matrix = Matrix(storage.data_ptr(), rows, columns, type_id)

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
        assert n_heads % n_kv_heads == 0
        assert n_heads // n_kv_heads <= MAX_GROUP
        heads, kv = n_heads * head_dim, n_kv_heads * head_dim
        self._layers = layers  # keeps every tensor alive
        self._structs = (Layer * len(layers))()
        self._experts: list[object] = []
        for struct, layer in zip(self._structs, layers, strict=True):
            hidden = layer.matrices[4].rows
            shapes = ((heads, dim), (kv, dim), (kv, dim), (dim, heads), (hidden, dim), (dim, hidden), (hidden, dim))
            assert tuple((w.rows, w.columns) for w in layer.matrices) == shapes
            assert all(t.shape == (dim,) for t in layer.norms)
            struct.attention_norm, struct.ffn_norm = (t.data_ptr() for t in layer.norms)
            for name, weight in zip(layer.NAMES, layer.matrices, strict=True):
                setattr(struct, name, weight.matrix)
            struct.placement, struct.chunk = PLACEMENTS[layer.placement], layer.chunk or 0
            struct.n_experts, struct.top_k = len(layer.experts), layer.top_k
            if layer.router is not None:
                assert (layer.router.rows, layer.router.columns) == (len(layer.experts), dim)
                kinds = {tuple((w.rows, w.columns, w.type_id) for w in expert) for expert in layer.experts}
                assert len(kinds) == 1, "one format for all experts of a layer"
                assert next(iter(kinds))[0][1] == next(iter(kinds))[1][0] == dim
                matrices = [weight.matrix for expert in layer.experts for weight in expert]
                self._experts.append((Matrix * len(matrices))(*matrices))
                struct.router, struct.experts = layer.router.matrix, self._experts[-1]
        layers_at = ctypes.cast(self._structs, POINTER(Layer))
        self._bound_to: list[Tensor] = []
        self._bound: tuple[object, ...] = ()
        self._model = Model(dim, len(layers), n_heads, n_kv_heads, head_dim, norm_eps, layers_at)

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
        k_scale: Sequence[Tensor] = (),
        v_scale: Sequence[Tensor] = (),
        layers: range | None = None,
    ) -> None:
        """Run `layers` (default all) on x [T, D] float32, in place.

        cos, sin [T, Dh / 2] and temper [T] float32; slots [T] int64, where each row's key and value go (block * block_size +
        offset); spans [n, 4] int64 (see Span), in row order, covering every row; tables [sequences, blocks] int32; k, v per
        layer [blocks, block_size, Hkv, Dh] float32, float16, bfloat16, or int8 with k_scale, v_scale per layer
        [blocks, block_size, Hkv] float32. All contiguous on the CPU.
        """
        model, span = self._model, layers if layers is not None else range(len(self._layers))
        rows, half = x.shape[0], model.head_dim // 2
        _check(x, torch.float32, (rows, model.dim))
        _check(cos, torch.float32, (rows, half))
        _check(sin, torch.float32, (rows, half))
        _check(temper, torch.float32, (rows,))
        _check(slots, torch.int64, (rows,))
        _check(spans, torch.int64, (spans.shape[0], 4))
        _check(tables, torch.int32, tuple(tables.shape[-2:]))
        cache = self._bind(k, v, k_scale, v_scale)
        step = Step(
            rows, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), temper.data_ptr(), slots.data_ptr(), spans.data_ptr(),
            spans.shape[0], tables.data_ptr(), *tables.shape, *cache, span.start, span.stop,
        )  # fmt: skip
        native, threads = library(), torch.get_num_threads()
        scratch = _scratch(native.herd_forward_scratch(byref(model), byref(step), threads))
        wrong = native.herd_forward(byref(model), byref(step), threads, scratch.data_ptr())
        if wrong is not None:  # not an `assert`: with -O the step would silently not have run
            raise AssertionError(wrong.decode())

    def _bind(self, *cache: Sequence[Tensor]) -> tuple[object, ...]:
        """The cache's part of a step. The tensors of the last step are not looked at again: these are many small calls."""
        tensors = [*cache[0], *cache[1], *cache[2], *cache[3]]
        if len(tensors) != len(self._bound_to) or not all(map(is_, tensors, self._bound_to)):
            first = cache[0][0]
            kind, shape = _KV[first.dtype], (*first.shape[:2], self._model.n_kv_heads, self._model.head_dim)
            scales = kind == _KV[torch.int8]
            for some, dtype, dims, wanted in zip(
                cache,
                (first.dtype,) * 2 + (torch.float32,) * 2,
                (4, 4, 3, 3),
                (True, True, scales, scales),
                strict=True,
            ):
                assert len(some) == (len(self._layers) if wanted else 0)
                for tensor in some:
                    _check(tensor, dtype, shape[:dims])
            places = (tuple(t.data_ptr() for t in some) for some in cache)
            self._pointers = [(c_void_p * len(at))(*at) for at in places]  # kept: the step has their addresses
            addresses = (ctypes.addressof(at) if len(at) else None for at in self._pointers)
            self._bound_to, self._bound = tensors, (*shape[:2], kind, *addresses)
        return self._bound


class OutputHead:
    """The end of a Llama: norm and output matrix of chosen rows in one call.

    The norm is that of `herd.model.norm` in float32, with `norm` [D] its weight; before a quantized matrix its result is rounded
    to 8 bits. A row's logits are the same bits whatever rows are computed beside it.
    """

    def __init__(self, output: Weight, norm: Tensor, norm_eps: float) -> None:
        self._output, self._norm = output, norm.detach().float().contiguous()  # kept alive
        assert self._norm.shape == (output.columns,)
        self._head = Head(output.matrix, self._norm.data_ptr(), norm_eps)

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [T, D] float32, rows [R] int64 -> logits [R, V] float32."""
        count, height = len(rows), x.shape[0]
        _check(x, torch.float32, (height, self._output.columns))
        _check(rows, torch.int64, (count,))
        asked = rows.tolist()
        if count and not 0 <= min(asked) <= max(asked) < height:  # not an `assert`: other memory would be read
            raise AssertionError(f"rows {min(asked)} to {max(asked)} of {height}")
        out = torch.empty(count, self._output.rows)
        native, threads, head = library(), torch.get_num_threads(), byref(self._head)
        scratch = _scratch(native.herd_head_scratch(head, count, threads))
        native.herd_head(head, x.data_ptr(), rows.data_ptr(), count, out.data_ptr(), threads, scratch.data_ptr())
        return out


def _check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The library sees an address only."""
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.shape == shape, (tensor.shape, shape)
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"


def _scratch(nbytes: int) -> Tensor:
    """Working memory of one call. It belongs to the call: two threads may call at once, and nothing stays behind."""
    return torch.empty(nbytes, dtype=torch.uint8)


def isa() -> str | None:
    """The instruction set in use, or None without the library (`missing` says why)."""
    return loaded()[1]


def missing() -> str | None:
    """Why there is no native library, as a sentence for the user; None when there is one."""
    return loaded()[2]


def packs(type_id: int) -> bool:
    """Whether the library multiplies with this GGML type."""
    return type_id in PACKED and isa() is not None


def pack(type_id: int, blocks: Tensor, columns: int) -> Weight:
    """GGML blocks [rows, row bytes] uint8 -> panels. The numbers are the same; they lie where a vector load finds them."""
    assert blocks.dtype == torch.uint8
    assert blocks.is_contiguous()
    native, rows = library(), blocks.shape[0]
    out = torch.empty(native.herd_packed_bytes(type_id, rows, columns), dtype=torch.uint8)
    native.herd_pack(type_id, blocks.data_ptr(), rows, columns, out.data_ptr(), torch.get_num_threads())
    return Weight(out, type_id, rows, columns)


def packed_bytes(type_id: int, rows: int, columns: int) -> int:
    """Bytes of the panels of a matrix [rows, columns]."""
    return library().herd_packed_bytes(type_id, rows, columns)


def values(type_id: int, blocks: Tensor, columns: int) -> Tensor:
    """GGML blocks [rows, row bytes] uint8 of a type that `packs` -> their values [rows, columns] float32."""
    assert blocks.dtype == torch.uint8
    assert blocks.is_contiguous()
    native, rows, threads = library(), len(blocks), torch.get_num_threads()
    assert blocks.is_cpu
    out = torch.empty(rows, columns)
    native.herd_values(type_id, blocks.data_ptr(), rows, columns, out.data_ptr(), threads)
    return out


def checksum(data: Tensor) -> int:
    """A 64-bit checksum of a contiguous uint8 tensor on the CPU, as fast as reading it. Against damage, not against malice."""
    assert data.dtype == torch.uint8
    assert data.is_contiguous()
    return library().herd_checksum(data.data_ptr(), data.numel(), torch.get_num_threads())


def plain(weight: Tensor) -> Weight:
    """A float32, float16 or bfloat16 matrix [rows, columns] as it is."""
    return Weight(weight.detach().contiguous(), _PLAIN[weight.dtype], *weight.shape)


def matmul(weight: Weight, x: Tensor) -> Tensor:
    """x [..., columns] float32 on the CPU -> x @ W^T [..., rows] float32."""
    assert x.dtype == torch.float32
    flat = x.reshape(-1, weight.columns).contiguous()
    out = torch.empty(flat.shape[0], weight.rows)
    native, rows, threads = library(), flat.shape[0], torch.get_num_threads()
    scratch = _scratch(native.herd_matmul_scratch(byref(weight.matrix), rows, threads))
    at = byref(weight.matrix)
    native.herd_matmul(at, flat.data_ptr(), rows, out.data_ptr(), threads, scratch.data_ptr())
    return out.view(*x.shape[:-1], weight.rows)
