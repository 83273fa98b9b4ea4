"""Results of runs over ranks: how much memory the main rank takes for one, and what becomes of one that cannot be written. Run by
the crew."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
from pathlib import Path
from typing import Any

import torch

from herd.adapters.apply import trained
from herd.checkpoint.write.safetensors import write_safetensors
from herd.errors import CheckpointError, RanksError
from herd.parallel.checkpoint import local
from herd.train.recipes import pretrain
from tests.parallel.late import status
from tests.parallel.test_recipes import train


def peak(config: Path, overrides: list[str]) -> dict[str, int]:
    """A run; of its result "most", resident bytes above those of the run itself ("share": of weights). The main rank's."""
    seen: dict[str, int] = {}
    honest = pretrain.result

    def watched(trainer: Any, *rest: Any) -> None:
        share = sum(local(weight).numel() * weight.element_size() for weight in trained(trainer.model).values())
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # runs keep what they free: it would be used unseen
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        honest(trainer, *rest)
        seen.update(most=status("VmHWM") - before, share=share)

    pretrain.result = watched
    try:
        train(config, overrides)
    finally:
        pretrain.result = honest
    return seen


def full_disk(config: Path, overrides: list[str]) -> str:
    """A run whose disk is full in the middle of the result; what it ended with on this rank."""
    written: list[Any] = []

    def fails(path: Any, planned: Any, *rest: Any) -> None:
        write_safetensors(path, planned[:3], *rest)
        written.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    import herd.checkpoint.write.hf as hf

    hf.write_safetensors = fails
    try:
        train(config, overrides)
    except CheckpointError as error:
        assert written
        return str(error)
    except RanksError as error:
        assert not torch.distributed.is_initialized()
        return str(error)
    finally:
        hf.write_safetensors = write_safetensors
    return "nothing was wrong"
