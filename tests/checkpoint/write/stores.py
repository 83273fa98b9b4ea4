"""A TensorStore over tensors in memory, for tests: any dtype, any config, every call recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from herd.checkpoint.store import TensorInfo
from herd.model.config import ModelConfig
from herd.model.llama import Llama

__all__ = ["MemoryStore"]

WORDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class MemoryStore:
    """Canonical `tensors` of a model with `config`; `read_names` lists what was read, in order."""

    kind = "test"
    path = "in memory"

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self.tensors = dict(tensors)
        self.read_names: list[str] = []
        self.released: list[str] = []

    @classmethod
    def of(cls, model: Llama, dtype: torch.dtype = torch.float32) -> MemoryStore:
        """The weights of `model`, the tied output left out."""
        return cls(model.config, {name: p.detach().to(dtype) for name, p in model.named_parameters()})

    def names(self) -> Iterable[str]:
        return self.tensors

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        number = str(tensor.dtype).removeprefix("torch.")
        return TensorInfo(tuple(tensor.shape), number, WORDS[tensor.dtype], tensor.numel() * tensor.itemsize)

    def read(self, name: str) -> torch.Tensor:
        self.read_names.append(name)
        return self.tensors[name]

    def release(self, name: str) -> None:
        self.released.append(name)

    def metadata(self) -> Mapping[str, Any]:
        return {}
