"""Activation checkpointing: what a block keeps for the backward pass, and what it makes again.

| policy    | kept of a block                          | made again                          |
|-----------|------------------------------------------|-------------------------------------|
| none      | everything                               | nothing                             |
| attention | all but the inside of attention          | q, k, v, scores: a third of a block |
| n         | everything, but of every n-th block only its input | the other blocks keep theirs |
| full      | its input                                | the whole block                     |

Numbers are the same in every policy, dropout included: random states are put back for the second pass. Nothing is renamed:
parameters and state_dict are those of the plain model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from herd.model.llama import Llama

__all__ = ["apply_checkpointing", "remove_checkpointing"]


def apply_checkpointing(model: Llama, policy: str | int) -> None:
    """Make `model` checkpoint by `policy`: "none", "full", "attention" or n for every n-th block, in place."""
    remove_checkpointing(model)
    for at, block in enumerate(model.layers):
        if policy == "full" or (isinstance(policy, int) and (at + 1) % policy == 0):
            _checkpointed(block)
        elif policy == "attention":
            _checkpointed(block.attention)  # type: ignore[arg-type]


def remove_checkpointing(model: nn.Module) -> None:
    """Undo it."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Again):
            del module.__dict__["forward"]


class _Again(partial[Any]):
    """Stands in for `forward`. While nothing is recorded for gradients, checkpoint is a plain call."""


def _checkpointed(module: nn.Module) -> None:
    module.__dict__["forward"] = _Again(_run, module)


def _run(module: nn.Module, *args: Any) -> Any:
    return checkpoint(type(module).forward, module, *args, use_reentrant=False)
