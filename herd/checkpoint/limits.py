"""How large a Llama may claim to be: a file that claims more is damaged or hostile, refused before anything is allocated."""

from __future__ import annotations

from herd.errors import ConfigError
from herd.model.config import ModelConfig

__all__ = ["plausible"]

# Each about a thousand times the largest released model (405B, Behemoth), so that nothing real comes near.
_LIMITS = {
    "dim": 1 << 24,
    "n_heads": 1 << 16,
    "head_dim": 1 << 16,
    "hidden_dim": 1 << 26,
    "vocab_size": 1 << 28,
    "max_seq_len": 1 << 40,
}
_EXPERTS = {"n_experts": 1 << 16, "hidden_dim": 1 << 26}


def plausible(config: ModelConfig, where: str) -> ModelConfig:
    """`config` itself. Raises ConfigError naming the first size beyond any Llama; `where` is the file it came from."""
    for part, limits in ((config, _LIMITS), (config.moe, _EXPERTS)):
        for name, limit in limits.items() if part is not None else ():
            if getattr(part, name) > limit:
                raise ConfigError(f"{where}: {name} is {getattr(part, name)}: no Llama is larger than {limit}")
    return config
