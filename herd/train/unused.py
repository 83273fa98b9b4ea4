"""Keys that were changed and that nothing reads: those of another `kind` than the one that is chosen. Imports no torch.

Which kinds read a key stands at the beginning of its text (`herd.train.config`): "lora, dora, qlora: the rank of the factors."
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from herd.train.typed import documents, types_of

__all__ = ["unused"]


def unused(part: Any, prefix: str = "") -> Iterator[str]:
    """A line for each key of `part`, and of the parts in it, that has another value than its default and no effect."""
    kind, choices = getattr(part, "kind", None), set(get_args(types_of(type(part)).get("kind")))
    for field in dataclasses.fields(part):
        value, key = getattr(part, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from unused(value, f"{key}.")
            continue
        names, colon, _ = documents(type(part)).get(field.name, "").partition(": ")
        readers = set(names.split(", "))
        if field.name != "kind" and colon and readers <= choices and kind not in readers and value != field.default:
            yield f"{key} has no effect: it is for {prefix}kind={names.replace(', ', ' or ')}, and this is {kind}"
