"""What an engine does and has done, in numbers. No torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(slots=True)
class Stats:
    """What an engine does and has done. Blocks are those of the KV cache; tokens and counts are since it began. Virtual tokens of
    adapters lie in pinned blocks, and are no tokens."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_pinned: int = 0
    steps: int = 0
    requests: int = 0
    errors: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    busy_seconds: float = 0.0
    tokens_per_second: float = 0.0
    """Generated tokens per second of the last steps."""

    @property
    def prefix_hits(self) -> float:
        """The part of all prompt tokens that was found in the cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
