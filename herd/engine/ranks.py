"""A model over several processes of one machine: rank 0 has the scheduler, the sampler and its part, the others follow.

    with Ranks(2) as ranks:
        model = ranks.load(path, store)                  # this rank's part, wired to the others
        engine = Engine(model, config, runner=ranks.runner(model, config))

A follower (`herd.engine.follower`) is told each step over a socket of its own and runs the same rows over the keys and values of
its own heads; the sums between ranks go through `herd.parallel.infer.Exchange`. A rank that dies, or fails, ends the model: what
runs gets a RanksError that says which one and how, and all others are ended. When rank 0 goes, however it goes, its sockets close
and the followers end.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

import herd.errors
from herd.checkpoint.fill import fill
from herd.checkpoint.part import PartStore
from herd.checkpoint.store import TensorStore
from herd.engine.config import SMALL, EngineConfig
from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache
from herd.engine.rankwire import Wire, step_of
from herd.engine.runner import Runner
from herd.engine.runners import fastest_runner
from herd.errors import ConfigError, HerdError, RanksError
from herd.model.accounting import parameters
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.parallel.infer import Exchange, wired
from herd.parallel.part import Part

__all__ = ["PATIENCE", "Ranks", "RanksCache", "RanksRunner", "device_of"]

PATIENCE = timedelta(minutes=5)
"""How long a rank waits for another in the middle of a step. All have the same work: one that is so late hangs."""
STARTING = 120.0
"""Seconds that a process gets to begin."""
LOADING = 3600.0
"""Seconds that the others get to read their parts when this rank has read its own."""
ENDING = 5.0
"""Seconds that a follower gets to end by itself."""


class Ranks:
    """`count` processes with this one, which is rank 0. `device` is "cpu" (gloo, cores divided) or "cuda" (a GPU each).

    Raises ConfigError when there are not so many GPUs, RanksError when a process does not start.
    """

    def __init__(self, count: int, device: torch.device | str = "cpu", *, patience: timedelta = PATIENCE) -> None:
        if count < 2:
            raise ConfigError(f"tensor_parallel is {count}: ranks that share a model are at least 2")
        self.count, self.device = count, device_of(torch.device(device), 0, count)
        self.lost: str | None = None
        """Why nothing can be computed any more."""
        self.free: int | None = None
        """Bytes free on the device of the follower that has least."""
        self.whole: ModelConfig | None = None
        """The geometry of all parts together."""
        self._model: Llama | None = None
        self._patience = patience
        self._exchange: Exchange | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._threads = torch.get_num_threads()
        self._share = max(1, self._threads // count)
        self._followers: list[_Follower] = []
        try:
            for rank in range(1, count):
                self._followers.append(_Follower(rank, self._share, self._lose))
            self._answers(STARTING)
            self._meet()
        except BaseException:
            self.close()
            raise

    def load(
        self,
        path: str | os.PathLike[str],
        store: TensorStore,
        dtype: torch.dtype | None = None,
        *,
        weights: str = "auto",
        tick: Callable[[int, int], None] | None = None,
    ) -> Llama:
        """This rank's part of the checkpoint at `path`, opened as `store`, ready to run with the others, which read theirs
        meanwhile. Its config has the whole vocabulary and this rank's heads.

        Raises what `fill` raises, ConfigError with the counts for what so many ranks cannot share, RanksError.
        """
        part = Part(store.config, 0, self.count)
        self.whole = store.config
        if self.device.type == "cpu":
            small = parameters(store.config) <= SMALL and "OMP_NUM_THREADS" not in os.environ
            torch.set_num_threads(1 if small else self._share)
        named = None if dtype is None else str(dtype).removeprefix("torch.")
        self.tell(do="load", path=os.fspath(path), dtype=named, weights=weights, threads=torch.get_num_threads())
        model = fill(PartStore(store, part), dtype, self.device, weights=weights, tick=tick)
        free = [answer["free"] for answer in self._answers(LOADING)]
        self.free = None if None in free else min(free)
        assert self._exchange is not None
        self._model = wired(model, part, self._exchange)
        return self._model

    def filled(self, store: TensorStore, dtype: torch.dtype | None, device: object, **options: Any) -> Llama:
        """As `herd.checkpoint.fill.fill`: what `load` gives."""
        return self.load(store.path, store, dtype, **options)

    def runner(self, model: Llama, config: EngineConfig) -> RanksRunner:
        """What computes the steps of `model`, on all ranks, as `config` says."""
        self.tell(do="runner", config=asdict(config))
        return RanksRunner(self, fastest_runner(model, config))

    def session(self, max_len: int) -> RanksRunner:
        """What computes the one stream of a chat with what was loaded last (`herd.engine.paged_session`)."""
        assert self._model is not None, "nothing is loaded"
        return self.runner(
            self._model, EngineConfig(blocks=-(-max_len // 16), max_len=max_len, max_seqs=1, graphs=False)
        )

    def free_each(self, own: int | None) -> int | None:
        """Bytes that each rank may take for keys and values, of the `own` that are free here: on a CPU all share them."""
        if self.device.type == "cpu":
            return None if own is None else own // self.count
        return None if own is None or self.free is None else min(own, self.free)

    def tell(self, **what: Any) -> None:
        """Send every follower an object. Raises RanksError."""
        self._each(lambda wire: wire.tell(**what))

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send every follower a frame. Raises RanksError."""
        self._each(lambda wire: wire.send(kind, payload))

    def failed(self, error: BaseException) -> RanksError:
        """A step that this rank could not end: the others are somewhere in the middle of it. What is to be raised."""
        # A follower that died is why this rank waits in vain: who watches it says so in a moment.
        for follower in self._followers:
            follower.gone.wait(1.0 if isinstance(error, RuntimeError) else 0.0)
            if self.lost is not None:
                break
        self._lose(f"a step failed on rank 0 of {self.count} ({type(error).__name__}: {str(error)[:200]})")
        return self._error()

    def check(self) -> None:
        """Raises RanksError when a rank is gone."""
        if self.lost is not None:
            raise self._error()

    def close(self) -> None:
        """End all other processes. Calling it again does nothing."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self.lost = self.lost or "the model has been closed"
        for follower in self._followers:
            follower.wire.close()
        for follower in self._followers:
            follower.end(ENDING)
        if self.device.type == "cpu":
            torch.set_num_threads(self._threads)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the followers."""
        return [follower.process.pid for follower in self._followers]

    def _meet(self) -> None:
        with tempfile.TemporaryDirectory(prefix="herd-ranks-") as folder:  # readable for this user alone
            path = os.path.join(folder, "meet")
            kind = self.device.type
            seconds = self._patience.total_seconds()
            for follower in self._followers:
                follower.wire.tell(
                    do="join", path=path, rank=follower.rank, ranks=self.count, device=kind, patience=seconds
                )
            try:
                self._exchange = Exchange(path, 0, self.count, self.device, self._patience)
            except RuntimeError as error:
                raise self.failed(error) from error
            self._answers(STARTING)

    def _each(self, do: Callable[[Wire], None]) -> None:
        self.check()
        for follower in self._followers:
            try:
                do(follower.wire)
            except OSError as error:
                follower.gone.wait(2.0)
                self._lose(f"rank {follower.rank} of {self.count} does not listen ({error})")
                raise self._error() from error

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        """What every follower answers. Raises its HerdError, or RanksError."""
        found = []
        for follower in self._followers:
            try:
                said = follower.answers.get(timeout=seconds)
            except queue.Empty:
                self._lose(f"rank {follower.rank} of {self.count} does not answer within {seconds:g} s")
                said = None
            if said is None:
                raise self._error()
            if "failed" in said:
                raise _named(said["failed"], said["why"])
            found.append(said)
        return found

    def _lose(self, why: str) -> None:
        """Nothing can be computed any more; the other processes are ended, so that nobody waits for them."""
        with self._lock:
            if self._closing or self.lost is not None:
                return
            self.lost = why
        for follower in self._followers:
            follower.kill()

    def _error(self) -> RanksError:
        return RanksError(f"{self.lost}: the model is gone with it, open it again")


class RanksRunner:
    """A Runner whose rows all ranks compute: rank 0's `own` gives the logits. Its caches have a part on every rank, see `cache`.

    A step that fails on one rank is not tried again: RanksError.
    """

    def __init__(self, ranks: Ranks, own: Runner) -> None:
        self.ranks, self.own = ranks, own

    def cache(self, config: ModelConfig, **options: Any) -> RanksCache:
        """A PagedCache on every rank. The last one made is the one that is used; it begins with what the one before held."""
        return RanksCache(self.ranks, config, **options)

    @torch.inference_mode()
    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """See `Runner.logits`. Raises ConfigError for adapters, RanksError."""
        if batch.adapters is not None:
            raise ConfigError("a model over several ranks has no adapters: merge the adapter (herd merge)")
        self.ranks.send(b"S", step_of(batch))
        try:
            return self.own.logits(batch, cache)
        except Exception as error:
            raise self.ranks.failed(error) from error


class RanksCache(PagedCache):
    """Rank 0's part of a cache; the followers' is made, and its blocks copied, with it."""

    def __init__(self, ranks: Ranks, config: ModelConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._ranks = ranks
        dtype = str(self.dtype).removeprefix("torch.")
        spare = self.scratch is not None
        ranks.tell(do="cache", blocks=self.blocks, block_size=self.block_size, dtype=dtype, spare=spare)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """As `PagedCache.copy`, on all ranks."""
        if pairs:
            self._ranks.send(b"C", array("q", [block for pair in pairs for block in pair]).tobytes())
            super().copy(pairs)


class _Follower:
    """One other process, and the thread that hears it."""

    def __init__(self, rank: int, threads: int, lose: Callable[[str], None]) -> None:
        self.rank, self._lose = rank, lose
        self.answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.gone = threading.Event()
        ours, theirs = socket.socketpair()
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "herd.engine.follower", str(theirs.fileno())],
                env=environ,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what it may print is no part of an answer
                start_new_session=True,  # Ctrl-C is for rank 0
            )
        except OSError as error:
            ours.close()
            raise RanksError(f"no process can be started for rank {rank}: {error}") from error
        finally:
            theirs.close()
        self.wire = Wire(ours)
        self._thread = threading.Thread(target=self._hear, name=f"herd-rank-{rank}", daemon=True)
        self._thread.start()

    def _hear(self) -> None:
        said: dict[str, Any] = {}
        while (frame := self.wire.receive()) is not None:
            said = frame[1]
            self.answers.put(said)
        self.wire.deaf()
        try:
            status: int | None = self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            status = None
        how = f"failed ({said['failed']}: {said['why']})" if "failed" in said else _ending(status)
        self._lose(f"rank {self.rank} {how}")
        self.gone.set()
        self.answers.put(None)

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()

    def end(self, seconds: float) -> None:
        """Wait for its end, which its closed socket has told it; kill it when that takes too long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self._thread.join(seconds)


def device_of(device: torch.device, rank: int, ranks: int) -> torch.device:
    """Where rank `rank` computes. Raises ConfigError when `device` cannot have so many."""
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ConfigError(f"{ranks} ranks run on device 'cpu' or 'cuda' (the first {ranks} GPUs), not on '{device}'")
    here = torch.cuda.device_count()
    if here < ranks:
        raise ConfigError(f"{ranks} ranks need {ranks} GPUs, and there are {here}: use device='cpu', or fewer ranks")
    return torch.device("cuda", rank)


def _ending(status: int | None) -> str:
    if status is None:
        return "has closed its connection"
    if status < 0:
        known = [one.value for one in signal.Signals]
        return f"was killed by {signal.Signals(-status).name if -status in known else f'signal {-status}'}"
    return f"has ended with status {status}"


def _named(kind: str, why: str) -> HerdError:
    """A follower's error as if it were one's own."""
    found = getattr(herd.errors, kind, None)
    plain = isinstance(found, type) and issubclass(found, HerdError) and kind in ("ConfigError", "CheckpointError")
    return found(why) if plain and found is not None else RanksError(why)
