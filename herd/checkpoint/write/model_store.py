"""A live model in memory as a checkpoint: what training exports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from herd.checkpoint.names import shapes
from herd.checkpoint.store import TensorInfo
from herd.errors import CheckpointError
from herd.model.llama import Llama
from herd.quant.numbers import NUMBER_BYTES

__all__ = ["ModelStore"]

_WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


class ModelStore:
    """A TensorStore over the parameters of `model`, on any device; they are read when asked for, as they are then."""

    kind = "model"

    def __init__(self, model: Llama, path: str = "the model in memory") -> None:
        self.path = path
        self.config = model.config
        found = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._weights = {name: found[name] for name in shapes(model.config) if name in found}

    def names(self) -> Iterable[str]:
        """Canonical names, the tied output excluded."""
        return self._weights

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and bytes."""
        weight = self._weight(name)
        number = str(weight.dtype).removeprefix("torch.")
        nbytes = weight.numel() * NUMBER_BYTES[number]
        return TensorInfo(tuple(weight.shape), number, _WORDS.get(number, number.upper()), nbytes)

    def read(self, name: str) -> torch.Tensor:
        """The parameter itself, or a copy when it is on another device than the CPU."""
        return self._weight(name).cpu()

    def metadata(self) -> Mapping[str, Any]:
        """Nothing: there is no file."""
        return {}

    def _weight(self, name: str) -> torch.Tensor:
        try:
            return self._weights[name]
        except KeyError:
            raise CheckpointError("there is no such parameter in this model", path=self.path, tensor=name) from None
