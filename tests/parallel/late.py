"""Models whose numbers come after they were spread: what each rank holds, and how much memory that took. Run by the crew."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.model.config import ModelConfig, plain
from herd.model.llama import Llama
from herd.parallel.config import ParallelPart
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import Spread, prepare
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from herd.train.config import MethodPart
from herd.train.start import adapt, random_model

SEED = 5
TINY = ModelConfig(
    dim=64, n_heads=4, n_kv_heads=4, head_dim=16, hidden_dim=64, vocab_size=64, layers=plain(4), tie_embeddings=True
)


@dataclass(frozen=True, slots=True)
class Base:
    """A model to begin with: of random weights of a geometry, or from files."""

    config: Any = None
    path: Path | None = None
    weights: str = "plain"

    def model(self, *, later: bool = True) -> Llama:
        device = torch.device("cpu")
        if self.path is None:
            return random_model(self.config, SEED, torch.float32, device)
        return fill(open_store(self.path), torch.float32, device, weights=self.weights, later=later)


def spread_later(base: Base, part: ParallelPart, method: MethodPart) -> Spread:
    return prepare(adapt(base.model(), method, SEED), Mesh.of(part))


def held(base: Base, part: ParallelPart, method: MethodPart) -> dict[str, Any]:
    """Every number of this rank by name, put together with those of the others: as numpy, for the way back."""
    return {name: values.numpy() for name, values in numbers(spread_later(base, part, method).model).items()}


def numbers(model: Llama) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found[name] = (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            for at, matrix in enumerate(module.matrices()):
                found[f"{name}.matrix.{at}"] = matrix.dequantize()
    return found


def status(field: str) -> int:
    """Bytes, from what Linux says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def peak(base: Base, part: ParallelPart, method: MethodPart) -> tuple[int, int]:
    """(most resident bytes while the model was made and spread, bytes this rank then holds), both above what was there before."""
    spread_later(Base(TINY), part, MethodPart(kind="full"))  # what torch itself takes the first time
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    spread = spread_later(base, part, method)
    most = status("VmHWM") - before
    return most, sum(weight.numel() * weight.element_size() for weight in _local(spread.model))


def _local(model: Llama) -> list[Tensor]:
    seen = {id(w): w for w in model.parameters()}
    found = [w.to_local() if isinstance(w, DTensor) else w for w in seen.values()]
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding | QuantExperts):
            for matrix in module.matrices():
                stored: Any = getattr(matrix, "stored", None)
                panels = None if matrix.panels is None else matrix.panels.storage
                found += [stored.codes, stored.absmax] if stored is not None else []
                found += [tensor for tensor in (matrix.blocks, panels) if tensor is not None]
    return found
