"""Which release of the catalog a checkpoint is, or is nearest to, by its numbers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from herd.errors import UnknownModelError
from herd.model.config import ModelConfig
from herd.model.presets import RELEASES, wanted
from herd.model.release import Release

__all__ = ["Kin", "generation_of", "kin_of"]

_SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "moe")
_REST = ("layers", "norm_eps", "rope_theta", "rope_scaling", "max_seq_len", "tie_embeddings", "temper")
_FAR = 3
"""So many differences in shape, and a model is of no released size."""


@dataclass(frozen=True, slots=True)
class Kin:
    """Releases with the same numbers (`differs` is empty), or the nearest ones with what differs: (field, here, there)."""

    releases: tuple[Release, ...]
    differs: tuple[tuple[str, Any, Any], ...]

    @property
    def exact(self) -> bool:
        """Whether all numbers are those of a release."""
        return not self.differs


def kin_of(config: ModelConfig, hints: Sequence[str] = (), chat_format: str | None = None) -> Kin | None:
    """The releases of these numbers, those that `hints` (names of folders and of the model) or the prompt format speak for
    first; None for a size that was never released."""
    found: dict[str, tuple[tuple[str, Any, Any], ...]] = {}
    for release in RELEASES:
        if release.config is not None and release.runnable:
            found[release.id] = _differences(config, release.config)
    least = min(map(_weight, found.values()))
    near = [release for release in RELEASES if release.id in found and _weight(found[release.id]) == least]
    if sum(name in _SHAPE for name, _, _ in found[near[0].id]) >= _FAR:
        return None
    said = {release.id for hint in hints for release in _named(hint)}
    near.sort(key=lambda release: (release.id not in said, release.chat_format != chat_format))
    if near[0].id in said:
        near = [release for release in near if release.id in said]
    differs = found[near[0].id]
    return Kin(tuple(release for release in near if found[release.id] == differs), differs)


def generation_of(config: ModelConfig) -> str:
    """What a model of no released size looks like, in words."""
    if config.temper is not None or config.moe is not None:
        return "Llama 4 architecture"
    if config.rope_scaling is not None:
        return "Llama 3.1 to 3.3 architecture (stretched frequencies)"
    if config.rope_theta >= 500_000 and config.rope_theta != 1_000_000:
        return "Llama 3 architecture"
    return "Llama 1, 2 or Code Llama architecture"


def _differences(one: ModelConfig, other: ModelConfig) -> tuple[tuple[str, Any, Any], ...]:
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in _SHAPE + _REST)
    found = [pair for pair in pairs if pair[1] != pair[2]]
    if len(one.layers) != len(other.layers):
        found = [pair for pair in found if pair[0] != "layers"]  # n_layers says it
    return tuple(found)


def _weight(differs: Sequence[tuple[str, Any, Any]]) -> int:
    return sum(100 if name in _SHAPE else 1 for name, _, _ in differs)


def _named(hint: str) -> list[Release]:
    try:
        return [wanted(hint).release]
    except UnknownModelError:
        return []
