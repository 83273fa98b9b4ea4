"""Twenty steps of AdamW, the same for PEFT's adapters and herd's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from herd.model.config import ModelConfig
from tests.build import tokens


def losses(forward: Callable[[Tensor], Tensor], params: Iterable[nn.Parameter], config: ModelConfig) -> list[float]:
    """The loss of each step over twenty batches; `params` that require no gradients stay."""
    trained = [p for p in params if p.requires_grad]
    optimiser, found = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.01), []
    for batch in (tokens(config, 33, batch=2, seed=s) for s in range(20)):
        loss = cross_entropy(forward(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found
