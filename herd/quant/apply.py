"""Quantized weights into a model: children are swapped by canonical name, whether the numbers come from a file or from the
model's own weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from herd.errors import ConfigError
from herd.kernels import native
from herd.model.llama import Llama
from herd.model.moe import Experts
from herd.quant.encode import encode
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear, dequantized
from herd.quant.matrix import Matrix
from herd.quant.mix import MIXES, Mix, mix
from herd.quant.scheme import QuantTensor

__all__ = ["WEIGHTS", "dequantize", "kind_of", "put", "quantize", "rule_named"]

_SHORT = {"int8": "Q8_0", "int4": "Q4_0", "w8a8": "Q8_0"}
WEIGHTS: tuple[str, ...] = (*_SHORT, *(m.name.lower() for m in MIXES.values() if m.quantized))
"""Names that `rule_named` takes."""


def rule_named(name: str, device: str | torch.device = "cpu") -> Mix:
    """The quantization called `name`: a mix of llama.cpp (q4_k_m, ...), int8 (Q8_0), int4 (Q4_0), or w8a8.

    On a CPU products with quantized weights round activations to 8 bits in any case, so there w8a8 is int8. Raises ConfigError
    with the choices; fp8 and, without the native library, w8a8 are refused.
    """
    key = name.lower()
    if key == "fp8":
        raise ConfigError(
            "fp8 weights need arithmetic that a CPU does not have, and herd has no GPU kernels for them yet: choose int8 or int4"
        )
    if key == "w8a8" and (torch.device(device).type != "cpu" or native.isa() is None):
        why = native.missing() or "other devices multiply with float activations"
        raise ConfigError(f"w8a8 runs on a CPU with herd's native kernels only ({why}): choose int8")
    rule = mix(_SHORT.get(key, key)) if key in WEIGHTS or key.upper() in MIXES or key in ("q4_k", "q5_k") else None
    if rule is None or not rule.quantized:
        raise ConfigError(f"no weights are called {name[:40]!r}: choose one of {', '.join(WEIGHTS)}")
    return rule


def quantize(model: Llama, weights: str) -> list[str]:
    """Swap the matrices of `model` for quantized ones, in place and one at a time; norms and routers stay as they are.

    `weights` is a name as for `rule_named`. Returns a note for each matrix that got another form than the rule's. Raises
    ConfigError for an unknown name, and for a model that is quantized already; CheckpointError for values that have no
    quantized form (infinite, not a number).
    """
    rule = rule_named(weights, model.norm.weight.device)
    notes = []
    for name, weight in _floats(model).items():
        choice = rule.kind(name, tuple(weight.shape), model.config)
        if choice.note is not None:
            notes.append(f"{name}: {choice.note}")
        if choice.kind not in ("F32", "F16", "BF16"):
            stored = encode(weight, choice.kind, name=name)
            assert isinstance(stored, QuantTensor)
            put(model, name, stored, model.norm.weight.dtype, own=True)
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


def put(model: Llama, name: str, stored: QuantTensor, dtype: torch.dtype, *, own: bool) -> None:
    """Make `stored` the weight of `model` called `name` (canonical). A tied output follows the embedding.

    `dtype` is what embeddings are looked up in. `own`: the blocks are memory of their own, given up where panels replace them;
    otherwise they are views of a file and stay beside the panels.
    """
    home, _, field = name.rpartition(".")
    if isinstance(model.get_submodule(home), Experts | QuantExperts):
        shape = stored.shape[1:]
        each = tuple(_packed(QuantTensor(blocks, stored.type, shape), own) for blocks in stored.blocks)
        if not isinstance(model.get_submodule(home), QuantExperts):
            model.set_submodule(home, QuantExperts())
        setattr(model.get_submodule(home), field, each)
    elif home == "tok_embeddings":
        tied = model.config.tie_embeddings
        matrix = _packed(stored, own) if tied else Matrix(stored)  # rows alone need no panels
        model.set_submodule(home, QuantEmbedding(matrix, dtype))
        if tied:
            model.set_submodule("output", QuantLinear(matrix))
    else:
        model.set_submodule(home, QuantLinear(_packed(stored, own)))


def kind_of(model: nn.Module) -> str | None:
    """The type that most stored bytes of the matrices in `model` have ("Q4_K"); None when none is quantized."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            for matrix in module.matrices():
                if id(matrix) not in seen:
                    seen.add(id(matrix))
                    sizes[matrix.type.name] = sizes.get(matrix.type.name, 0) + matrix.nbytes
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _packed(stored: QuantTensor, own: bool) -> Matrix:
    matrix = Matrix(stored)
    if matrix.pack() and own:
        matrix.drop()
    return matrix


def _floats(model: Llama) -> dict[str, Tensor]:
    """Matrices by canonical name, the tied output excluded. Raises ConfigError when some are not plain."""
    if kind_of(model) is not None:
        raise ConfigError("the model is quantized already: load it with weights='plain' to quantize it in another way")
    found = {name: weight.detach() for name, weight in model.named_parameters() if weight.ndim > 1}
    if model.config.tie_embeddings:
        found.pop("output.weight", None)
    return found
