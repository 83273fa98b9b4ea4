"""How a run is spread over ranks: numbers only. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from herd.errors import ConfigError

__all__ = ["ParallelPart", "Schedule"]

Schedule = Literal["gpipe", "1f1b", "interleaved"]
"""In which order a pipeline computes its micro-batches: all forward then all backward; one forward, one backward; the same
with several stages a rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPart:
    """Ranks along each dimension; their product is the number of processes. Raises ConfigError."""

    dp_shard: int = 1
    """Ranks that see different rows and share parameters, gradients and optimiser state (FSDP); -1: all that are left."""
    dp_replicate: int = 1
    """Copies of all that, which see different rows too (HSDP)."""
    tp: int = 1
    """Ranks that share every matrix (tensor parallel), and the tokens between the matrices."""
    cp: int = 1
    """Ranks that share every sequence (context parallel)."""
    pp: int = 1
    """Ranks that hold different layers (pipeline parallel); the micro-batches of train.accumulate travel through them."""
    schedule: Schedule = "1f1b"
    """Order of the pipeline's work."""
    stages: int = 1
    """Stages that each rank of an interleaved pipeline holds."""
    experts: Literal["width", "number"] = "width"
    """What tensor parallelism cuts of routed experts: "width", a slice of every one, or "number", whole ones."""
    reshard: bool = True
    """Whether parameters are given back after the forward pass and gathered again for the backward pass (less memory)."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "tp", "cp", "pp", "stages"):
            _count(self, name, 1)
        if self.dp_shard != -1:
            _count(self, "dp_shard", 1)
        for name, allowed in (("schedule", get_args(Schedule)), ("experts", ("width", "number"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"parallel.{name} is {getattr(self, name)!r}: choose {', '.join(allowed)}")
        if self.stages > 1 and self.schedule != "interleaved":
            raise ConfigError(
                f"parallel.stages is {self.stages}: only parallel.schedule=interleaved has several a rank"
            )
        if self.schedule == "interleaved" and self.stages == 1:
            raise ConfigError("parallel.schedule=interleaved needs parallel.stages of 2 or more")

    @property
    def others(self) -> int:
        """Ranks without `dp_shard`."""
        return math.prod((self.dp_replicate, self.tp, self.cp, self.pp))

    @property
    def world(self) -> int:
        """Processes in all; `dp_shard` must be known (`of_world`)."""
        assert self.dp_shard > 0, "of_world first"
        return self.dp_shard * self.others

    @property
    def dp(self) -> int:
        """Ranks that draw different rows."""
        return self.dp_shard * self.dp_replicate

    def of_world(self, world: int) -> ParallelPart:
        """The same with `dp_shard` known, for `world` processes. Raises ConfigError when they do not fit."""
        part = self
        if self.dp_shard == -1:
            if world % self.others:
                count = "one process" if world == 1 else f"{world} processes"
                raise ConfigError(f"{count} cannot be shared by {self}: {world} is not a multiple of {self.others}")
            part = replace(self, dp_shard=world // self.others)
        if part.world != world:
            raise ConfigError(part._unlike(world))
        return part

    def _unlike(self, world: int) -> str:
        """That `world` processes run, and the configuration asks for another number."""
        runs = "one runs" if world == 1 else f"{world} run"
        if self.world == 1:
            return (
                f"the config is for one process, but {runs}: set parallel.dp_shard=-1 (every process reads other rows, all share "
                "the training state), or start one"
            )
        rest = ", or set parallel.dp_shard=-1" if world % self.others == 0 else ""
        return f"the config asks for {self.world} processes ({self}), but {runs}: start {self.world}{rest}"

    def __str__(self) -> str:
        names = ("dp_replicate", "dp_shard", "pp", "cp", "tp")
        parts = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) != 1]
        return " x ".join(parts) or "one process"


def _count(part: ParallelPart, name: str, least: int) -> None:
    value = getattr(part, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"parallel.{name} is {value!r}: expected a whole number from {least}")
