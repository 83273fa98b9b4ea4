"""Transformations of a model that is about to train, in the one order that works, and their way back.

compute dtype -> checkpointing -> float8 -> compile per block. Tensor parallelism comes before, FSDP after
(`herd.parallel.prepare`). All are in place, and names of parameters stay what they are.
"""

from __future__ import annotations

import torch

from herd.errors import ConfigError
from herd.model.llama import Llama
from herd.train.checkpointing import apply_checkpointing, remove_checkpointing
from herd.train.config import TrainConfig
from herd.train.float8 import apply_float8, remove_float8
from herd.train.precision import compute_in, compute_plainly

__all__ = ["prepare_model", "unprepared"]


def prepare_model(model: Llama, config: TrainConfig) -> Llama:
    """Make `model` train as `config` says; returns it. Adapters must be in already.

    Raises ConfigError for float8 where the device cannot multiply it, and for losses of routers that the model does not have.
    """
    if (config.router_aux or config.router_z) and model.config.moe is None:
        raise ConfigError("train.router_aux, train.router_z: this model has no experts, so there is nothing to balance")
    unprepared(model)
    compute_in(model, torch.float32 if config.precision == "float32" else torch.bfloat16)
    apply_checkpointing(model, config.checkpointing)
    if config.precision == "float8":
        apply_float8(model)
    if config.compile:
        for block in model.layers:
            # One graph serves all blocks of one kind: weights are its inputs. Rows have one length for a whole run.
            block.compile(dynamic=False)
    return model


def unprepared(model: Llama) -> Llama:
    """The plain model again, in place: for export, for evaluation in the weights' own dtype, for another preparation."""
    for block in model.layers:
        block._compiled_call_impl = None
    remove_float8(model)
    remove_checkpointing(model)
    compute_plainly(model)
    return model
