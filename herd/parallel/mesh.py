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

DIMENSIONS = ("pp", "dp_replicate", "shard", "tp")
"""Where parameters are: ranks that share a sequence have different gradients of the same parameters, just as ranks with different
rows, so FSDP shards over dp_shard and cp together ("shard")."""
OF_ROWS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """The ranks of a run as this rank sees them. `Mesh.single()` needs no process group, and all its verbs are cheap.

    `dp_rank` of `dp_size` is what a loader needs to know; `rank` of `world` counts processes.
    """

    part: ParallelPart
    device: torch.device
    devices: DeviceMesh | None = None
    sequences: dist.ProcessGroup | None = None
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
        sizes = (part.pp, part.dp_replicate, part.dp_shard * part.cp, part.tp)
        devices = init_device_mesh(device.type, sizes, mesh_dim_names=DIMENSIONS)
        sequences = None
        if part.cp > 1:
            sizes = tuple(getattr(part, name) for name in OF_ROWS)
            sequences = init_device_mesh(device.type, sizes, mesh_dim_names=OF_ROWS).get_group("cp")
        at = dict(zip(DIMENSIONS, devices.get_coordinate() or (), strict=True))
        return cls(
            part=part,
            device=device,
            devices=devices,
            sequences=sequences,
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            dp_rank=at["dp_replicate"] * part.dp_shard + at["shard"] // part.cp,
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
        total = value.detach().to(self.device, copy=True)
        for name in ("shard", "dp_replicate"):
            if self.devices is not None and self.devices[name].size() > 1:
                dist.all_reduce(total, group=self.group(name))
        return total.to(value.device)

    @property
    def draws(self) -> int:
        """Which random numbers this rank draws: others where tokens or layers are others, the same where they are shared (tp)."""
        cp = 0 if self.sequences is None else self.sequences.rank()
        pp = 0 if self.part.pp == 1 else self.along("pp").get_local_rank()
        return self.dp_rank + self.dp_size * (cp + self.part.cp * pp)

    def of_sequences(self, value: Tensor) -> Tensor:
        """`value` summed over the ranks that share each sequence (cp), the same on all of them. A new tensor."""
        total = value.detach().to(self.device, copy=True)
        if self.sequences is not None:
            dist.all_reduce(total, group=self.sequences)
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
        if self.sequences is None:
            return rows
        from herd.parallel.context import cut

        return cut(rows, self.part.cp, self.sequences.rank())

    def packed(self, config: ModelConfig, positions: Tensor) -> Sequence[Attend]:
        """`herd.model.attend.packed` for rows of which this rank has its part: `positions` as `cut` left them."""
        if self.sequences is None:
            return packed(config, positions)
        from herd.parallel.context import packed_over

        return packed_over(self.sequences, config, positions)

    def group(self, name: str) -> dist.ProcessGroup:
        """The process group of the ranks that differ from this one in the dimension `name` only: pp, dp_replicate, shard, tp."""
        return self.along(name).get_group()

    def along(self, *names: str) -> DeviceMesh:
        """The mesh along `names`."""
        assert self.devices is not None, "a single process has no groups"
        return self.devices[names]

    def shards(self) -> DeviceMesh:
        """The mesh that FSDP shards over, behind dp_replicate when there are copies."""
        return self.along("dp_replicate", "shard") if self.part.dp_replicate > 1 else self.along("shard")

    @property
    def spread(self) -> bool:
        """Whether gradients of different ranks have to be summed."""
        return self.part.dp * self.part.cp > 1

    def cuts(self) -> tuple[tuple[str, ...], ...]:
        """Every set of dimensions along which a parameter can be cut, in an order that all ranks share."""
        return ((), ("shard",), ("tp",), ("shard", "tp"))
