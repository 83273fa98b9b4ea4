"""Which models of the catalog fit into the memory that is free here, in which forms, and how fast they would answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from herd.model.presets import RELEASES
from herd.model.release import Release
from herd.planning.devices import GIB
from herd.planning.plan import plan

__all__ = ["FORMS", "Capacity", "Form", "Rates", "capacities"]

FORMS = ("bf16", "q8_0", "q4_k_m")
"""As released, in 8 bits, in 4: best numbers first."""

CONTEXT = 8192
"""Tokens of context that a model must have room for, or its own maximum when that is less."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured limits: bytes read per second, and operations per second of products in bfloat16 and in int8."""

    bandwidth: float
    bfloat16: float
    int8: float


@dataclass(frozen=True, slots=True)
class Form:
    """A model in one form: the memory it takes with its context, and by arithmetic its tokens per second where it fits."""

    name: str
    nbytes: int
    fits: bool
    decode: float | None
    prefill: float | None


@dataclass(frozen=True, slots=True)
class Capacity:
    """A model of the catalog, newest of its geometry; `same` are the others with equal sizes."""

    model: str
    parameters: int
    context: int
    forms: tuple[Form, ...]
    same: tuple[str, ...]


def capacities(free: int, rates: Rates | None) -> list[Capacity]:
    """One row for every geometry of the catalog, small first, on this processor with `free` bytes.

    Without `rates`, those that `herd plan` assumes.
    """
    return [_capacity(release, same, free, rates) for release, same in _geometries()]


def _geometries() -> Iterator[tuple[Release, tuple[str, ...]]]:
    groups: dict[tuple[int, int], list[Release]] = {}
    for release in RELEASES:
        if release.why_not is None and release.total_params is not None and release.max_context is not None:
            groups.setdefault((release.total_params, release.max_context), []).append(release)
    for _, group in sorted(groups.items()):
        newest = group[-1] if "guard" not in group[-1].id else group[0]
        yield newest, tuple(release.id for release in group if release is not newest)


def _capacity(release: Release, same: tuple[str, ...], free: int, rates: Rates | None) -> Capacity:
    assert release.total_params is not None
    context = min(CONTEXT, release.max_context or CONTEXT)
    forms = tuple(_form(release.id, name, context, free, rates) for name in FORMS)
    return Capacity(release.id, release.total_params, context, forms, same)


def _form(model: str, name: str, context: int, free: int, rates: Rates | None) -> Form:
    peak = None if rates is None else rates.bfloat16 if name == "bf16" else rates.int8
    found = plan(
        model,
        context=context,
        weights=name,
        device="cpu",
        memory=free / GIB,
        bandwidth=None if rates is None else rates.bandwidth / 1e9,
        flops=None if peak is None else peak / 1e12,
    ).first
    speed = found.speed if found.fits else None
    return Form(name, found.total_bytes, found.fits, None if speed is None else speed.decode, speed and speed.prefill)
