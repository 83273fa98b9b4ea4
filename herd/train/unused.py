"""Keys that were changed and that nothing reads: those of another `kind` than the one that is chosen, or of something that the
run does not do. Imports no torch.

Which kinds read a key stands at the beginning of its text (`herd.train.config`): "lora, dora, qlora: the rank of the factors."
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from herd.train.config import ReportPart, RunConfig
from herd.train.typed import documents, types_of

__all__ = ["alone", "unused"]


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


def alone(config: RunConfig) -> Iterator[str]:
    """A line for each key that was changed and says how to do what the run does not do at all."""
    part, report = config.parallel, config.report
    for name, ranks in (("schedule", ("pp",)), ("experts", ("tp",)), ("reshard", ("dp_shard", "cp"))):
        if getattr(part, name) != getattr(type(part)(), name) and all(getattr(part, rank) == 1 for rank in ranks):
            needed = " or ".join(f"parallel.{rank}" for rank in ranks)
            yield f"parallel.{name} has no effect: it is for {needed} of 2 or more, and this is 1"
    for name in ("project", "name"):
        if not report.to and getattr(report, name) != getattr(ReportPart(), name):
            yield f"report.{name} has no effect: report.to names no tracker that would show it"
