"""Processes of one run: started here or by torchrun or Slurm, joined into a group, and ended together.

A launcher says who a process is in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun does; under Slurm that
is read from SLURM_PROCID and its kin.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from threading import Thread
from typing import IO, TYPE_CHECKING

from herd.errors import ConfigError, RanksError
from herd.parallel.config import ParallelPart

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from herd.parallel.mesh import Mesh

__all__ = ["follow", "group", "launched", "lost", "spawn", "start", "stop"]

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: one may be writing a checkpoint of terabytes."""
GRACE = 15.0
"""Seconds that the other ranks have to end by themselves after one has died: they may have a state to save."""
TOLD = 40
"""Last lines of a dead rank that are shown."""
_GONE = (
    "closed by peer",
    "connection reset",
    "connection closed",
    "connection was",
    "refused",
    "broken pipe",
    "timed out",
    "timeout",
    "exited",
)
"""In what gloo, NCCL and the store say when another rank is gone."""
_meeting: tuple[Store, int, int] | None = None
"""Where this process meets others, its rank and their number: rank 0 serves the store for as long as it is held here."""
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGUSR1")
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEASH = "HERD_LEASH"
"""Set for ranks of `spawn`: their standard input is a pipe that the launcher holds open for as long as it lives."""


def launched(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several. Raises ConfigError for a SLURM_NTASKS that is no number."""
    if "RANK" in environ:
        return True
    return "SLURM_PROCID" in environ and _whole("SLURM_NTASKS", environ.get("SLURM_NTASKS", "1")) > 1


def start(part: ParallelPart, device: str = "cpu") -> Mesh:
    """Join the process group that the launcher described and lay `part` over it; without a launcher, one process.

    `device` is "cpu" (gloo) or "cuda" (nccl; the device of LOCAL_RANK is taken). Raises ConfigError when the ranks do not fit, or
    when a launcher left something out.
    """
    follow()
    import torch
    import torch.distributed as dist

    from herd.parallel.mesh import Mesh

    if not launched():
        return Mesh.of(part, device)
    _of_slurm()
    _check()
    kind = torch.device(device).type
    place = torch.device(kind)
    if kind == "cuda":
        place = torch.device(kind, _whole("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        try:
            _join("nccl" if kind == "cuda" else "gloo")
        except RuntimeError as error:  # DistError is one, too
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RanksError(
                f"rank {os.environ['RANK']} could not meet the others at {where}: {_line(error)}"
            ) from error
    try:
        return Mesh.of(part, place)
    except ConfigError:
        stop()
        raise


def _join(backend: str) -> None:
    """Make the group. Each has names of its own in the store, which outlives it: under torchrun the ranks, here the group."""
    global _meeting
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from herd.parallel.meeting import agree

    if _meeting is None:
        _meeting = next(rendezvous("env://", timeout=PATIENCE))
    store, rank, world = _meeting
    store.set_timeout(PATIENCE)
    store = PrefixStore(f"herd/start/{agree(store, rank, world, PATIENCE)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def stop() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def lost(error: BaseException) -> RanksError | None:
    """What an error of an exchange between ranks means: another one is gone or out of reach, or what the backend says. None for
    every other error.

    gloo's errors are RuntimeErrors that begin with the place in gloo's source.
    """
    import torch.distributed as dist

    gloo = isinstance(error, RuntimeError) and "/gloo/" in str(error)[:200]
    if not isinstance(error, dist.DistError) and not gloo:
        return None
    rank, said = os.environ.get("RANK", "0"), _line(error)
    if not any(words in said.lower() for words in _GONE):
        return RanksError(f"rank {rank} could not exchange with the others: {said}")
    return RanksError(
        f"rank {rank} lost another one ({said}): that rank ended, or its machine is out of reach; what it printed says why"
    )


def _line(error: BaseException) -> str:
    """All that an error says, in one line, without the place in the source that gloo begins with."""
    said = " ".join(str(error).split())
    return said.partition("] ")[2] if said.startswith("[/") else said


def follow() -> None:
    """In a rank of `spawn`, from now on: when the launcher is killed, end as by SIGTERM (a run saves). `start` does this.

    Ranks have sessions of their own, so nobody else would end them: they would train on, holding the folder and the devices.
    """
    if os.environ.pop(_LEASH, None) is None:  # taken out: processes of this one have other inputs
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        with contextlib.suppress(OSError, ValueError):
            print("herd: the process that started this run is gone; the run is over", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def group(part: ParallelPart, device: str = "cpu") -> Iterator[Mesh]:
    """`start` and `stop` around a run. After an error nobody waits for the others: the launcher ends them."""
    yield start(part, device)
    stop()


def spawn(arguments: Sequence[str], count: int, *, program: Sequence[str] = ("-m", "herd")) -> int:
    """Run `python -m herd ARGUMENTS` as `count` ranks on this machine; returns the exit status of the first that failed, or 0.

    Rank 0 speaks; of another that dies, the last lines are shown. Signals are passed on to all.
    """
    ranks = [
        _Rank([sys.executable, *program, *arguments], rank, count, port)
        for port in [_free_port()]
        for rank in range(count)
    ]
    before = {name: signal.getsignal(getattr(signal, name)) for name in _PASSED_ON if hasattr(signal, name)}
    for name in before:
        signal.signal(getattr(signal, name), lambda number, _: [rank.tell(number) for rank in ranks])
    try:
        return _watch(ranks)
    finally:
        for rank in ranks:
            rank.end()
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _watch(ranks: Sequence[_Rank]) -> int:
    """Wait until all have ended, or one has failed and the others had their time."""
    first: _Rank | None = None
    deadline = float("inf")
    while any(rank.status is None for rank in ranks) and time.monotonic() < deadline:
        failed = next((rank for rank in ranks if rank.status not in (None, 0)), None)
        if failed is not None and first is None:
            first, deadline = failed, time.monotonic() + GRACE
        time.sleep(0.05)
    first = first or next((rank for rank in ranks if rank.status not in (None, 0)), None)
    if first is None:
        return 0
    status = first.status or 0
    if first.number:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        print(f"herd: rank {first.number} {how}; the run is over. Its last lines:", file=sys.stderr)
        sys.stderr.writelines(first.lines())
    elif status < 0:
        print(f"herd: rank 0 was killed by signal {-status}; the run is over", file=sys.stderr)
    return status if status > 0 else 128 - status


class _Rank:
    """One process of a run on this machine."""

    def __init__(self, command: Sequence[str], number: int, count: int, port: int) -> None:
        self.number = number
        names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environ = {**os.environ, **{name: str(value) for name, value in names.items()}}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        quiet = subprocess.PIPE if number else None
        environ[_LEASH] = "1"
        # A session of its own: Ctrl-C reaches the ranks once, from here.
        self._process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=quiet,
            stderr=subprocess.STDOUT if number else None,
            start_new_session=True,
        )
        self._said: deque[str] = deque(maxlen=TOLD)
        self._reader: Thread | None = None
        if self._process.stdout is not None:
            self._reader = Thread(target=self._read, args=(self._process.stdout,), daemon=True)
            self._reader.start()

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def lines(self) -> list[str]:
        if self._reader is not None:
            self._reader.join(2)
        return list(self._said)

    def tell(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def end(self) -> None:
        if self.status is None:
            self._process.terminate()
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._said.append(line.decode(errors="replace"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _whole(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(
            f"{name} is {value!r} in the environment, which is no whole number: what launched this?"
        ) from None


def _check() -> None:
    """Raise ConfigError unless the launcher said all that a rank must know."""
    if missing := [name for name in _NAMES if not os.environ.get(name)]:
        raise ConfigError(
            f"RANK is set, so this is one rank of several, but {', '.join(missing)} {'are' if missing[1:] else 'is'} not: a "
            f"launcher sets {', '.join(_NAMES)} (torchrun does, and herd train --nproc N); without RANK it is one process"
        )
    rank, world = (_whole(name, os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    _whole("MASTER_PORT", os.environ["MASTER_PORT"])
    if not 0 <= rank < world:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {world}: ranks count from 0 to WORLD_SIZE - 1")


def _of_slurm() -> None:
    """Say in torchrun's words what srun says in its own; MASTER_ADDR and MASTER_PORT come from the launch file."""
    if "RANK" in os.environ:
        return
    for name, theirs in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if theirs not in os.environ:
            raise ConfigError(f"SLURM_PROCID is set, but {theirs} is not: start the ranks with srun")
        os.environ[name] = os.environ[theirs]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"{name} is not set: the ranks do not know where to meet (herd plan train --slurm writes a file that says so)"
            )
