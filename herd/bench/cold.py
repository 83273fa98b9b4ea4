"""Cold start: from the start of a process to its first token, with the file in the page cache."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from herd.bench.contest import QUIET, Plan, described, files_of, weight_bytes
from herd.bench.machine import Pulse, load_average, machine
from herd.bench.players.base import Setup
from herd.bench.process import check_peers
from herd.bench.subject import prompts
from herd.bench.table import WIDTH, headline
from herd.errors import BenchError

__all__ = ["cold_start", "cold_table"]

Say = Callable[[str, int, int], None]


def cold_start(plan: Plan, say: Say = lambda what, done, total: None) -> dict[str, Any]:
    """{"machine", "plan", "rows"}: seconds of whole processes by the clock outside of them, and of their parts.

    Each player runs once before, so that its file is in the page cache (and herd has made what it keeps beside it). Raises
    ConfigError and BenchError as `contest` does.
    """
    check_peers(list(plan.peers))
    rows: list[dict[str, Any]] = []
    (prompt,) = prompts(plan.subject.config, plan.prompt)
    about = machine()
    for kind in plan.kinds:
        files = files_of(plan, kind, say)
        found: list[list[dict[str, Any]]] = [[] for _ in files]
        for turn in range(plan.runs + 1):
            for (player, label, path), samples in zip(files, found, strict=True):
                say(f"cold start: {player} {label}", turn, plan.runs + 1)
                taken = [_once(player, path, plan.threads, prompt)]
                while turn and len(taken) < plan.tries and (taken[-1]["others"] or 0) > QUIET:
                    taken.append(_once(player, path, plan.threads, prompt))
                if turn:
                    samples.append(min(taken, key=lambda sample: sample["others"] or 0))
        own = statistics.median(sample["seconds"] for sample in found[0])
        for (player, label, path), samples in zip(files, found, strict=True):
            rows.append(_row(player, label, path, samples, own))
    about["load_after"] = load_average()
    return {"machine": about, "plan": described(plan), "rows": rows}


def cold_table(report: dict[str, Any]) -> str:
    """The report for people, in 80 columns."""
    plan = report["plan"]
    what = (
        f"{plan['model']}: process start to first token after a prompt of {plan['prompt']} tokens, files in the page cache; "
        f"{plan['threads']} threads, medians of {plan['runs']} runs, in turn"
    )
    lines = [f"{'':<13}{'weights':<8}{'seconds':>9}{'min':>7}{'max':>7}{'imports':>9}{'load':>7}{'prompt':>8}{'GB':>7}"]
    for row in report["rows"]:
        parts = row["parts"]
        lines.append(
            f"{row['who']:<13}{row['weights']:<8}{row['seconds']:>9.2f}{row['min']:>7.2f}{row['max']:>7.2f}"
            f"{parts['imports']:>9.2f}{parts['load']:>7.2f}{parts['prompt']:>8.2f}{row['weight_bytes'] / 1e9:>7.2f}"
        )
    busy = max((row["others"] or 0.0 for row in report["rows"]), default=0.0)
    if busy > QUIET:
        lines.append("")
        lines.append(f"Other programs took up to {busy:.0%} of the cores: not the figures of a quiet machine.")
        used = (f"{row['who']} {row['weights']} {row['cpu_seconds']:.2f}" for row in report["rows"])
        lines.append(f"CPU seconds, the end of the process included: {'; '.join(used)}.")
    return "\n\n".join([headline(report["machine"]), textwrap.fill(what, WIDTH), "\n".join(lines)])


def _once(player: str, path: Path, threads: int, prompt: list[int]) -> dict[str, Any]:
    setup = json.dumps(asdict(Setup(str(path), threads, 1, len(prompt) + 2)))
    count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with tempfile.TemporaryFile() as log:
        used = os.times()
        pulse, began = Pulse(), time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "herd.bench.first", player, setup, json.dumps(prompt)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | count,
        ) as child:
            assert child.stdout is not None
            line = next((line for line in child.stdout if line.startswith("first token ")), "")
            seconds = time.perf_counter() - began
            child.stdout.close()
            status = child.wait()
        now = os.times()
        own = (now.children_user + now.children_system) - (used.children_user + used.children_system)
        others = pulse.stop(own)
        if not line:
            log.seek(0)
            words = [text for text in log.read().decode(errors="replace").splitlines() if text.strip()]
            raise BenchError(
                f"{player} gave no first token (status {status})" + (f": {words[-1][:300]}" if words else "")
            )
    return {
        "seconds": seconds,
        "cpu_seconds": own,
        "others": others,
        "parts": json.loads(line.removeprefix("first token ")),
    }


def _row(player: str, label: str, path: Path, samples: list[dict[str, Any]], own: float) -> dict[str, Any]:
    seconds = [sample["seconds"] for sample in samples]
    middle = statistics.median(seconds)
    parts = {name: statistics.median(s["parts"][name] for s in samples) for name in samples[0]["parts"]}
    return {
        "task": "cold-start",
        "who": player,
        "weights": label,
        "seconds": round(middle, 3),
        "min": round(min(seconds), 3),
        "max": round(max(seconds), 3),
        "cpu_seconds": round(statistics.median(sample["cpu_seconds"] for sample in samples), 3),
        "parts": {name: round(value, 3) for name, value in parts.items()},
        "others": max((s["others"] for s in samples if s["others"] is not None), default=None),
        "weight_bytes": weight_bytes(path),
        "times": None if player == "herd" else round(middle / own, 2),
        "samples": samples,
    }
