"""A smaller copy of a checkpoint, with proof and a report of what it lost (`herd.quantize`)."""

from __future__ import annotations

import math
import os

from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import TensorStore
from herd.convert.adapters import adapter_kind
from herd.convert.driver import convert
from herd.convert.report import Report
from herd.convert.sample import Reading
from herd.convert.verify import Watch, open_side
from herd.errors import ConfigError
from herd.quant.mix import MIXES, mix

__all__ = ["DEFAULT", "SHORT", "TARGETS", "quantize"]

DEFAULT = "q4_k_m"
SHORT = {"int8": "q8_0", "int4": "q4_0"}
"""Names of `weights=` for what GGUF calls otherwise."""
TARGETS = (*SHORT, *(m.name.lower() for m in MIXES.values() if m.quantized))
"""What `to` may be."""

_IN_MEMORY = {
    "fp8": "GGUF has no FP8 type, and herd writes no FP8 folders",
    "w8a8": "that is int8 in a file (activations are rounded while it runs): write int8",
}
LOSSLESS = 16
"""Bits of a value from which on a source counts as the original."""


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str = DEFAULT,
    report: bool = True,
    text: str | os.PathLike[str] | None = None,
    context: int | None = None,
    windows: int | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    requantize: bool = False,
    shards: int | None = None,
    herd_only: bool = False,
    overwrite: bool = False,
    keep_failed: bool = False,
    greedy: int | None = None,
    watch: Watch | None = None,
    command: str = "",
) -> Report:
    """Write checkpoint `src` (any name or path that `resolve` knows) quantized to the GGUF file `dst`, and say what it lost.

    `to` is a mix of llama.cpp (q4_k_m, q8_0, ...), int8 (Q8_0) or int4 (Q4_0). The result passes the proof of `herd.convert`
    before it gets its name: every tensor is what encoding makes of the source. With `report`, `Report.quality` has
    perplexities, KL divergence and the errors of layers and matrices on `text`, a UTF-8 file (default: herd's sample, whose
    figures are for comparison only), in `windows` windows of `context` tokens. The other options are those of `herd.convert`.

    `calibrate` is a file of text (16,384 tokens are read) on which the columns of matrices are weighed: with types below 8 bits
    those that matter are rounded with more care (`herd.convert.importance`). It should be another text than `text`.

    Memory: one layer of either side in float32, besides the states of the text. Raises ConfigError for an unknown `to`, for a
    source that is quantized already (unless `requantize`), and for a text that is too short; else as `herd.convert`.
    """
    quant = named(to)
    path = resolve(src)
    if adapter_kind(path):
        raise ConfigError(f"{path} is a LoRA adapter: only models are quantized")
    if not requantize:
        refuse_lossy(open_side(path).store)
    return convert(
        path,
        dst,
        to="gguf",
        quant=quant,
        shards=shards,
        herd_only=herd_only,
        overwrite=overwrite,
        keep_failed=keep_failed,
        greedy=greedy,
        quality=Reading(text, context, windows) if report else None,
        calibrate=calibrate,
        watch=watch,
        command=command,
    )


def named(to: str) -> str:
    """The mix that `to` means. Raises ConfigError with the choices."""
    key = to.lower()
    if key in _IN_MEMORY:
        raise ConfigError(f"{to} is a form in memory (--weights {key}), not in files: {_IN_MEMORY[key]}")
    if key not in TARGETS and key not in ("q4_k", "q5_k"):
        raise ConfigError(f"nothing is quantized to {to[:40]!r}: choose one of {', '.join(TARGETS)}")
    return mix(SHORT.get(key, key)).name.lower()


def refuse_lossy(store: TensorStore) -> None:
    """Raise ConfigError when matrices of `store` have fewer than 16 bits a value."""
    for name in store.names():
        info = store.info(name)
        if len(info.shape) > 1 and 8 * info.nbytes < LOSSLESS * math.prod(info.shape):
            raise ConfigError(
                f"{store.path} is quantized already ({name} is {info.stored}): rounding what was rounded before loses more than "
                "either alone. Quantize the original, or say --requantize"
            )
