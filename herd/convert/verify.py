"""Two checkpoints of any formats held against each other: tensors, config, tokenizer, prompts, logits (`herd.verify`)."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import GenerationDefaults, TensorStore
from herd.checkpoint.vocabulary import MissingTokenizer, tokenizer_of
from herd.convert.adapters import Kind, adapter_kind, compare_adapters, open_adapter
from herd.convert.drift import BIG, FEW, check_logits, greedy_count, readings
from herd.convert.prompts import check_prompts
from herd.convert.quality import check_comparable, measure
from herd.convert.quality import readings as readings_of
from herd.convert.report import Check, FileEntry, Report, Side
from herd.convert.sample import Reading, Sample
from herd.convert.threads import threads_for
from herd.convert.versions import versions
from herd.convert.vocabulary import check_tokenizers
from herd.convert.weights import IMATRIX, compare_tensors, tensor_bytes
from herd.errors import ConfigError
from herd.model.accounting import parameters
from herd.model.config import ModelConfig
from herd.quant.scheme import block_type
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Opened", "Watch", "compare", "open_side", "sample_for", "verify"]

Watch = Callable[[str, int, int], None]
"""Told (what is being done, bytes done, bytes in all)."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint that is looked at: its place, tensors, tokenizer (a MissingTokenizer without one), sampling defaults."""

    path: Path
    store: TensorStore
    tokenizer: Tokenizer
    generation: GenerationDefaults
    remarks: tuple[str, ...] = ()


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    greedy: int | None = None,
    quality: bool | Reading = False,
    base: str | os.PathLike[str] | None = None,
    watch: Watch | None = None,
) -> Report:
    """Whether checkpoint `b` is `a` in other clothes; each a path, or any name that `resolve` knows. Two LoRA adapters
    are compared by their factors and changes, over the model `base` (default: the one that A names).

    Nothing is written and never is more than one layer of each side in memory. All of B's tensors must be A's: exactly, or
    where their stored type is lower, inside the bound of that type. `greedy` is how many greedy tokens are compared (default
    16; 4 from 1 GiB of weights on, since each one reads A once more). `Report.passed` is the verdict.

    With `quality` the report also says how much B lost (`herd.convert.quality`): perplexities, KL divergence, errors of layers
    and matrices, on herd's sample text or what a `Reading` names. That works for any two models of one shape and vocabulary,
    and no verdict depends on it.

    Raises a HerdError when one of the two cannot be opened or read, or quality cannot be measured.
    """
    paths = resolve(a), resolve(b)
    kinds: list[Kind | None] = [adapter_kind(path) for path in paths]
    if any(kinds):
        return _adapters(paths, kinds, base, generates=greedy is not None or quality is not False)
    if base is not None:
        raise ConfigError("these are models, and --base is for LoRA adapters: leave it out")
    one, other = (open_side(path) for path in paths)
    reading = quality if isinstance(quality, Reading) else Reading() if quality else None
    sample = None if reading is None else sample_for(one, other, reading)
    title = "verify: B is A" if one.store.kind == other.store.kind else "verify: B is A in another format"
    with threads_for(one.store.config):
        return compare(one, other, title=title, greedy=greedy, watch=watch, sample=sample)


def _adapters(
    paths: tuple[Path, Path], kinds: list[Kind | None], base: str | os.PathLike[str] | None, *, generates: bool
) -> Report:
    one, other = kinds
    if one is None or other is None:
        raise ConfigError(
            f"{paths[one is None]} is an adapter and {paths[one is not None]} none: they cannot be compared"
        )
    if generates:
        raise ConfigError(
            "adapters are compared by their numbers: --greedy and --quality are for models (herd merge makes one)"
        )
    a = open_adapter(paths[0], base)
    report = compare_adapters(a, paths[1], other, notes=(), shown_as=str(paths[1]))
    return replace(
        report, title="verify: adapter B is A" if one == other else "verify: adapter B is A in another format"
    )


def sample_for(a: Opened, b: Opened, reading: Reading) -> Sample:
    """The text as both sides read it. Raises ConfigError when they are no two forms of one model, or read it as other ids."""
    check_comparable(a.store, b.store)
    held = [side for side in (a, b) if not isinstance(side.tokenizer, MissingTokenizer)] or [a]
    samples = [reading.sample(side.tokenizer, side.store.config) for side in held]
    if not all(torch.equal(sample.windows, samples[0].windows) for sample in samples):
        raise ConfigError("quality cannot be measured: the tokenizers of the two give other ids for the text")
    return samples[0]


def open_side(path: Path) -> Opened:
    """Open the checkpoint at `path`, headers only. What its readers warn about becomes remarks. Raises HerdErrors."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        store = open_store(path)
        tokenizer = tokenizer_of(store)
    remarks = tuple(dict.fromkeys(" ".join(str(w.message).split()) for w in heard))
    skipped: tuple[str, ...] = getattr(store, "skipped", ())
    if skipped:
        groups = ", ".join(sorted({name.split(".")[0] for name in skipped}))
        remarks += (f"{path}: text model only, {len(skipped)} tensors of {groups} are left out",)
    return Opened(path, store, tokenizer, getattr(store, "generation", GenerationDefaults()), remarks)


def compare(
    a: Opened,
    b: Opened,
    *,
    title: str,
    greedy: int | None = None,
    watch: Watch | None = None,
    notes: tuple[str, ...] = (),
    shown_as: str | None = None,
    sample: Sample | None = None,
    importance: Mapping[str, torch.Tensor] | None = None,
) -> Report:
    """The report on two open checkpoints; `shown_as` is the name that B is going to have. Quality is measured on `sample`;
    `importance` is as for `compare_tensors`."""
    watch = watch or (lambda what, done, total: None)
    seconds: dict[str, float] = {}
    count = greedy_count(a.store, greedy)
    both = tensor_bytes(a.store) + tensor_bytes(b.store)
    start = time.monotonic()
    tensors = tuple(compare_tensors(a.store, b.store, _ticking(watch, "comparing tensors", both), importance))
    seconds["tensors"] = time.monotonic() - start
    checks = [_check_config(a, b)]
    start = time.monotonic()
    checks += [
        check_tokenizers(a.tokenizer, b.tokenizer, kind_b=b.store.kind),
        check_prompts(a.tokenizer, b.tokenizer, kind_b=b.store.kind),
    ]
    seconds["tokenizer and prompts"] = time.monotonic() - start
    start = time.monotonic()
    total = readings(count) * tensor_bytes(a.store) + 2 * tensor_bytes(b.store)
    tick = _ticking(watch, "comparing logits", total)
    checks.append(check_logits(a.store, b.store, tensors, a.tokenizer, count, tick))
    seconds["logits"] = time.monotonic() - start
    watch("comparing logits", total, total)
    found = None
    if sample is not None:
        start = time.monotonic()
        total = readings_of(a.store) + readings_of(b.store)
        found = measure(a.store, b.store, sample, _ticking(watch, "measuring quality", total))
        watch("measuring quality", total, total)
        seconds["quality"] = time.monotonic() - start
    remarks = [*notes, *a.remarks, *(found.notes if found else ()), *_generation_notes(a, b)]
    if any(t.status == "failed" and _coarser(t.stored_a, t.stored_b) for t in tensors):
        remarks.append("A holds quantized tensors where B has plain ones: if B is the original, give it first")
    if importance is None and (matrix := b.store.metadata().get(IMATRIX)) is not None:
        remarks.append(
            f"B was made with an importance matrix ({matrix}): of Q4_K, Q5_K and Q6_K blocks only the nearest levels of "
            "their scales are checked, not the scales themselves"
        )
    if greedy is None and count == FEW:
        size = f"{tensor_bytes(a.store) / 1e9:.0f} GB"
        remarks.append(
            f"{FEW} greedy tokens, since each reads all {size} of A (from {BIG >> 30} GiB on): --greedy 16 for more"
        )
    return Report(
        title,
        _side(a),
        _side(b, shown_as),
        tensors,
        tuple(checks),
        tuple(dict.fromkeys(remarks)),
        versions=versions(),
        seconds=seconds,
        quality=found,
    )


def _side(opened: Opened, shown_as: str | None = None) -> Side:
    store = opened.store
    stored = Counter(store.info(name).stored for name in store.names())
    path = shown_as or str(opened.path)
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    files = sorted(folder.iterdir()) if opened.path.is_dir() else [opened.path]
    entries = tuple(FileEntry(f.name, f.stat().st_size) for f in files if f.is_file())
    return Side(path, store.kind, parameters(store.config), tensor_bytes(store), dict(stored.most_common()), entries)


def _coarser(stored_a: str, stored_b: str) -> bool:
    one, other = block_type(stored_a), block_type(stored_b)
    return one is not None and one.decode is not None and (other is None or other.decode is None)


def _ticking(watch: Watch, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def tick(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total - 1)  # the end is told by the caller, when it is there
        watch(what, done, total)

    return tick


def _check_config(a: Opened, b: Opened) -> Check:
    """The geometry, field by field. The context is not part of Meta's format; a tied output may also be stored twice."""
    one, other = _fields(a.store.config), _fields(b.store.config)
    wrong, said = [], []
    for field in [*one, *(name for name in other if name not in one)]:
        left, right = one.get(field), other.get(field)
        if left == right:
            continue
        line = f"{field} is {left} in A, {right} in B"
        if field == "max_seq_len" and "meta" in (a.store.kind, b.store.kind):
            said.append(line + " (Meta's format has no place for it)")
        elif field == "tie_embeddings":
            said.append(line + " (compared as tensors)")
        else:
            wrong.append(line)
    if wrong:
        return Check("config", False, tuple(wrong + said))
    return Check("config", True, (f"{len(one)} fields, layer by layer", *said))


def _fields(config: ModelConfig) -> dict[str, Any]:
    """Flat: rope_scaling.factor, layers[3].chunk, ..."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name != "layers":
            flat[name] = value
    flat["n_layers"] = config.n_layers
    for i, spec in enumerate(config.layers):
        flat |= {f"layers[{i}].{key}": inner for key, inner in asdict(spec).items()}
    return {name: value for name, value in flat.items() if value is not None}


def _generation_notes(a: Opened, b: Opened) -> list[str]:
    """Sampling defaults that A has and B has not, or has otherwise. They do not change the model."""
    one, other = asdict(a.generation), asdict(b.generation)
    lost = [
        f"{k} {_told(v)}"
        for k, v in one.items()
        if v not in (None, frozenset(), {}) and other[k] in (None, frozenset(), {})
    ]
    other_value = [
        f"{k} {_told(one[k])} is {_told(other[k])} in B"
        for k in one
        if one[k] not in (None, frozenset(), {}) and other[k] not in (None, frozenset(), {}) and one[k] != other[k]
    ]
    notes = []
    stops = not isinstance(b.tokenizer, MissingTokenizer) and a.generation.stop_ids <= b.tokenizer.special.stop
    lost = [line for line in lost if not (line.startswith("stop_ids") and stops)]
    if lost:
        notes.append(f"sampling defaults that B does not hold: {', '.join(lost)}")
    if other_value:
        notes.append(f"sampling defaults that differ: {', '.join(other_value)}")
    return notes


def _told(value: Any) -> str:
    return str(sorted(value) if isinstance(value, frozenset) else value)
