"""How much memory keys and values get, chosen from what is free, and what that makes of the limits of an engine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from herd.engine.config import BLOCK_SIZE, kv_dtype
from herd.errors import ConfigError
from herd.model.accounting import kv_bytes_per_token
from herd.model.config import ModelConfig
from herd.planning.devices import GIB, free_memory
from herd.planning.memory import workspace_bytes

__all__ = ["Budget", "budget_for", "free_on", "memory_of"]

SHARE = {"cpu": 0.5, "gpu": 0.9}
"""The part of the free memory that keys and values may take where nobody says: others live on a processor's memory, too."""
USUAL = 4096
"""Tokens that a request is expected to have at most, when many run at once: what `blocks` is made for beside one long one."""
WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE = 4
"""Bytes beside the int8 values of one head at one position."""
_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB}


@dataclass(frozen=True, slots=True)
class Budget:
    """`blocks` of `block_size` tokens for keys and values in dtype `kv`, `nbytes` together; a request has at most `max_len`.

    `free` bytes were free before (None: unknown), `wished` is the context that was asked for, `seqs` run at once.
    """

    blocks: int
    block_size: int
    kv: str
    nbytes: int
    max_len: int
    wished: int
    seqs: int
    free: int | None
    ranks: int = 1
    """Processes that each have so much, for their own heads."""

    @property
    def tokens(self) -> int:
        """Tokens that fit in at the same time."""
        return self.blocks * self.block_size

    def sentence(self) -> str:
        """The choice in plain words."""
        of = "" if self.free is None else f" of {_size(self.free)} free"
        cut = (
            ""
            if self.max_len == self.wished
            else f" (the model was made for {self.wished:,}: memory does not hold more)"
        )
        each = "" if self.ranks == 1 else f" on each of {self.ranks} ranks"
        return (
            f"KV cache{each}: {_size(self.nbytes)}{of}, {self.tokens:,} tokens in {self.kv} ({self.blocks:,} blocks of "
            f"{self.block_size}); up to {self.seqs} requests at once, each of up to {self.max_len:,} tokens{cut}"
        )


def budget_for(
    config: ModelConfig,
    *,
    kv: str,
    free: int | None,
    kind: str = "cpu",
    max_len: int | None = None,
    max_seqs: int = 16,
    max_tokens: int = 512,
    memory: int | str | None = None,
    block_size: int = BLOCK_SIZE,
) -> Budget:
    """What keys and values get of `free` bytes (weights are loaded already), or exactly `memory` (bytes, or "4 GiB").

    Room is made for one request of full length and for `max_seqs` usual ones, never more than all of them could use. A
    `max_len` that was asked for and does not fit is refused with the counts; the model's own is lowered. Raises ConfigError.
    """
    longest = config.max_seq_len
    if max_len is not None and max_len > longest:
        raise ConfigError(f"a context of {max_len} tokens was asked for, but this model was made for {longest}")
    if max_len is not None and max_len < 2:
        raise ConfigError(f"a context of {max_len} tokens holds no prompt and reply: give at least 2")
    if max_seqs < 1 or max_tokens < 1:
        raise ConfigError(f"max_seqs is {max_seqs} and a step has {max_tokens} tokens: give at least 1 of each")
    kv = kv_dtype(kv)
    width = WIDTH[kv] + (SCALE / config.head_dim if kv == "int8" else 0)
    block = round(kv_bytes_per_token(config, width) * block_size)
    wished = longest if max_len is None else max_len
    most = max_seqs * _blocks(wished, block_size)
    if memory is not None:
        given = memory_of(memory)
        blocks, where = min(given // block, most), f"the {_size(given)} given"
    else:
        usual = max_seqs * _blocks(min(wished, USUAL), block_size)
        blocks = min(most, max(_blocks(wished, block_size), usual))
        where = f"the free memory ({'unknown' if free is None else _size(free)})"
        if free is not None:
            room = int((free - workspace_bytes(config, max_tokens, max_seqs)) * SHARE[kind])
            blocks = min(blocks, max(0, room) // block)
    fits = blocks * block_size
    if fits < (wished if max_len is not None else min(wished, 2 * block_size)):
        need = _blocks(wished, block_size) * block
        raise ConfigError(
            f"keys and values of {wished:,} tokens take {_size(need)} in {kv}, and {where} holds {fits:,} tokens: "
            "give a smaller max_len, more memory, or kv='int8'"
        )
    return Budget(blocks, block_size, kv, blocks * block, min(wished, fits), wished, max_seqs, free)


def free_on(device: object) -> int | None:
    """Bytes that are free on a torch device; None where it cannot say."""
    import torch

    assert isinstance(device, torch.device)
    if device.type == "cuda":
        # What torch holds without using it is free for torch.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return free_memory() if device.type == "cpu" else None


def memory_of(given: int | str) -> int:
    """Bytes of a number, or of a text such as "500 MB" or "4 GiB". Raises ConfigError."""
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", given, re.IGNORECASE)
        if match is not None and match[2].lower() in _UNITS:
            return int(float(match[1]) * _UNITS[match[2].lower()])
    elif isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    raise ConfigError(f"memory is {given!r}: give bytes, or a text such as '500 MB' or '4 GiB'")


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.1f} MiB"
