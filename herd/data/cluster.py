"""A build of shards that the machines of a Ray cluster share (the extra `ray`). No torch.

Every free machine makes a `Part`, in as many processes as it has cores; then they are joined. Parts lie in one folder that all
machines see, under the names and with the bytes that one machine alone would give them. So what is lost with a machine is the
work on its unfinished shards: its part is tried again elsewhere, and a command that is repeated goes on.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

from herd.data.adapt import Kind
from herd.data.build import Build, Built, Part, Progress, ShardSize
from herd.data.content import contents, stat_of
from herd.data.report import BadRows
from herd.data.tokenworker import Encoder
from herd.errors import ConfigError, DataError, HerdError

__all__ = ["build_on_ray"]

ATTEMPTS = 3
"""How often a part is begun at most."""

LOOK = 0.5
"""Seconds between looks at how far parts are."""

Files = Sequence[tuple[Path, Kind | None]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What every part is told. `mark` is a file in `root` that only a machine with the same folder has."""

    root: Path
    mark: Path
    encoder: Encoder
    files: Files
    bad: BadRows
    processes: int
    size: ShardSize | None
    check: bool


@dataclass(frozen=True, slots=True)
class _Answer:
    """What became of a part: shards made by folder, or why it failed and whether to try `again`."""

    made: dict[str, int] = field(default_factory=dict)
    why: str = ""
    again: bool = False


@dataclass(slots=True)
class _Board:
    """Where parts tell how far they are; an actor, because machines share nothing faster."""

    parts: dict[int, Progress] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def tick(self, number: int, progress: Progress) -> None:
        """Part `number` is so far."""
        self.parts[number] = progress

    def say(self, number: int, text: str) -> None:
        """Part `number` has something to say."""
        self.said.append(f"part {number}: {text}")

    def read(self) -> tuple[dict[int, Progress], list[str]]:
        """How far all are, and what was said since the last call."""
        said, self.said = self.said, []
        return self.parts, said


def _part(asked: _Asked, number: int, of: int, board: Any) -> _Answer:
    """Make part `number`, on whatever machine this is."""
    import time

    last = 0.0

    def tick(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > LOOK or progress.done >= progress.total:
            last = now
            board.tick.remote(number, progress)

    try:
        if not asked.mark.exists():
            raise DataError(f"{asked.root} is another folder there: shards go into one that all machines share (--out)")
        build = Build(
            asked.root,
            asked.encoder,
            bad=asked.bad,
            processes=asked.processes,
            part=Part(number, of),
            size=asked.size,
            check=asked.check,
            tick=tick,
            tell=lambda text: board.say.remote(number, text),
        )
        return _Answer({one.folder.name: one.made for one in build(asked.files)})
    except HerdError as error:
        # A disk or a network may be well again; rows, formats and missing files are the same the next time.
        cause = error.__cause__
        return _Answer(why=str(error), again=isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError))


def build_on_ray(
    root: Path,
    encoder: Encoder,
    files: Files,
    *,
    address: str | None = None,
    bad: BadRows = "stop",
    processes: int | None = None,
    size: ShardSize | None = None,
    check: bool = False,
    tick: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Built]:
    """As `Build(root, encoder, ...)(files)`, by the machines of the Ray cluster at `address`, with the same bytes.

    `address` None takes that of RAY_ADDRESS, a cluster that runs on this machine, or else this machine alone. `processes` are
    those of a part (None: the cores of the smallest machine); as many parts are made as find room. All machines need herd, and
    `root` and the files under the same names. Raises ConfigError without Ray or a cluster, and DataError as `Build` does and for
    a part that failed ATTEMPTS times, named with its machine.
    """
    if util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray: pip install 'herd[ray]'")
    root, files = root.absolute(), [(file.absolute(), kind) for file, kind in files]
    with _cluster(address) as ray, _marked(root) as mark:
        cores = sorted(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        cores = [count for count in cores if count]
        each = min(processes or cores[0], cores[-1]) if cores else 0
        of = sum(count // each for count in cores) if each else 0
        if not of:
            raise ConfigError(f"--ray: no machine of the cluster has a processor for tasks (processes: {processes})")
        # Read here once: parts find the sums in the folder that they share.
        contents([f for f, _ in files], root / "contents", lambda done, total: tick(Progress("reading", done, total)))
        tell(f"{of} parts on {len(cores)} machines, {each} processes each")
        asked = _Asked(root, mark, encoder, files, bad, each, size, check)
        made = _Crew(ray, asked, of, tick, tell).run()
    built = Build(root, encoder, bad=bad, size=size, joining=True, tick=tick, tell=tell)(files)
    for one in built:
        one.made = made.get(one.folder.name, 0)
    return built


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected."""
    import ray  # pyright: ignore[reportMissingImports]

    if ray.is_initialized():  # the caller's own
        yield ray
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "" if address is None else f" {address}"
        raise ConfigError(
            f"--ray{where}: no Ray cluster answers ({' '.join(str(error).split())[:200]}): `ray start --head` begins one, and "
            "--ray local takes this machine alone"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _marked(root: Path) -> Iterator[Path]:
    """A file in `root` that was not there before, by which other machines know the folder."""
    mark = root / f".ray-{secrets.token_hex(8)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise DataError(f"{root}: shards cannot be written here: {error.strerror or error}") from error
    try:
        yield mark
    finally:
        with suppress(OSError):
            mark.unlink()


class _Crew:
    """The tasks of a build, until all parts are there."""

    def __init__(
        self, ray: Any, asked: _Asked, of: int, tick: Callable[[Progress], None], tell: Callable[[str], None]
    ) -> None:
        self.ray, self.asked, self.of, self.tick, self.tell = ray, asked, of, tick, tell
        sizes = [stat_of(file).st_size for file, _ in asked.files]
        parts = [Part(number, of) for number in range(1, of + 1)]
        if parts[0].whole(len(sizes)):
            self.sizes = {part.number: sum(s for i, s in enumerate(sizes) if part.has(i)) for part in parts}
        else:
            self.sizes = {part.number: sum(sizes) for part in parts}
        self.board = ray.remote(_Board).options(num_cpus=0).remote()
        self.given = ray.put(asked)
        options = {"num_cpus": asked.processes, "max_retries": 0, "scheduling_strategy": "SPREAD"}
        self.task = ray.remote(_part).options(**options)
        self.begun = dict.fromkeys(self.sizes, 0)
        self.running: dict[Any, int] = {}

    def run(self) -> dict[str, int]:
        """Shards made by folder. Raises DataError for a part that cannot be made."""
        made: dict[str, int] = {}
        try:
            for number in self.sizes:
                self._begin(number)
            while self.running:
                done, _ = self.ray.wait(list(self.running), timeout=LOOK)
                for reference in done:
                    number = self.running.pop(reference)
                    answer = self._answer(reference)
                    if answer.why:
                        self._failed(number, answer)
                    for folder, count in answer.made.items():
                        made[folder] = made.get(folder, 0) + count
                self._look()
        finally:
            for reference in self.running:
                self.ray.cancel(reference, force=True)
            self.ray.kill(self.board)
        return made

    def _begin(self, number: int) -> None:
        self.begun[number] += 1
        self.running[self.task.remote(self.given, number, self.of, self.board)] = number

    def _answer(self, reference: Any) -> _Answer:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:  # the process or its machine is gone, or herd is not there
            cause = getattr(error, "cause", None)  # what the task itself raised
            why = str(error) if cause is None else f"{type(cause).__name__}: {cause}"
            return _Answer(why=" ".join(why.split())[:300], again=True)

    def _failed(self, number: int, answer: _Answer) -> None:
        if not answer.again:
            raise DataError(answer.why)
        tries = f"{self.begun[number]} of {ATTEMPTS} times"
        if self.begun[number] >= ATTEMPTS:
            raise DataError(
                f"part {number} of {self.of} failed {tries}: {answer.why}. What is made is kept: the same command goes on"
            )
        self.tell(f"part {number} of {self.of} failed ({answer.why}), {tries}: it is begun again")
        self._begin(number)

    def _look(self) -> None:
        try:
            parts, said = self.ray.get(self.board.read.remote(), timeout=10)
        except self.ray.exceptions.RayError:  # the machine with the board is gone or slow: parts go on without it
            return
        for text in said:
            self.tell(text)
        told = {number: p for number, p in parts.items() if p.doing == "tokenizing"}
        left = set(self.running.values())  # what is no longer there found the rest made already
        done = {number: told[number].done if number in told else 0 for number in left}
        self.tick(
            Progress(
                "tokenizing",
                sum(min(done.get(number, size), size) for number, size in self.sizes.items()),
                sum(self.sizes.values()),
                sum(p.documents for p in told.values()),
                sum(p.tokens for p in told.values()),
            )
        )
