"""A live model as a checkpoint, its numbers in memory or promised (`herd.model.late`): what training exports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from herd.checkpoint.names import shapes
from herd.checkpoint.store import TensorInfo
from herd.errors import CheckpointError
from herd.model.late import promises
from herd.model.llama import Llama
from herd.quant.numbers import NUMBER_BYTES

__all__ = ["ModelStore"]

_WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


class ModelStore:
    """A TensorStore over the parameters of `model`, on any device; they are read when asked for, as they are then. Promised ones
    are made each time, and nothing keeps them."""

    kind = "model"

    def __init__(self, model: Llama, path: str = "the model in memory") -> None:
        self.path = path
        self.config, self._model = model.config, model
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
        """The parameter itself, or a copy when it is on another device than the CPU, or promised."""
        weight = self._weight(name)
        if weight.is_meta:
            home, _, key = name.rpartition(".")
            weight = promises(self._model.get_submodule(home))[key]()
        return weight.cpu()

    def metadata(self) -> Mapping[str, Any]:
        """Nothing: there is no file."""
        return {}

    def _weight(self, name: str) -> torch.Tensor:
        try:
            return self._weights[name]
        except KeyError:
            raise CheckpointError("there is no such parameter in this model", path=self.path, tensor=name) from None
