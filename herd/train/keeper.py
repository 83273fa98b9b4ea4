"""From a run to its checkpoints and back: what is saved, where a run goes on, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from herd.adapters.apply import trained
from herd.data.batch import TokenBatch
from herd.errors import CheckpointError, ConfigError
from herd.model.late import derived, lives_on, promise
from herd.model.llama import Llama
from herd.parallel.mesh import Mesh
from herd.train.config import TrainConfig
from herd.train.identity import differences, identity
from herd.train.memory import return_freed_memory
from herd.train.moment import Counters, RandomStates, describe, not_finite, restore_optimisers, targets, tensors_of
from herd.train.payload import OneFile, Payload, Read
from herd.train.state import Checkpoints, damage, latest, read_rank, read_ranks, read_state, step_of
from herd.train.stop import NonFiniteError

if TYPE_CHECKING:
    from herd.train.average import Average

__all__ = ["Keeper", "Resume", "Source", "fill_weights", "load_weights", "promise_weights"]

Resume = Literal["auto", "never"] | Path


class Source(Protocol):
    """Endless batches in an order that depends on `state` alone; `herd.data.batch.Loader` is one."""

    @property
    def state(self) -> Any:
        """Where the next batch begins: JSON-able."""
        ...

    def draw(self) -> TokenBatch: ...
    def restore(self, state: Any, *, exact: bool = True) -> None: ...


class Keeper:
    """Saves a run into `out` (None: nowhere) and brings it back. Every rank has one and calls the same methods."""

    def __init__(
        self,
        model: Llama,
        optimisers: Sequence[Optimizer],
        loader: Source,
        average: Average | None,
        config: TrainConfig,
        mesh: Mesh,
        *,
        out: Path | None,
        exact: bool,
        facts: Mapping[str, Any],
        payload: Payload | None,
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.optimisers, self.loader, self.average = model, optimisers, loader, average
        self.config, self.mesh, self.out, self.exact, self.facts, self.tell = config, mesh, out, exact, facts, tell
        self.payload = payload or OneFile()
        self.saves = None if out is None else Checkpoints(out, self.payload, config.save.keep, mesh, tell)
        self._known: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Make room: the folder, no leftovers, and as much free space as a checkpoint is expected to need."""
        if self.saves is not None:
            weights = sum(weight.numel() * weight.element_size() for weight in trained(self.model).values())
            self.saves.prepare(3 * weights)  # weights and two means of AdamW

    def save(self, done: Counters) -> Path:
        """Write a checkpoint of this moment, whole or not at all. Raises SaveError, and NonFiniteError for spoiled weights."""
        assert self.saves is not None, "a run without `out` saves nothing"
        averages = {} if self.average is None else self.average.tensors()
        tensors = tensors_of(self.model, self.optimisers, averages)
        bad = not_finite(tensors)
        if self.mesh.any(bad is not None):
            bad = bad or "a tensor of another rank"
            raise NonFiniteError(f"step {done.step}: {bad} is not finite: not saved", bad.split(" ")[0])
        state = {"counters": asdict(done), "loader": self.loader.state, "identity": self.identity()}
        own = {
            "random": RandomStates.now().as_json(),
            "optimisers": describe(self.model, self.optimisers),
            "averages": sorted(averages),
        }
        return self.saves.save(done.step, tensors, state, own)

    def find(self, resume: Resume) -> Path | None:
        """Where the run goes on: a checkpoint folder, or None for a new run. Raises ConfigError and CheckpointError."""
        if self.out is None:
            return resume if isinstance(resume, Path) else None
        newest = self._newest(self.out)
        if resume == "never":
            if newest >= 0:
                raise ConfigError(
                    f"{self.out} holds checkpoints (up to step {newest}): go on with --resume auto, or choose another `out`"
                )
            return None
        if isinstance(resume, Path):
            own = self.out / "checkpoints" / f"step-{newest:08d}"
            if newest >= 0 and resume.resolve() != own.resolve():
                raise ConfigError(
                    f"{self.out} holds checkpoints up to step {newest}, and {resume} is not the newest of them: choose another "
                    "`out`, so that two runs do not mix"
                )
            return resume
        return self.out / "checkpoints" / f"step-{newest:08d}" if newest >= 0 else None

    def restore(self, place: Path) -> Counters:
        """Go on from the checkpoint folder `place`, as if its steps had been done here. Only tensors and plain values are read.

        Raises CheckpointError when it does not fit, ConfigError when going on would not be exact and has to be.
        """
        state = self._open(place)
        lines, fits = differences(state["identity"], self.identity())
        told = "\n  ".join(lines)
        if not fits:
            raise CheckpointError(f"is a checkpoint of another model:\n  {told}", path=place)
        if lines and self.exact:
            raise ConfigError(
                f"{place} was written by another run than this one:\n  {told}\nRestore these settings, or go on all the same, "
                "though not exactly (--inexact), or choose another `out`"
            )
        for line in lines:
            self.tell(f"not exact: {line}")
        if self.saves is not None:
            self.saves.current = place
        own = read_rank(place, self.mesh.rank)
        if own is None:
            self.tell(
                "not exact: this rank was not there when the checkpoint was written, so its random numbers start anew"
            )
        self._fill(place)
        self.loader.restore(state["loader"], exact=self.exact)
        if own is not None:
            RandomStates.of_json(own["random"]).restore()
        return Counters(**state["counters"])

    def adopt(self, place: Path) -> None:
        """Take weights and optimiser states from the checkpoint of another run, but no counters: the next phase of a schedule."""
        kept, now = self._open(place)["identity"], self.identity()
        lines, fits = differences(*({key: part[key] for key in ("model", "trained")} for part in (kept, now)))
        if not fits:
            raise CheckpointError("is a checkpoint of another model:\n  " + "\n  ".join(lines), path=place)
        self._fill(place)

    def identity(self) -> dict[str, Any]:
        """What this run is. What does not train is looked at once."""
        if self._known is None:
            self._known = identity(self.model, self.config, self.mesh, self.facts)
        return self._known

    def _newest(self, out: Path) -> int:
        """The step of the newest whole checkpoint, -1 without one. Checksums are read by the main rank alone."""
        step, error = -1, None
        if self.mesh.is_main:
            try:
                found = latest(out, self.tell)
                step = -1 if found is None else step_of(found) or 0
            except CheckpointError as raised:
                error = raised
        if self.mesh.any(error is not None):
            raise error or CheckpointError("the main rank could not read the checkpoints", path=out)
        return int(from_main(self.mesh, float(step)))

    def _open(self, place: Path) -> dict[str, Any]:
        why = damage(place, deep=self.mesh.is_main)
        if self.mesh.any(why is not None):
            raise CheckpointError(f"is no whole checkpoint of a training run: {why or 'see the main rank'}", path=place)
        return read_state(place)

    def _fill(self, place: Path) -> None:
        try:
            described: dict[str, Any] = {}
            averages: set[str] = set()
            for own in read_ranks(place):
                described |= own["optimisers"]
                averages |= set(own["averages"])
            room = targets(self.model, self.optimisers, described)
            kept = self._averages(averages)
            self.payload.read(place, room | kept)
            restore_optimisers(self.model, self.optimisers, described, room)
            if self.average is not None and kept:
                self.average.restore(kept)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"does not describe this optimiser: {error!r}", path=place) from error

    def _averages(self, names: set[str]) -> dict[str, Tensor]:
        """Room for the averages of that name, of the weights that are here."""
        if self.average is None:
            return {}
        weights = {f"average.{name}": weight.detach() for name, weight in trained(self.model).items()}
        room = {name: torch.empty_like(weights[name], dtype=torch.float32) for name in names & weights.keys()}
        return room | {name: tensor for name, tensor in self.average.tensors().items() if name in names - room.keys()}


def from_main(mesh: Mesh, value: float) -> float:
    """The main rank's `value`, on every rank: clocks and disks differ, and what follows from them must not."""
    if mesh.world == 1:
        return value
    said = torch.tensor([value], dtype=torch.float64, device=mesh.device)
    dist.broadcast(said, 0)
    return float(said)


def load_weights(out: Path, model: Llama, payload: Payload | None = None, *, averaged: bool = False) -> Path:
    """Fill `model` with the weights of the newest whole checkpoint of the run in `out`; returns its folder.

    With `averaged`, with their averages where the checkpoint has some. Raises CheckpointError when there is none, or it is one of
    another model.
    """
    place = latest(out)
    if place is None:
        raise CheckpointError("holds no checkpoint of a training run", path=out)
    fill_weights(place, model, payload, averaged=averaged)
    return place


def fill_weights(place: Path, model: Llama, payload: Payload | None = None, *, averaged: bool = False) -> None:
    """As `load_weights`, of the whole checkpoint folder `place`."""
    room: dict[str, Tensor] = targets(model, (), {})
    names = _averages_of(place) if averaged else set[str]()
    means = {
        name: torch.empty_like(weight.detach(), dtype=torch.float32)
        for name, weight in ((f"average.{name}", weight) for name, weight in trained(model).items())
        if name in names
    }
    (payload or OneFile()).read(place, room | means)
    with torch.no_grad():
        for name, mean in means.items():
            room[f"model.{name.removeprefix('average.')}"].copy_(mean)


def promise_weights(place: Path, model: Llama, payload: Payload | None = None, *, averaged: bool = False) -> None:
    """As `fill_weights`, of a model without numbers (`herd.model.late`): every trained tensor is read when it is asked for."""
    read, means = (payload or OneFile()).opened(place), _averages_of(place) if averaged else set[str]()
    names = {id(weight): name for name, weight in trained(model).items()}
    for module in model.modules():
        for key, weight in module._parameters.items():
            name = names.get(id(weight))
            if weight is not None and name is not None:
                made = partial(_read_one, read, name, weight, lives_on(model), averaged=f"average.{name}" in means)
                promise(module, key, derived(made))


def _read_one(read: Read, name: str, like: Tensor, where: torch.device, *, averaged: bool) -> Tensor:
    return_freed_memory()  # of the last tensor, and of the run: otherwise the heap grows around holes
    found = torch.empty(like.shape, dtype=torch.float32 if averaged else like.dtype)
    read({f"{'average' if averaged else 'model'}.{name}": found})
    return found.to(where, like.dtype)


def _averages_of(place: Path) -> set[str]:
    """Names of the averages that a checkpoint holds."""
    return {name for own in read_ranks(place) for name in own["averages"]}
