"""`herd serve --tensor-parallel-size 2`: a request, what is refused, a rank that is killed, and the end of everybody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

SOON = 90.0
"""Seconds to start torch twice, or to notice an end, on a machine that others use, too."""


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def below(pid: int) -> list[int]:
    """Process ids of the followers below the server `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            said = (path / "cmdline").read_bytes().decode()
            above = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if "herd.engine.follower" in said and above == pid:
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_a_server_over_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "herd", "serve", "nano", "--port", "0", "--tensor-parallel-size", "2"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log, stdout=log) as server:
        try:
            said = lambda: (tmp_path / "log").read_text()  # noqa: E731
            until(lambda: "herd serves at" in said(), "the server does not start")
            url = said().partition("herd serves at ")[2].split()[0]
            ask = {"model": "nano", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
            with httpx.Client(base_url=url, timeout=SOON) as http:
                first = http.post("/v1/completions", json=ask)
                assert first.status_code == 200, first.text
                assert http.post("/v1/completions", json=ask).json()["choices"][0]["text"]
                refused = http.post("/v1/embeddings", json={"model": "nano", "input": "a"})
                assert refused.status_code == 400, refused.text
                assert "tensor_parallel" in refused.json()["error"]["message"]
                (before,) = below(server.pid)
                os.kill(before, signal.SIGKILL)
                until(lambda: "rank 1 was killed by SIGKILL" in said(), "the log says nothing")
                again = http.post("/v1/completions", json=ask)  # the model is started anew
                assert again.json()["choices"][0]["text"] == first.json()["choices"][0]["text"]
                (after,) = below(server.pid)
                assert after != before
            server.send_signal(signal.SIGTERM)
            assert server.wait(SOON) == 0
            until(lambda: not Path(f"/proc/{after}").exists(), "a follower outlives the server")
        finally:
            server.kill()
