"""Combinations of two lists, of which the quick run takes enough to see each member of both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def pairs(names: Iterable[Any], kinds: Iterable[Any]) -> list[Any]:
    """Every name with every kind. Each name and each kind is at least once in the quick run, kinds in turn; the rest is slow."""
    names, kinds = list(names), list(kinds)
    return [
        pytest.param(
            name, kind, id=f"{name}-{kind}", marks=() if i % len(kinds) == j % len(names) else pytest.mark.slow
        )
        for i, name in enumerate(names)
        for j, kind in enumerate(kinds)
    ]
