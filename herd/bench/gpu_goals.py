"""What herd is to reach on a GPU, held against what was measured: shares of the device's own limits in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from herd.bench.material import step_bytes
from herd.checkpoint.open import open_store

__all__ = ["eighth_bytes", "goals"]

DECODE = {"BF16": 0.75, "FP8": 0.60, "Q8_0": 0.60, "Q4_0": 0.45}
"""Least share of the measured bandwidth with one sequence."""
PREFILL = 0.65
"""Least share of the measured rate of bfloat16 products."""
BATCH = 0.45
"""Least share of what a batch could reach if bytes and operations came one after the other, each at its limit."""
TRANSFORMERS = 4.0
"""Least speed, in that of transformers, decoding one sequence in bfloat16."""
LONG = 2048
"""Tokens of a prompt from which on its goal holds: shorter ones do not fill the device."""


def goals(rows: Sequence[dict[str, Any]], prompt: int) -> list[dict[str, Any]]:
    """The goals of one contest, `rows` with herd's first: {"what", "least", "found", "met"} each."""
    own, found = rows[0], []
    task, batch = own["task"], own["batch"]

    def goal(what: str, least: float, value: float) -> None:
        found.append({"what": what, "least": least, "found": value, "met": value >= least})

    if task == "prefill":
        if prompt >= LONG:
            goal("share of the matrix products' rate", PREFILL, own["share"])
        return found
    if batch > 1:
        goal("share of the serial roofline", BATCH, own["share"] + own["share_of_compute"])
        return found
    if own["weights"] in DECODE:
        goal("share of the bandwidth", DECODE[own["weights"]], own["share"])
    for row in rows[1:]:
        if row["who"] == "transformers" and own["weights"] == "BF16":
            goal("times transformers", TRANSFORMERS, row["times"])
    return found


def eighth_bytes(path: Path) -> int:
    """Bytes of a step of the bfloat16 checkpoint at `path` when the matrices of its layers are one byte a value (fp8): embedding,
    output, routers and norms stay. The scales, 4 bytes a row, are left out."""
    store = open_store(path)
    config = store.config
    matrices = [
        n for n in store.names() if n.startswith("layers.") and len(store.info(n).shape) > 1 and "router" not in n
    ]
    saved = 0.0
    for name in matrices:
        half = store.info(name).nbytes / 2
        routed = config.moe is not None and ".experts." in name
        saved += half * config.moe.top_k / config.moe.n_experts if routed and config.moe is not None else half
    return step_bytes(path) - int(saved)
