"""What can be known to fail before anything is loaded: no such data, targets that no model has, what this machine cannot do.

A run says all of it, too, but some minutes later; a dry run would never.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from herd.adapters.apply import TARGETS
from herd.data.adapt import kind_of
from herd.data.files import find_files
from herd.errors import ConfigError, DataError
from herd.train.config import RunConfig
from herd.train.float8 import supported
from herd.train.qat import INT8_INT4, mix_of
from herd.train.start import device_of

__all__ = ["check", "lacking"]

LOOKED_AT = 8
"""Files of each source whose first rows are read; a run reads them all."""

ELSEWHERE = {
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
    "output_proj": "wo", "embed_tokens": "tok_embeddings", "lm_head": "output", "all-linear": "wq, wk, wv, wo, w1, w2, w3",
}  # fmt: skip
"""Matrices as PEFT and torchtune call them."""


def check(config: RunConfig) -> list[str]:
    """A line for each source: how many files, and what their rows are. Raises ConfigError or DataError."""
    method = config.method
    if method.kind in ("lora", "dora", "qlora"):
        for target in method.targets or ():
            _check_target(target)
    if method.qat is not None and method.qat.lower() != INT8_INT4:
        mix_of(method.qat)
    if config.data.held_out is not None and config.data.held_out_share is None:
        find_files(config.data.held_out)
    return [_source(Path(part.path), part.kind) for part in config.data.sources]


def lacking(config: RunConfig, world: int) -> Iterator[str]:
    """Why `world` processes on this machine cannot be this run, though others might."""
    try:
        device = device_of(config.device)
        if config.train.precision == "float8" and not supported(device):
            yield f"train.precision=float8: {device} cannot multiply float8 (NVIDIA GPUs from compute capability 8.9 on can)"
    except ConfigError as error:
        yield str(error)
    try:
        config.parallel.of_world(world)
    except ConfigError as error:
        yield f"{error} (herd train --nproc N starts N of them)"


def _check_target(target: str) -> None:
    kind = target.removesuffix(".weight").rpartition(".")[2]
    if kind in TARGETS or "experts" in target:
        return
    hint = f"herd calls it {ELSEWHERE[kind]}" if kind in ELSEWHERE else f"choose some of {', '.join(TARGETS)}"
    raise ConfigError(f"method.targets: no matrix is called {target[:80]!r}: {hint}")


def _source(path: Path, kind: str | None) -> str:
    files = find_files(path)
    kinds = {kind} if kind is not None else {kind_of(file): None for file in islice(files, LOOKED_AT)}.keys()
    for found in ("preference", "prompt"):
        if found in kinds:
            raise DataError(f"{path}: {found} rows: no recipe of herd trains on them yet (herd data lint reads them)")
    rows = ", ".join(sorted(found for found in kinds if found is not None)) or "no row that can be read"
    return f"{path}: {len(files):,} {'file' if len(files) == 1 else 'files'}, {rows}"
