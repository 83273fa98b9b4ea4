"""A server of herd's own, in a process that lives as long as the measuring."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType

from herd.bench.load.client import Target, get_json
from herd.errors import BenchError

__all__ = ["OwnServer"]

START_SECONDS = 600.0


class OwnServer:
    """`herd serve MODEL` on a free port of this machine; `target` answers when the `with` block begins.

    Raises BenchError with the server's last words when it does not start.
    """

    def __init__(self, model: str, options: Sequence[str] = ()) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "herd", "serve", f"bench={model}", "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            self.target = Target(self._address())
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the server."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(15)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._log.close()

    def _address(self) -> str:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            found = re.search(r"herd serves at (http://\S+)", self._said())
            if found is not None:
                return found[1]
            self._check()
            time.sleep(0.05)
        raise BenchError("herd's server does not start")

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            self._check()
            try:
                status, _ = asyncio.run(get_json(self.target, "/health"))
            except (OSError, ValueError, TimeoutError):
                status = 0
            if status == 200:
                return
            time.sleep(0.2)
        raise BenchError(f"herd's server has not loaded the model in {START_SECONDS:g} s")

    def _check(self) -> None:
        if self._child.poll() is not None:
            lines = [line for line in self._said().splitlines() if line.strip()] or [f"status {self._child.returncode}"]
            why = next((line for line in reversed(lines) if line.startswith("herd: ")), lines[-1])
            raise BenchError(f"herd's server ended: {why.removeprefix('herd: ')[:300]}")

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def __enter__(self) -> OwnServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
