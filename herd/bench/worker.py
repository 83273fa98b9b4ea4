"""One player in a process of its own: requests as JSON lines on stdin, answers on the stdout it had at first.

    python -m herd.bench.worker PLAYER SETUP

A program that spins its threads, or prints what it likes, then disturbs nobody but itself. Each answer says what other programs
took of the machine meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from herd.bench.machine import Pulse
from herd.bench.players.base import Setup

__all__ = ["PLAYERS", "main"]

PLAYERS = {
    "herd": "herd.bench.players.own",
    "llama.cpp": "herd.bench.players.llama_cpp",
    "transformers": "herd.bench.players.transformers",
    "limits": "herd.bench.players.limits",
}


def main() -> None:
    """Serve until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the player prints goes to stderr

    def say(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    try:
        player = import_module(PLAYERS[sys.argv[1]]).open_player(Setup(**json.loads(sys.argv[2])))
        say({"ready": player.facts()})
        for line in sys.stdin:
            request = json.loads(line)
            say(answer(player, request.pop("do"), request))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


def answer(player: Any, verb: str, given: dict[str, Any]) -> dict[str, Any]:
    """Do one request: {"value", "seconds", "cpu_seconds", "others", "resident", "peak"}; seconds by the clock around it,
    and of all threads together."""
    file = given.pop("file", None)
    pulse, began, used = Pulse(), time.perf_counter(), time.process_time()
    value = getattr(player, verb)(**given)
    seconds, cpu, others = time.perf_counter() - began, time.process_time() - used, pulse.stop()
    if file is not None:
        value.astype("<f4").tofile(file)
        value = None
    return {"value": value, "seconds": seconds, "cpu_seconds": cpu, "others": others, **memory()}


def memory() -> dict[str, int]:
    """Bytes of this process in memory now, pages of mapped files included, and at most so far (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    words = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"resident": int(words["VmRSS"]) * 1024, "peak": int(words["VmHWM"]) * 1024}


if __name__ == "__main__":
    main()
