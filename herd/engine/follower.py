"""A process of `herd.engine.ranks` that is not rank 0: `python -m herd.engine.follower FD`, a socket that its parent made.

It does what it is told, in that order, and ends when the socket closes, whatever it is doing.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import traceback
import warnings
from datetime import timedelta
from typing import Any

import torch

from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.checkpoint.part import PartStore
from herd.checkpoint.placement import dtype_named
from herd.engine.budget import free_on
from herd.engine.config import EngineConfig
from herd.engine.paged import PagedCache
from herd.engine.ranks import device_of
from herd.engine.rankwire import Wire, batch_of, pairs_of
from herd.engine.runner import Runner
from herd.engine.runners import fastest_runner
from herd.errors import HerdError
from herd.model.llama import Llama
from herd.parallel.infer import Exchange, wired
from herd.parallel.part import Part

__all__ = ["Follower", "main"]


class Follower:
    """One rank's part of a model, its keys and values, and what it was told to do with them."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._device = torch.device("cpu")
        self._exchange: Exchange | None = None
        self._model: Llama | None = None
        self._runner: Runner | None = None
        self._cache: PagedCache | None = None

    def take(self, kind: bytes, what: Any) -> None:
        """Do what one frame says."""
        if kind == b"S":
            assert self._runner is not None
            assert self._cache is not None
            self._runner.logits(batch_of(what, self._device), self._cache)
        elif kind == b"C":
            assert self._cache is not None
            self._cache.copy(pairs_of(what))
        else:
            do = {"join": self._join, "load": self._load, "runner": self._make_runner, "cache": self._make_cache}
            do[what.pop("do")](**what)

    def _join(self, path: str, rank: int, ranks: int, device: str, patience: float) -> None:
        self._device = device_of(torch.device(device), rank, ranks)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._exchange = Exchange(path, rank, ranks, self._device, timedelta(seconds=patience))
        self._wire.tell(joined=True)

    def _load(self, path: str, dtype: str | None, weights: str, threads: int) -> None:
        assert self._exchange is not None
        torch.set_num_threads(threads)
        self._model = self._runner = self._cache = None
        store = open_store(path)
        part = Part(store.config, self._exchange.rank, self._exchange.size)
        model = fill(PartStore(store, part), dtype_named(dtype), self._device, weights=weights)
        self._model = wired(model, part, self._exchange)
        self._wire.tell(free=free_on(self._device))

    def _make_runner(self, config: dict[str, Any]) -> None:
        assert self._model is not None
        self._runner = fastest_runner(self._model, EngineConfig(**config))

    def _make_cache(self, blocks: int, block_size: int, dtype: str, spare: bool) -> None:
        assert self._model is not None
        before, kind = self._cache, getattr(torch, dtype)
        made = PagedCache(
            self._model.config, blocks=blocks, block_size=block_size, dtype=kind, device=self._device, spare=spare
        )
        if before is not None and (before.block_size, before.dtype) == (block_size, kind):
            for to, source in zip(made.tensors, before.tensors, strict=True):  # a session's cache that grows
                kept = min(before.blocks, blocks)
                to[:kept] = source[:kept]
        self._cache = made


def main() -> None:
    """Follow the socket whose number is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # rank 0 says the same
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    inbox: queue.SimpleQueue[tuple[bytes, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(wire, inbox), name="herd-listen", daemon=True).start()
    try:
        follower = Follower(wire)
        wire.tell(here=True)
        while True:
            follower.take(*inbox.get())
    except BaseException as error:
        if not isinstance(error, HerdError):
            sys.stderr.write("".join(traceback.format_tb(error.__traceback__)) + f"{type(error).__name__}\n")
        said = str(error) if isinstance(error, HerdError) else f"{type(error).__name__}: {error}"
        try:
            wire.tell(failed=type(error).__name__, why=said[:2000])
        except OSError:
            os._exit(0)
        os._exit(1)


def _listen(wire: Wire, inbox: queue.SimpleQueue[tuple[bytes, Any]]) -> None:
    """Rank 0 is heard in a thread of its own, so that its end is seen in the middle of a step, too."""
    while (frame := wire.receive()) is not None:
        inbox.put(frame)
    os._exit(0)


if __name__ == "__main__":
    main()
