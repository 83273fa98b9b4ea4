"""A base model with a LoRA or DoRA adapter added in: a checkpoint like any other, for writers and for comparisons.

Sums are float32. `exact` gives them so; without it every tensor has the type that the base has for it, rounded once: casts for
plain numbers, and for GGUF's blocks what encoding makes of the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from herd.adapters.lora import EMBEDDING, LoraAdapter
from herd.checkpoint.names import shapes
from herd.checkpoint.store import (
    GenerationDefaults,
    HoldsPacked,
    KeepsBlocks,
    Releases,
    TensorInfo,
    TensorStore,
    packed_of,
)
from herd.errors import CheckpointError
from herd.quant.encode import ENCODED, encode
from herd.quant.scheme import QuantTensor, block_type

if TYPE_CHECKING:
    from herd.checkpoint.quantized.module import Packed, Stored

__all__ = ["MergedStore"]

_OUTPUT = "output.weight"
_PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class MergedStore:
    """A TensorStore: `base` with `adapter` merged in. An adapted embedding that was tied gives the output a matrix of its own.

    Raises CheckpointError when the adapter does not fit, has numbers that are not finite, or changes a matrix whose type herd
    cannot encode (without `exact`).
    """

    def __init__(self, base: TensorStore, adapter: LoraAdapter, *, exact: bool) -> None:
        adapter.check(shapes(base.config))
        self.base, self.adapter, self.exact = base, adapter, exact
        self.kind, self.path = base.kind, base.path
        self.untied = base.config.tie_embeddings and EMBEDDING in adapter.factors
        self.config = replace(base.config, tie_embeddings=False) if self.untied else base.config
        self.skipped: tuple[str, ...] = getattr(base, "skipped", ())
        self.generation: GenerationDefaults = getattr(base, "generation", GenerationDefaults())
        self.changed = tuple(name for name in base.names() if name in adapter.factors or name in adapter.whole)
        for name, pair in adapter.factors.items():
            parts = (pair.a, pair.b) if pair.magnitude is None else (pair.a, pair.b, pair.magnitude)
            if not all(bool(part.isfinite().all()) for part in parts):
                raise CheckpointError("the adapter holds numbers that are not finite", tensor=name)
        if not exact:
            for name in self.changed:
                stored = base.info(name).stored
                if _quantized(stored) and stored not in ENCODED:
                    raise CheckpointError(
                        f"is stored as {stored}, which herd reads and cannot write: merge into the original, or choose "
                        "another type for all (--quant, --dtype)",
                        path=base.path,
                        tensor=name,
                    )

    @property
    def origin(self) -> TensorStore:
        """The checkpoint whose own files (tokenizer, config, keys) go with the result."""
        return self.base

    @property
    def dequantized(self) -> str:
        """As `HoldsPacked.dequantized`."""
        return self.base.dequantized if isinstance(self.base, HoldsPacked) else "bfloat16"

    def names(self) -> Iterable[str]:
        return (*self.base.names(), *((_OUTPUT,) if self.untied else ()))

    def info(self, name: str) -> TensorInfo:
        own = self.base.info(self._held(name))
        if name not in self.changed or (not self.exact and packed_of(self.base, name) is None):
            return own
        number = "float32" if self.exact else self.dequantized
        size = torch.Size(own.shape).numel() * (4 if self.exact else 2)
        return TensorInfo(own.shape, number, _PLAIN[number], size)

    def read(self, name: str) -> Tensor:
        if name not in self.changed:
            return self.base.read(self._held(name))
        if not self.exact and _quantized(self.base.info(name).stored):
            raw = self.raw(name)
            assert isinstance(raw, QuantTensor)
            return raw.dequantize()
        total = self.total(name)
        info = self.info(name)
        rounded = total if self.exact else total.to(info.dtype)
        if not bool(rounded.isfinite().all()):
            why = f"the merged matrix has values that {info.stored} cannot hold: choose --dtype bf16 or f32"
            raise CheckpointError(why, path=self.path, tensor=name)
        return rounded

    def total(self, name: str) -> Tensor:
        """The sum for the changed tensor `name`, float32."""
        return self.adapter.merged(name, self.base.read(name))

    def raw(self, name: str) -> Tensor | QuantTensor:
        """As `read`, quantized blocks as they are."""
        held = self._held(name)
        if name not in self.changed:
            return self.base.raw(held) if isinstance(self.base, KeepsBlocks) else self.base.read(held)
        stored = self.base.info(name).stored
        if self.exact or not _quantized(stored):
            return self.read(name)
        made = encode(self.total(name), stored, name=name)
        assert isinstance(made, QuantTensor)
        return made

    def packed(self, name: str) -> Packed | None:
        """What another tool quantized, where it is unchanged."""
        return None if name in self.changed else packed_of(self.base, self._held(name))

    def held(self, name: str, kind: str) -> Stored:
        """As `HoldsPacked.held`."""
        assert isinstance(self.base, HoldsPacked)
        return self.base.held(self._held(name), kind)

    def release(self, name: str) -> None:
        if isinstance(self.base, Releases):
            self.base.release(self._held(name))

    def metadata(self) -> Mapping[str, Any]:
        return self.base.metadata()

    def _held(self, name: str) -> str:
        return EMBEDDING if name == _OUTPUT and self.untied else name


def _quantized(stored: str) -> bool:
    kind = block_type(stored)
    return kind is not None and kind.dtype is None
