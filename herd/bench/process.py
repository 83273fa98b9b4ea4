"""The other end of `herd.bench.worker`: a player that is asked one thing at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from types import TracebackType
from typing import Any

from herd.bench.players.base import Setup
from herd.errors import BenchError, ConfigError

__all__ = ["NEEDS", "Process", "check_peers"]

NEEDS = {"llama.cpp": ("llama_cpp", "llama-cpp-python"), "transformers": ("transformers", "transformers")}
"""Peer -> the module it lives in and the package that has it."""


def check_peers(names: list[str]) -> None:
    """Raise ConfigError for peers that herd does not know or that are not installed."""
    for name in names:
        if name not in NEEDS:
            raise ConfigError(f"no peer is called {name!r}: choose {' or '.join(NEEDS)}")
        module, package = NEEDS[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{name} is not installed, so it cannot be measured beside herd: pip install {package}")


class Process:
    """`player` in a new process, ready when the constructor returns. Closes with the `with` block."""

    def __init__(self, player: str, setup: Setup) -> None:
        self.player = player
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        count = str(setup.threads)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "herd.bench.worker", player, json.dumps(asdict(setup))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | threads,
        )
        try:
            self.facts: dict[str, Any] = self._answer()["ready"]
        except BaseException:
            self.close()
            raise

    def ask(self, verb: str, **given: Any) -> dict[str, Any]:
        """What `herd.bench.worker.answer` gives. Raises BenchError with the player's last words when it fails."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"do": verb, **given}) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def close(self) -> None:
        """End the process."""
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise BenchError(f"{self.player} could not be measured: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        status = self._child.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its process ended with status {status}" + (f": {lines[-1][:300]}" if lines else "")

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
