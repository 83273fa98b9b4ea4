"""Quantized weights into a model: children are swapped by canonical name, whether the numbers come from a file or from the
model's own weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from herd.errors import ConfigError
from herd.model.llama import Llama
from herd.model.moe import Experts
from herd.quant.encode import encode
from herd.quant.fp8 import FP8, Fp8Matrix, Fp8Tensor, encode_fp8
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear, dequantized
from herd.quant.matrix import Matrix
from herd.quant.mix import MIXES, Mix, Nf4Layers, RowsOfFp8, mix
from herd.quant.nf4 import NF4, Nf4Matrix, Nf4Tensor, encode_nf4
from herd.quant.scheme import QuantTensor, block_type

__all__ = [
    "WEIGHTS", "Stored", "dequantize", "experts_of", "held", "kind_of", "matrix_of", "put", "quantize", "rule_named",
]  # fmt: skip

_SHORT = {
    "int8": mix("Q8_0"),
    "int4": mix("Q4_0"),
    "w8a8": replace(mix("Q8_0"), activations=8),
    "fp8": RowsOfFp8(name="FP8", file_type=-1, base="FP8"),
    "nf4": Nf4Layers(name="NF4", file_type=-1, base="NF4"),
}
WEIGHTS: tuple[str, ...] = (*_SHORT, *(m.name.lower() for m in MIXES.values() if m.quantized))
"""Names that `rule_named` takes."""

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Stored = QuantTensor | Fp8Tensor | Nf4Tensor


def rule_named(name: str) -> Mix:
    """The quantization called `name`: a mix of llama.cpp (q4_k_m, ...), int8, int4, w8a8, fp8 or nf4 (what they are is said in
    `herd.checkpoint.weights`). Raises ConfigError with the choices.
    """
    key = name.lower()
    rule = _SHORT.get(key)
    if rule is None and (key.upper() in MIXES or key in ("q4_k", "q5_k")):
        rule = mix(key)
    if rule is None or not rule.quantized:
        raise ConfigError(f"no weights are called {name[:40]!r}: choose one of {', '.join(WEIGHTS)}")
    return rule


def quantize(model: Llama, weights: str) -> list[str]:
    """Swap the matrices of `model` for quantized ones, in place and one at a time; norms and routers stay as they are.

    `weights` is a name as for `rule_named`. Returns a note for each matrix that got another form than the rule's. Raises
    ConfigError for an unknown name, and for a model that is quantized already; CheckpointError for values that have no
    quantized form (infinite, not a number).
    """
    rule = rule_named(weights)
    notes = []
    floats = _floats(model)
    choices = {name: rule.kind(name, tuple(weight.shape), model.config) for name, weight in floats.items()}
    quantized = {name for name, choice in choices.items() if choice.kind not in _PLAIN.values()}
    experts = {name.rpartition(".")[0] for name in quantized if floats[name].ndim == 3}
    for name, weight in floats.items():
        choice = choices[name]
        if choice.note is not None:
            notes.append(f"{name}: {choice.note}")
        if name in quantized or name.rpartition(".")[0] in experts:  # the three of a layer's experts are one module
            stored = _encoded(weight, choice.kind, name) if name in quantized else _as_stored(weight)
            put(model, name, stored, model.norm.weight.dtype, own=True, activations=rule.activations)
    return notes


def dequantize(model: Llama, dtype: torch.dtype = torch.float32) -> Llama:
    """A model of its own with the values of a quantized `model` in plain `dtype`: what tests compare with."""
    twin = Llama(model.config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
                twin.set_submodule(name, dequantized(module, dtype))
            else:
                for field, weight in module.named_parameters(recurse=False):
                    setattr(twin.get_submodule(name), field, nn.Parameter(weight.to(dtype), requires_grad=False))
    if model.config.tie_embeddings:
        twin.output.weight = twin.tok_embeddings.weight
    return twin.requires_grad_(False).eval()


def put(
    model: Llama,
    name: str,
    stored: Stored,
    dtype: torch.dtype,
    *,
    own: bool,
    activations: int | None = None,
    panels: Tensor | None = None,
) -> None:
    """Make `stored` the weight of `model` called `name` (canonical). A tied output follows the embedding.

    `dtype` is what embeddings are looked up in. `own`: the blocks are memory of their own, given up where panels replace them;
    otherwise they are views of a file and stay beside the panels. `activations` is as for `Matrix`. `panels`:
    those of `stored`, made before (uint8; those of experts one after the other).
    """
    home, _, field = name.rpartition(".")
    if isinstance(model.get_submodule(home), Experts | QuantExperts):
        each = experts_of(stored, own=own, activations=activations, panels=panels)
        if not isinstance(model.get_submodule(home), QuantExperts):
            model.set_submodule(home, QuantExperts())
        setattr(model.get_submodule(home), field, each)
    elif home == "tok_embeddings":
        tied = model.config.tie_embeddings
        assert isinstance(stored, QuantTensor), "embeddings are no FP8 and no NF4"
        matrix = matrix_of(stored, own=own, activations=activations, panels=panels, rows_alone=not tied)
        model.set_submodule(home, QuantEmbedding(matrix, dtype))
        if tied:
            model.set_submodule("output", QuantLinear(matrix))
    else:
        matrix = matrix_of(stored, own=own, activations=activations, panels=panels)
        model.set_submodule(home, QuantLinear(matrix))


def experts_of(
    stored: Stored, *, own: bool, activations: int | None = None, panels: Tensor | None = None
) -> tuple[Matrix, ...]:
    """One matrix for each expert of `stored` [E, out, in]; as `matrix_of`."""
    if isinstance(stored, Fp8Tensor | Nf4Tensor):
        count = len(stored.scale if isinstance(stored, Fp8Tensor) else stored.codes)
        return tuple(matrix_of(stored[e], own=own) for e in range(count))
    parts = [QuantTensor(blocks, stored.type, stored.shape[1:]) for blocks in stored.blocks]
    made = [None] * len(parts) if panels is None else panels.view(len(parts), -1)
    both = zip(parts, made, strict=True)
    return tuple(matrix_of(part, own=own, activations=activations, panels=panel) for part, panel in both)


def matrix_of(
    stored: Stored,
    *,
    own: bool,
    activations: int | None = None,
    panels: Tensor | None = None,
    rows_alone: bool = False,
) -> Matrix:
    """`stored` [out, in] as a matrix that multiplies as fast as it can here, see `put`; `rows_alone`: it is only looked up in."""
    if isinstance(stored, Nf4Tensor):
        return Nf4Matrix(stored)
    if rows_alone:  # needs no panels
        assert isinstance(stored, QuantTensor)
        return Matrix(stored)
    matrix = Fp8Matrix(stored) if isinstance(stored, Fp8Tensor) else Matrix(stored, activations)
    if matrix.pack(panels) and own:
        matrix.drop()
    return matrix


def kind_of(model: nn.Module) -> str | None:
    """The type that most stored bytes of the matrices in `model` have ("Q4_K"); None when none is quantized."""
    sizes = _stored_sizes(model)
    return max(sizes, key=sizes.__getitem__) if sizes else None


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of all weights of `model` by type ("Q4_K", "float32"); what is shared (a tied output) counts once."""
    sizes: dict[str, int] = dict(_stored_sizes(model))
    for weight in model.parameters():
        kind = str(weight.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + weight.nbytes
    return sizes


def _stored_sizes(model: nn.Module) -> dict[str, int]:
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            for matrix in module.matrices():
                if id(matrix) not in seen:
                    seen.add(id(matrix))
                    sizes[matrix.type.name] = sizes.get(matrix.type.name, 0) + matrix.nbytes
    return sizes


def _encoded(weight: Tensor, kind: str, name: str) -> Stored:
    if kind == FP8.name:
        return encode_fp8(weight, name=name)
    if kind == NF4.name:
        return encode_nf4(weight, name=name)
    stored = encode(weight, kind, name=name)
    assert isinstance(stored, QuantTensor)
    return stored


def _as_stored(weight: Tensor) -> QuantTensor:
    """Plain numbers as blocks of one value."""
    kind = block_type(_PLAIN[weight.dtype])
    assert kind is not None
    return QuantTensor(weight.contiguous().view(torch.uint8), kind, tuple(weight.shape))


def _floats(model: Llama) -> dict[str, Tensor]:
    """Matrices by canonical name, the tied output excluded. Raises ConfigError when some are not plain."""
    if kind_of(model) is not None:
        raise ConfigError("the model is quantized already: load it with weights='plain' to quantize it in another way")
    found = {name: weight.detach() for name, weight in model.named_parameters() if weight.ndim > 1}
    if model.config.tie_embeddings:
        found.pop("output.weight", None)
    return found
