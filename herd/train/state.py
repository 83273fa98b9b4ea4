"""The checkpoints of a run on the disk: whole or not at all, never a torn one loaded, never the last good one removed.

    OUT/checkpoints/step-00000100/
        manifest.json     every other file with its size and SHA-256; written last
        state.json        counters, loader position, what the run is
        rank-00000.json   random states of each rank, and what its optimiser keeps
        tensors.*         the payload: trained weights, optimiser, averages

A checkpoint grows in a hidden folder beside its place. Files are flushed, then the manifest, then the folder gets its name in one
step. So a folder with a name and a manifest is whole unless the disk lost something later, and that the checksums tell.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from herd.errors import CheckpointError
from herd.files import flush_folder, read_json
from herd.parallel.mesh import Mesh
from herd.train.payload import Payload
from herd.train.stop import SaveError

__all__ = ["Checkpoints", "damage", "latest", "read_rank", "read_ranks", "read_state", "step_of"]

MANIFEST, STATE, RANK = "manifest.json", "state.json", "rank-{:05d}.json"
NAME = re.compile(r"step-(\d{8,})")
NEW, OLD = ".new-", ".old-"
"""Hidden folders: a checkpoint that grows, and one that is being removed. Either is rubbish once its run has ended."""

RESERVE = 8 << 20
"""Bytes beside the tensors that a checkpoint is expected to need: state, manifest, directories."""

Tell = Callable[[str], None]


class Checkpoints:
    """Writer and keeper of the checkpoints of one run. Every rank makes one and calls the same methods."""

    def __init__(self, out: Path, payload: Payload, keep: int, mesh: Mesh, tell: Tell) -> None:
        self.folder, self.payload, self.keep, self.mesh, self.tell = out / "checkpoints", payload, keep, mesh, tell
        self.current: Path | None = None
        """The checkpoint that this run wrote last, or began from."""

    def prepare(self, need: int) -> None:
        """Make the folder, clear away what a killed run left, and see that a checkpoint of `need` bytes has room."""
        self._together(lambda: self._prepare(need), need)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], own: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`; afterwards older ones than the newest `keep` are gone. Returns its folder.

        `state` is the main rank's, `own` each rank's. Raises SaveError, on all ranks, with everything older as it was.
        """
        place, new = self.folder / f"step-{step:08d}", self.folder / f"{NEW}step-{step:08d}"
        need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.current is not None and place.resolve() == self.current.resolve():
            return place  # nothing was done since: a run that was resumed and stopped at once
        try:
            self._together(lambda: self._begin(new, need), need)
            self._together(lambda: self.payload.write(new, tensors), need)
            self._together(lambda: _write_json(new / RANK.format(self.mesh.rank), own), need)
            if self.mesh.is_main:
                self._together(lambda: _write_json(new / STATE, state), need)
            else:
                self._together(lambda: None, need)
            self._together(lambda: self._digest(new), need)
            self._together(lambda: self._commit(new, place, step), need)
        except SaveError:
            if self.mesh.is_main:
                shutil.rmtree(new, ignore_errors=True)
            raise
        self.current = place
        self._together(self._rotate, need)
        return place

    def _prepare(self, need: int) -> None:
        if not self.mesh.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():
            if entry.name.startswith((NEW, OLD)):
                shutil.rmtree(entry)
        self._room(need)

    def _room(self, need: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if need + RESERVE > free:
            raise SaveError(
                f"a checkpoint needs {_amount(need + RESERVE)}, and {_amount(free)} are free on this disk: make room, keep "
                "fewer (train.save.keep), or choose another `out`",
                path=self.folder,
                need=need + RESERVE,
                free=free,
            )

    def _begin(self, new: Path, need: int) -> None:
        if self.mesh.is_main:
            self._room(need)
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()

    def _digest(self, new: Path) -> None:
        """Each rank's share of the checksums: reading them back from the disk costs time that ranks can divide."""
        names = sorted(str(p.relative_to(new)) for p in new.rglob("*") if p.is_file() and not _is_digest(p))
        mine = {name: _facts(new / name) for name in names[self.mesh.rank :: self.mesh.world]}
        _write_json(new / f"digest-{self.mesh.rank:05d}.json", mine)

    def _commit(self, new: Path, place: Path, step: int) -> None:
        if not self.mesh.is_main:
            return
        files: dict[str, Any] = {}
        for rank in range(self.mesh.world):
            part = new / f"digest-{rank:05d}.json"
            files |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        _write_json(new / MANIFEST, {"version": 1, "step": step, "world": self.mesh.world, "files": files})
        for folder in {new, *(p for p in new.rglob("*") if p.is_dir())}:
            flush_folder(folder)
        if place.exists():  # a damaged one of the same step: whole ones are not left behind, see `Keeper.find`
            self._remove(place)
        new.rename(place)
        flush_folder(self.folder)

    def _rotate(self) -> None:
        if not self.mesh.is_main:
            return
        good = [place for place in _places(self.folder) if damage(place) is None]
        for place in good[: -self.keep]:
            self._remove(place)

    def _remove(self, place: Path) -> None:
        """Out of sight in one step, then deleted: half a checkpoint never has the name of a whole one."""
        old = place.with_name(OLD + place.name)
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        shutil.rmtree(old)

    def _together(self, action: Callable[[], object], need: int) -> None:
        """Do something on every rank; when it fails on any, all raise SaveError."""
        error: SaveError | None = None
        try:
            action()
        except SaveError as raised:
            error = raised
        except OSError as raised:
            error = _named(raised, self.folder, need)
        if self.mesh.any(error is not None):
            raise error or SaveError("another rank could not write its part of the checkpoint", path=self.folder)


def latest(out: Path, tell: Tell = lambda text: None) -> Path | None:
    """The newest whole checkpoint of the run in `out`, by step and not by clock; None when there is none at all.

    Damaged ones are passed over, and told. Raises CheckpointError when there are only damaged ones.
    """
    places = _places(out / "checkpoints")
    for place in reversed(places):
        why = damage(place, deep=True)
        if why is None:
            return place
        tell(f"{place} is not whole and is not used: {why}")
    if places:
        raise CheckpointError(
            f"all {len(places)} checkpoints are damaged: start anew in another folder, or bring back a copy", path=out
        )
    return None


def damage(place: Path, *, deep: bool = False) -> str | None:
    """Why the folder `place` is no whole checkpoint; None when it is one. `deep` reads everything against its checksum."""
    try:
        manifest = read_json(place / MANIFEST)
        files = manifest["files"]
        if manifest["version"] != 1:
            return f"{MANIFEST}: version {manifest['version']!r}, and this herd knows version 1"
        for name, facts in files.items():
            path = place / name
            if not path.resolve().is_relative_to(place.resolve()):
                return f"{MANIFEST}: {name[:80]!r} leads outside of the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if deep and _facts(path) != facts:
                return f"{name} is not what was written (SHA-256)"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not one"
    return None


def read_state(place: Path) -> dict[str, Any]:
    """`state` of a whole checkpoint. Raises CheckpointError."""
    return read_json(place / STATE)


def read_rank(place: Path, rank: int) -> dict[str, Any] | None:
    """What `rank` kept for itself; None when fewer ranks wrote the checkpoint. Raises CheckpointError."""
    own = place / RANK.format(rank)
    return read_json(own) if own.exists() else None


def read_ranks(place: Path) -> Iterator[dict[str, Any]]:
    """What every rank kept. Raises CheckpointError."""
    for own in sorted(place.glob("rank-*.json")):
        yield read_json(own)


def step_of(place: Path) -> int | None:
    """The step in a checkpoint folder's name."""
    found = NAME.fullmatch(place.name)
    return int(found[1]) if found else None


def _places(folder: Path) -> list[Path]:
    """Folders named as checkpoints, oldest step first."""
    if not folder.is_dir():
        return []
    found = [(step_of(entry), entry) for entry in folder.iterdir() if entry.is_dir()]
    return [entry for step, entry in sorted((step, entry) for step, entry in found if step is not None)]


def _is_digest(path: Path) -> bool:
    return path.name.startswith("digest-")


def _facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _named(error: OSError, folder: Path, need: int) -> SaveError:
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
    why = error.strerror or str(error)
    if error.errno == errno.EFBIG:
        why = (
            f"no file may be so large here (ulimit -f, or the file system's limit): a checkpoint needs {_amount(need)}"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        left = "" if free is None else f", {_amount(free)} are free now"
        why = f"the disk is full ({why}): a checkpoint needs {_amount(need)}{left}"
    return SaveError(
        f"a checkpoint could not be written: {why}. Earlier checkpoints are whole: make room or repair it, then go on with "
        "--resume auto",
        path=folder,
        need=need,
        free=free,
    )


def _amount(size: int) -> str:
    if size < 10_000_000:
        return f"{size:,} bytes"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
