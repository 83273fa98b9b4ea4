"""How many threads small models are worked on with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from herd.model.accounting import parameters
from herd.model.config import ModelConfig

__all__ = ["SMALL", "threads_for"]

SMALL = 50_000_000
"""Parameters up to which threads wait for each other longer than they work, on a busy machine by far."""


@contextmanager
def threads_for(config: ModelConfig) -> Iterator[None]:
    """Inside, torch works with one thread when the model is small, unless OMP_NUM_THREADS says otherwise."""
    before = torch.get_num_threads()
    if parameters(config) <= SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
