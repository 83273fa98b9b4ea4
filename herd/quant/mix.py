"""Which type each tensor gets in a quantized file: llama.cpp's per-tensor mixes.

A file type such as Q4_K_M is not one type: tensors that suffer most from rounding get more bits. The rules are those of
`llama_tensor_get_type` (llama.cpp src/llama-quant.cpp) without importance matrix and without overrides, so a file of herd has
the type that llama.cpp's own quantizer gives each tensor. Names are canonical (Meta's), as in `herd.checkpoint.names`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from herd.errors import ConfigError
from herd.model.config import ModelConfig
from herd.quant.scheme import block_type

__all__ = ["MIXES", "Choice", "Mix", "Nf4Layers", "RowsOfFp8", "mix"]

_EIGHT = 8
"""Experts of Mixtral: some rules of llama.cpp hold for exactly this number."""

_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are not whole blocks of 256."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The type `kind` (a name of BLOCK_TYPES) of one tensor. `note`: why it is not what the mix prescribes, for people."""

    kind: str
    note: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """One file type: its `name`, its id in `general.file_type`, and the type `base` of most tensors.

    `activations` 8 asks products to round their inputs to 8 bits, too; files do not say so.
    """

    name: str
    file_type: int
    base: str
    activations: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether most tensors become blocks."""
        return self.base not in ("F32", "F16", "BF16")

    def kind(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Choice:
        """The type of the canonical tensor `name` of `shape` in a model `config`."""
        if len(shape) < 2 or name.endswith(("norm.weight", "router.weight")):
            return Choice("F32")
        if not self.quantized:
            return Choice(self.base)
        return _fitting(self._wanted(name, shape[-1], config), shape[-1])

    def _wanted(self, name: str, columns: int, config: ModelConfig) -> str:
        if name == "output.weight" or (name == "tok_embeddings.weight" and config.tie_embeddings):
            return "Q8_0" if self.base == "Q8_0" or columns % _values(self.base) else "Q6_K"
        layer = int(match[1]) if (match := re.match(r"layers\.(\d+)\.", name)) else 0
        last = name.removesuffix(".weight").rpartition(".")[2]
        experts = 0 if config.moe is None else config.moe.n_experts
        if last == "wv":
            return self._value(layer, config, experts)
        if last == "wk" and experts == _EIGHT:
            return "Q8_0"
        if last == "wo" and experts == _EIGHT and self.base == "Q4_K":
            return "Q5_K"
        if last == "w2":
            return self._down(layer, config.n_layers)
        return self.base

    def _value(self, layer: int, config: ModelConfig, experts: int) -> str:
        if experts == _EIGHT:
            return "Q8_0"
        if self.name in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, config.n_layers):
            return "Q6_K"
        if self.name == "Q4_K_S" and layer < 4:
            return "Q5_K"
        return "Q5_K" if self.base == "Q4_K" and _is_70b(config) else self.base

    def _down(self, layer: int, n_layers: int) -> str:
        if self.name in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, n_layers):
            return "Q6_K"
        if self.name == "Q4_K_S" and layer < n_layers // 8:
            return "Q5_K"
        return self.base


class RowsOfFp8(Mix):
    """No file type, but a form in memory: FP8 for the matrices of layers; embedding and output stay as they are."""

    __slots__ = ()

    def kind(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Choice:
        if len(shape) < 2 or name.endswith(("norm.weight", "router.weight")):
            return Choice("F32")
        return Choice("FP8" if name.startswith("layers.") else "BF16")


class Nf4Layers(Mix):
    """No file type, but a form in memory: NF4 for the matrices of layers, Q8_0 for embedding and output."""

    __slots__ = ()

    def kind(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> Choice:
        if len(shape) < 2 or name.endswith(("norm.weight", "router.weight")):
            return Choice("F32")
        if name.startswith("layers."):
            return Choice("NF4")
        if shape[-1] % _values("Q8_0"):
            return Choice("BF16", f"rows of {shape[-1]} values are not whole Q8_0 blocks; left as they are")
        return Choice("Q8_0")


MIXES: dict[str, Mix] = {
    m.name: m
    for m in (
        Mix(name="F32", file_type=0, base="F32"),
        Mix(name="F16", file_type=1, base="F16"),
        Mix(name="BF16", file_type=32, base="BF16"),
        Mix(name="Q4_0", file_type=2, base="Q4_0"),
        Mix(name="Q8_0", file_type=7, base="Q8_0"),
        Mix(name="Q4_K_S", file_type=14, base="Q4_K"),
        Mix(name="Q4_K_M", file_type=15, base="Q4_K"),
        Mix(name="Q5_K_S", file_type=16, base="Q5_K"),
        Mix(name="Q5_K_M", file_type=17, base="Q5_K"),
        Mix(name="Q6_K", file_type=18, base="Q6_K"),
    )
}
"""The file types that herd writes, by llama.cpp's name."""

_ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def mix(name: str) -> Mix:
    """The mix called `name`, in any case; Q4_K and Q5_K mean their M, as for llama.cpp. Raises ConfigError with the choices."""
    key = name.upper()
    found = MIXES.get(_ALIASES.get(key, key))
    if found is None:
        raise ConfigError(f"no quantization is called {name!r}; choose one of {', '.join(m.lower() for m in MIXES)}")
    return found


def _fitting(wanted: str, columns: int) -> Choice:
    """`wanted`, or what stands in for it when rows of `columns` values are not whole blocks."""
    if not columns % _values(wanted):
        return Choice(wanted)
    why = f"rows of {columns} values are not whole {wanted} blocks of {_values(wanted)}"
    smaller = _FALLBACK.get(wanted)
    if smaller is None:
        return Choice("F16", f"{why}; stored as F16 (llama.cpp refuses such a tensor)")
    if not columns % _values(smaller):
        return Choice(smaller, f"{why}; stored as {smaller}, as llama.cpp does")
    return Choice("F16", f"{why}; stored as F16, as llama.cpp does")


def _values(kind: str) -> int:
    found = block_type(kind)
    assert found is not None, kind
    return found.values


def _more_bits(layer: int, n_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _is_70b(config: ModelConfig) -> bool:
    """What llama.cpp takes for a 70B: architecture `llama` with 80 layers and shared key and value heads."""
    plain = config.moe is None and all(spec.placement == "rope" and spec.chunk is None for spec in config.layers)
    return plain and config.n_layers == 80 and config.n_heads != config.n_kv_heads
