"""An adapter added into its base, for good: `herd.merge`.

The sum is made in float32 and rounded once to the types that the base has; quantized matrices are decoded, changed and encoded
again. What is written passes the proof of `herd.convert` (every tensor is just what rounding makes of the exact sum), and the
drift check says what that rounding cost: KL divergence from the base with the adapter beside it, and how large the errors are
against the changes themselves. Too large a drift is refused.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from herd.checkpoint.placement import dtype_named
from herd.checkpoint.resolve import resolve
from herd.checkpoint.vocabulary import MissingTokenizer
from herd.checkpoint.write.atomic import check_destination
from herd.convert.adapters import adapter_kind, open_adapter
from herd.convert.driver import (
    Job,
    Options,
    Target,
    changes,
    check_options,
    likely_size,
    perform,
    source_of,
    write_as,
)
from herd.convert.merged import MergedStore
from herd.convert.report import Check, Report
from herd.convert.sample import Reading
from herd.convert.threads import threads_for
from herd.convert.verify import Opened, Watch, compare, open_side
from herd.convert.weights import rows_of
from herd.errors import CheckpointError, ConfigError

__all__ = ["MAX_DRIFT", "merge"]

MAX_DRIFT = 0.02
"""Nats of mean KL divergence from the exact sum, from which on a result is refused. An adapter of rank 8 merged into the model
that ships with herd: 0.0002 with Q8_0, 0.02 with Q4_K_M, 0.028 with Q4_0, where rounding is as large as the change itself."""

_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: Target | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    reading: Reading | None = None,
    max_drift: float = MAX_DRIFT,
    force: bool = False,
    overwrite: bool = False,
    keep_failed: bool = False,
    greedy: int = 4,
    watch: Watch | None = None,
    command: str = "",
) -> Report:
    """Write model `base` with the LoRA or DoRA `adapter` (a PEFT folder or a GGUF file) merged in to `dst`, with proof.

    `to` is the format (default: the base's own). Every tensor keeps the type it has in the base, unless `dtype` (f32, f16, bf16)
    or `quant` (GGUF) names another for all; with `quant` the drift is that of quantizing, and only reported. What another tool
    quantized (GPTQ, NF4, ...) becomes 16 bits wide. `reading` is the text on which the drift is measured (default: herd's
    sample). A mean KL divergence above `max_drift` nats fails the report, and so does a drift that cannot be measured after
    quantization; `force` lets both pass, and the report says so.

    Raises a HerdError: an adapter that does not fit, is no LoRA or DoRA, types that herd cannot write.
    """
    if not (math.isfinite(max_drift) and max_drift >= 0):
        raise ConfigError(f"a drift of at most {max_drift} nats: give a number of at least 0")
    path, place = resolve(base), Path(dst).expanduser()
    if adapter_kind(path):
        raise ConfigError(f"{path} is an adapter: the first name is the base model, the second the adapter")
    tuned = Path(adapter).expanduser()
    if not tuned.exists():
        raise CheckpointError(
            "there is no such adapter: expected a folder with adapter_config.json or a GGUF file", path=tuned
        )
    found = open_adapter(tuned, path).adapter
    a = open_side(path)
    target: Target = a.store.kind if to is None else to  # type: ignore[assignment] (it is one of three)
    if target == "peft":
        raise ConfigError("--to peft is for adapters, and merging makes a model: choose meta, hf or gguf")
    check_options(target, dtype, quant, None, False, place)
    folder = target != "gguf"
    check_destination(place, folder=folder, overwrite=overwrite, inputs=[path, tuned])
    exact = replace(a, store=MergedStore(a.store, found, exact=True))
    chosen = dtype_named(_DTYPES.get(dtype, dtype)) if dtype is not None else None
    own_types = chosen is None and quant is None
    written = MergedStore(a.store, found, exact=False) if own_types else exact.store
    assert isinstance(exact.store, MergedStore)
    source, notes = source_of(replace(a, store=written))
    notes += _told(exact.store, a, found.base, tuned)
    text = Reading() if reading is None else reading
    sample = None if isinstance(a.tokenizer, MissingTokenizer) else text.sample(a.tokenizer, a.store.config)
    options = Options(chosen, quant, None, False, None, False, greedy, None, None)

    def write(new: Path, tick: object) -> None:
        with threads_for(a.store.config):
            notes.extend(write_as(source, new, target, chosen, options, tick))  # type: ignore[arg-type]

    def compared(new: Path) -> Report:
        b = open_side(new)
        with threads_for(a.store.config):
            report = compare(
                exact,
                b,
                title=f"merge {tuned.name} into {path.name}",
                greedy=greedy,
                watch=watch,
                notes=(*notes, *changes(a.store, b.store)),
                shown_as=str(place),
                sample=sample,
            )
            return replace(
                report, checks=(*report.checks, _drift(report, a, b, exact, None if quant else max_drift, force))
            )

    size = likely_size(a.store, chosen, quant, keeps_blocks=target == "gguf")
    return perform(
        Job(size, write, compared),
        place,
        folder=folder,
        inputs=[path, tuned],
        overwrite=overwrite,
        keep_failed=keep_failed,
        watch=watch or (lambda what, done, total: None),
        command=command,
    )


def _told(merged: MergedStore, a: Opened, trained_on: str | None, adapter: Path) -> list[str]:
    kind = "DoRA" if merged.adapter.dora else "LoRA"
    notes = [f"A is {a.path} with the {kind} adapter {adapter} added in float32: {len(merged.changed)} tensors changed"]
    if trained_on is None:
        notes.append("the adapter does not say which base it was trained on")
    else:
        notes.append(f"the adapter says it was trained on {trained_on}")
    if merged.untied:
        notes.append("the adapter changes look-ups of a tied embedding: the output has a matrix of its own now")
    return notes


def _drift(report: Report, a: Opened, b: Opened, exact: Opened, limit: float | None, force: bool) -> Check:
    """What rounding the sum cost. Fails above `limit`, or where it is not known for a quantized result, unless `force`; without
    a limit it is only said."""
    worst, lost, size, lossy = 0.0, 0.0, 0.0, False
    assert isinstance(exact.store, MergedStore)
    for name in exact.store.changed:
        if name not in set(b.store.names()):
            continue
        info = b.store.info(name)
        lossy |= 8 * info.nbytes < 16 * math.prod(info.shape)
        for (_, was), (_, total), (_, made) in zip(
            rows_of(a.store, name), rows_of(exact.store, name), rows_of(b.store, name), strict=True
        ):
            error = (made - total).double()
            worst = max(worst, float(error.abs().max()))
            lost += float(error.square().sum())
            size += float((total - was).double().square().sum())
    share = math.sqrt(lost / size) if size else math.inf if lost else 0.0
    lines = [
        f"rounding {len(exact.store.changed)} changed tensors: largest error {worst:.3g}, together {share:.2%} of the change"
    ]
    figures: dict[str, float] = {"largest_rounding_error": worst, "rounding_of_change": share}
    if limit is not None:
        figures["limit_nats"] = limit
    if report.quality is None:
        lines.append("KL divergence not measured: the base has no tokenizer")
        passed = not lossy or limit is None
    else:
        kl = report.quality.kl.mean
        figures["mean_kl_nats"] = kl
        most = "" if limit is None else f" (at most {limit:g})"
        lines.append(f"mean KL divergence from base and adapter side by side: {kl:.3g} nats{most}")
        passed = limit is None or kl <= limit
    if not passed:
        lines.append("accepted because of --force" if force else "refused: choose wider types, or say --force")
    return Check("drift", passed or force, tuple(lines), figures)
