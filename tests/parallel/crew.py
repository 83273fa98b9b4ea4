"""Processes that stay, started when they are needed: a case runs on the first n of them in a gloo group of its own; torch is
imported once for all."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

PATIENCE = 1800  # seconds for one case: a neighbour may pause the whole machine

SHARED = 4
"""Ranks of cases that follow each other in the same processes. Of larger meshes DTensor remembers groups by names that another
case gave to others, or to none."""


class Crew:
    """`run("module:function", n, *args)` calls function(*args) on n ranks and returns what each gave."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.parallel.preload"])
        self.folder = tempfile.TemporaryDirectory()
        self.cases = 0
        self.ends: list[Connection] = []
        self.processes: list[Any] = []

    def grow(self, ranks: int) -> None:
        for rank in range(len(self.ends), ranks):
            here, there = self.context.Pipe()
            process = self.context.Process(target=_work, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, what: str, ranks: int, *args: Any) -> list[Any]:
        if ranks > SHARED:
            self.end()
        self.grow(ranks)
        self.cases += 1
        store = os.path.join(self.folder.name, f"store-{self.cases}")
        for end in self.ends[:ranks]:
            end.send((what, ranks, store, args))
        found = []
        for rank, end in enumerate(self.ends[:ranks]):
            if not end.poll(PATIENCE):
                raise TimeoutError(f"{what} on {ranks} ranks: rank {rank} does not answer")
            found.append(end.recv())
        for rank, (fine, value) in enumerate(found):
            if not fine:
                raise AssertionError(f"rank {rank} of {what}:\n{value}")
        return [value for _, value in found]

    def end(self) -> None:
        for process in self.processes:
            process.kill()  # they hold nothing that outlives them
            process.join()
        self.ends, self.processes = [], []

    def close(self) -> None:
        self.end()
        self.folder.cleanup()


@contextlib.contextmanager
def crew() -> Iterator[Crew]:
    made = Crew()
    try:
        yield made
    finally:
        made.close()


def _work(rank: int, end: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (asked := end.recv()) is not None:
        what, ranks, store, args = asked
        try:
            # A case that ends badly on one rank leaves the others waiting: they give up soon.
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=PATIENCE // 2),
            )
            module, name = what.split(":")
            value = getattr(importlib.import_module(module), name)(*args)
            end.send((True, value))
        except BaseException:
            end.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
