"""What an engine is given to work with: numbers only, no torch. `herd.engine.budget` chooses them from free memory."""

from __future__ import annotations

from dataclasses import dataclass

from herd.errors import ConfigError

__all__ = ["BLOCK_SIZE", "KV_DTYPES", "SMALL", "EngineConfig", "kv_dtype"]

BLOCK_SIZE = 16
"""Positions per block of the KV cache."""

SMALL = 50_000_000
"""Parameters of a model that a CPU runs best in float32 on one thread, where neither is asked for.

Its matrices are so small that threads wait for each other longer than they work, and casting costs more than reading. Nano on
one quiet core: 460 tokens/s in float32, 310 in bfloat16, 205 in float16; 380 in float32 with two threads on that core. On two
cores with a training run beside it: 250 with one thread, 2 with two.
"""

KV_DTYPES = {
    "f32": "float32",
    "float32": "float32",
    "fp32": "float32",
    "f16": "float16",
    "float16": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "int8": "int8",
}
"""How keys and values are kept, by the names people use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits of one engine. Raises ConfigError naming the field.

    `blocks` of `block_size` positions make up the KV cache, in dtype `kv`. `max_len` is the most tokens of one request, prompt
    and reply together; `max_seqs` the most replies that grow at once; `max_tokens` the most tokens that one step computes.
    `prefix_cache` keeps the blocks of finished requests for prompts that begin the same way. `deterministic` computes every
    request on its own, so that its numbers do not depend on what runs beside it, whatever the kernels do. `seed` is where
    requests without a seed of their own get theirs; None draws fresh ones. `debug` checks every invariant after every step.
    On a GPU, `graphs` records decode steps and replays them, and with `overlap` the next one is begun before the tokens of the
    last are read.
    """

    blocks: int
    max_len: int
    block_size: int = BLOCK_SIZE
    kv: str = "float32"
    max_seqs: int = 16
    max_tokens: int = 512
    prefix_cache: bool = True
    deterministic: bool = False
    seed: int | None = 0
    debug: bool = False
    graphs: bool = True
    overlap: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv", kv_dtype(self.kv))
        for name, least in (("blocks", 1), ("block_size", 1), ("max_len", 2), ("max_seqs", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}: expected an integer of at least {least}")
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            raise ConfigError(f"seed is {self.seed!r}: expected an integer of at least 0, or None")
        if self.blocks * self.block_size < self.max_len:
            raise ConfigError(
                f"{self.blocks} blocks of {self.block_size} hold {self.blocks * self.block_size} tokens, and one request may "
                f"have {self.max_len}: give more memory or a smaller max_len"
            )


def kv_dtype(name: str) -> str:
    """The dtype of keys and values called `name`. Raises ConfigError listing the known ones."""
    found = KV_DTYPES.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(f"keys and values cannot be kept as {str(name)[:40]!r}: choose auto, f32, f16, bf16 or int8")
    return found
