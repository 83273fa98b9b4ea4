"""Bytes of a model's weights in a number format, tensor by tensor: the matrices of the layers shrink, norms never do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from herd.checkpoint.names import shapes
from herd.errors import ConfigError
from herd.model.config import ModelConfig
from herd.parallel.part import Part
from herd.quant.mix import MIXES, Mix
from herd.quant.scheme import block_type

__all__ = ["SCHEMES", "Scheme", "WeightBytes", "part_bytes", "scheme", "stored_bytes", "weight_bytes"]

OUTER = ("tok_embeddings.weight", "output.weight")
_EXPERTS = ".experts."
_ALIASES = {
    "bfloat16": "bf16", "float16": "f16", "fp16": "f16", "float32": "f32", "fp32": "f32", "float8": "fp8", "w8": "int8",
    "w4": "int4",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A way to store weights. `bits` of a typical matrix value decides speed; `says` tells people what it means.

    `form` gives the bytes of one tensor, from its canonical name, its shape and the model.
    """

    name: str
    bits: float
    says: str
    form: Callable[[str, tuple[int, ...], ModelConfig], int]


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes by part. `embedding` is the look-up table, `output` the matrix to the logits (0 when tied)."""

    embedding: int
    output: int
    layers: int
    experts: int
    norms: int
    beside: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return self.embedding + self.output + self.layers + self.experts + self.norms + self.beside


def _plain(bytes_per_value: int) -> Callable[[str, tuple[int, ...], ModelConfig], int]:
    return lambda name, shape, config: math.prod(shape) * bytes_per_value


def _layers_only(row: Callable[[int], float]) -> Callable[[str, tuple[int, ...], ModelConfig], int]:
    """`row`: bytes of a matrix row by its length. Embeddings, output, routers and norms stay in 16 bits."""

    def form(name: str, shape: tuple[int, ...], config: ModelConfig) -> int:
        if len(shape) < 2 or name in OUTER or name.endswith("router.weight"):
            return math.prod(shape) * 2
        return math.ceil(math.prod(shape[:-1]) * row(shape[-1]))

    return form


def _mixed(how: Mix) -> Scheme:
    def form(tensor: str, shape: tuple[int, ...], config: ModelConfig) -> int:
        kind = block_type(how.kind(tensor, shape, config).kind)
        assert kind is not None, how.name
        return math.prod(shape[:-1]) * kind.row_bytes(shape[-1])

    base = block_type(how.base)
    assert base is not None, how.name
    bits = base.nbytes * 8 / base.values
    return Scheme(name=how.name.lower(), bits=bits, says=f"GGUF {how.name}, mixed as llama.cpp does", form=form)


_KEPT = "; embeddings, output and norms in bfloat16"

SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme(name="f32", bits=32, says="float32 throughout", form=_plain(4)),
        Scheme(name="bf16", bits=16, says="bfloat16 throughout", form=_plain(2)),
        Scheme(name="f16", bits=16, says="float16 throughout", form=_plain(2)),
        Scheme(
            name="int8", bits=8, says="int8 with a 16-bit scale per row" + _KEPT, form=_layers_only(lambda n: n + 2)
        ),
        Scheme(name="fp8", bits=8, says="fp8 with a 32-bit scale per row" + _KEPT, form=_layers_only(lambda n: n + 4)),
        Scheme(
            name="int4",
            bits=4.25,
            says="int4 in groups of 128 with a 16-bit scale and zero each" + _KEPT,
            form=_layers_only(lambda n: n / 2 + 4 * math.ceil(n / 128)),
        ),
        *(_mixed(how) for how in MIXES.values() if how.quantized),
    )
}


def scheme(name: str) -> Scheme:
    """The scheme called `name`. Raises ConfigError listing the known ones."""
    key = name.strip().lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key not in SCHEMES:
        raise ConfigError(f"weights cannot be planned as {name[:40]!r}: choose {', '.join(SCHEMES)}")
    return SCHEMES[key]


@lru_cache(maxsize=64)
def weight_bytes(config: ModelConfig, how: Scheme, beside: int = 0) -> WeightBytes:
    """Bytes by part of the decoder in `how`, and of `beside` parameters outside of it in 16 bits."""
    sums = {"embedding": 0, "output": 0, "layers": 0, "experts": 0, "norms": 0}
    for name, shape in shapes(config).items():
        sums[_part(name, shape)] += how.form(name, shape, config)
    return WeightBytes(**sums, beside=2 * beside)


def stored_bytes(sizes: Mapping[str, int], config: ModelConfig) -> WeightBytes:
    """Bytes by part of a checkpoint whose tensors have `sizes` on disk."""
    sums = {"embedding": 0, "output": 0, "layers": 0, "experts": 0, "norms": 0}
    for name, shape in shapes(config).items():
        sums[_part(name, shape)] += sizes[name]
    return WeightBytes(**sums)


def part_bytes(kept: Mapping[str, tuple[str, int]], part: Part) -> WeightBytes:
    """Bytes by part of what one process holds of a checkpoint whose tensors are `kept` as (type, bytes).

    Raises ConfigError for a cut through quantized blocks, as reading them would.
    """
    sums = {"embedding": 0, "output": 0, "layers": 0, "experts": 0, "norms": 0}
    for name, shape in shapes(part.whole).items():
        stored, size = kept[name]
        cut = part.cut(name, shape)
        if cut is not None:
            dim, _, count = cut
            kind = block_type(stored)
            if kind is not None and kind.number is None and dim == len(shape) - 1 and count % kind.values:
                raise ConfigError(
                    f"{name} has rows of {shape[-1]:,} numbers in {kind.name} blocks of {kind.values}: {part.ranks} processes "
                    f"would get {count:,} each, which are not whole blocks. Use --weights int8 or bf16, or another number"
                )
            size = size * count // shape[dim]
        sums[_part(name, shape)] += size
    return WeightBytes(**sums)


def _part(name: str, shape: tuple[int, ...]) -> str:
    if name in OUTER:
        return "embedding" if name == OUTER[0] else "output"
    if len(shape) == 1:
        return "norms"
    return "experts" if _EXPERTS in name else "layers"
