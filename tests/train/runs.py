"""Runs in processes of their own, which can be killed; forked by one that has everything imported (`tests.train.loop.main`)."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class Runs:
    """`run` trains in `world` processes. `errors` has what each of the last run said when it failed."""

    def __init__(self, folder: Path, world: int = 1) -> None:
        self.log, self.saves, self.world = folder / "log", folder / "log.saves", world
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.loop"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )

    def run(
        self,
        out: Path,
        steps: int,
        wait: float | None = None,
        *,
        number: int = signal.SIGKILL,
        to: Sequence[int] | None = None,
        lora: bool = True,
        after: int = 0,
        save: int = 0,
        statuses: set[int] | None = None,
    ) -> list[str]:
        """What a run said. With `wait` signal `number` is sent, to the ranks `to` (all), so many seconds after step `after`, or,
        with `save`, after the beginning of that save of this run.

        `statuses` are the ends that are expected of ranks: zero, or with `wait` also the signal.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.log.unlink(missing_ok=True)
        self.saves.unlink(missing_ok=True)
        self.process.stdin.write(f"{out} {steps} {int(lora)} {self.log} {self.world}\n")
        self.process.stdin.flush()
        children = [int(child) for child in self.process.stdout.readline().split()]
        if wait is not None:
            while after and not (self.log.exists() and len(self.log.read_text().splitlines()) >= after):
                time.sleep(0.01)
            while save and not (begun := self.times()[2 * save - 2 :]) and not _over(children[0]):
                time.sleep(0.001)
            if save and begun:
                wait = max(0.0, begun[0] + wait - time.monotonic())
            time.sleep(wait)
            for rank in range(self.world) if to is None else to:
                os.kill(children[rank], number)
        ends = {int(end) for end in self.process.stdout.readline().split()}
        assert ends <= (statuses or ({0} if wait is None else {0, number})), (ends, self.errors)
        return self.log.read_text().splitlines() if self.log.exists() else []

    def times(self) -> list[float]:
        """When saves of the last run began and ended, in turn."""
        lines = self.saves.read_text().splitlines(keepends=True) if self.saves.exists() else []
        return [float(line) for line in lines if line.endswith("\n")]

    def alone(self) -> Runs:
        """The same for runs of one process."""
        made = copy.copy(self)
        made.world = 1
        return made

    @property
    def errors(self) -> list[str]:
        paths = [self.log.with_name(f"{self.log.name}.errors-{rank}") for rank in range(self.world)]
        return [path.read_text() if path.exists() else "" for path in paths]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _over(child: int) -> bool:
    """Whether a process has ended; the one that started it has not looked yet."""
    try:
        stat = Path(f"/proc/{child}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
