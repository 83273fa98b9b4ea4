"""Which ranks work together, and the few things that a trainer asks of them.

A mesh has five dimensions, outermost first: pp, dp_replicate, dp_shard, cp, tp (the ranks of one machine are neighbours, and
tensor parallelism talks most). Ranks of one dp coordinate draw the same rows; `cut` gives each cp rank its part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from herd.errors import ConfigError
from herd.model.attend import Attend, packed
from herd.model.config import ModelConfig
from herd.parallel.config import ParallelPart

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Mesh"]

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """The ranks of a run as this rank sees them. `Mesh.single()` needs no process group, and all its verbs are cheap.

    `dp_rank` of `dp_size` is what a loader needs to know; `rank` of `world` counts processes.
    """

    part: ParallelPart
    device: torch.device
    devices: DeviceMesh | None = None
    rank: int = 0
    world: int = 1
    dp_rank: int = 0

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Mesh:
        """One process, no process group."""
        return cls(part=ParallelPart(), device=torch.device(device))

    @classmethod
    def of(cls, part: ParallelPart, device: torch.device | str = "cpu") -> Mesh:
        """The mesh of the process group that is running (`herd.parallel.launch.start` makes one). Raises ConfigError."""
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():
            if part.dp_shard in (1, -1) and part.others == 1:
                return cls.single(device)
            raise ConfigError(
                f"the config asks for {part}, but this is one process: start it with herd train --nproc N or torchrun"
            )
        part = part.of_world(dist.get_world_size())
        device = torch.device(device)
        devices = init_device_mesh(
            device.type, tuple(getattr(part, name) for name in DIMENSIONS), mesh_dim_names=DIMENSIONS
        )
        at = dict(zip(DIMENSIONS, devices.get_coordinate() or (), strict=True))
        return cls(
            part=part,
            device=device,
            devices=devices,
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            dp_rank=at["dp_replicate"] * part.dp_shard + at["dp_shard"],
        )

    @property
    def dp_size(self) -> int:
        """Ranks that draw different rows."""
        return self.part.dp

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over the ranks that hold different tokens (dp and cp), the same on all of them. A new tensor.

        Count what `cut` left on this rank.
        """
        if self.devices is None or self.part.dp * self.part.cp == 1:
            return value.clone()
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.group("dp_replicate", "dp_shard", "cp"))
        return total.to(value.device)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.devices is not None:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: every rank gets the same answer."""
        if self.devices is None:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    def cut(self, rows: Tensor) -> Tensor:
        """This cp rank's part of `rows` [B, S, ...]: [B, S / cp, ...], see `herd.parallel.context`."""
        if self.part.cp == 1:
            return rows
        from herd.parallel.context import cut

        return cut(rows, self.part.cp, self.group("cp").rank())

    def packed(self, config: ModelConfig, positions: Tensor) -> Sequence[Attend]:
        """`herd.model.attend.packed` for rows of which this rank has its part: `positions` as `cut` left them."""
        if self.part.cp == 1:
            return packed(config, positions)
        from herd.parallel.context import packed_over

        return packed_over(self.group("cp"), config, positions)

    def group(self, *names: str) -> dist.ProcessGroup:
        """The process group of the ranks that differ from this one in `names` only."""
        return self.along(*names).get_group()

    def along(self, *names: str) -> DeviceMesh:
        """The mesh along `names`, as one dimension."""
        assert self.devices is not None, "a single process has no groups"
        if len(names) == 1:
            return self.devices[names[0]]
        return self.devices[names]._flatten("_".join(names))  # torch has no public name for it yet
