"""A checkpoint in another format, with proof (`herd.convert`): written beside its name, read back, compared, and only then named.

The result is opened as any other checkpoint and held against the source by `herd.convert.verify` before it gets its name, so
what lies at the destination has passed. A result that fails is deleted, or kept as `DST.failed` when that is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from herd.chat.formats import detect
from herd.chat.templates import template_of
from herd.checkpoint.placement import dtype_named
from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import TensorStore, packed_of
from herd.checkpoint.vocabulary import MissingTokenizer
from herd.checkpoint.write.atomic import check_destination, new_file, new_folder
from herd.checkpoint.write.gguf_model import Importance
from herd.checkpoint.write.source import Source
from herd.convert.adapters import adapter_kind, compare_adapters, open_adapter, write_adapter
from herd.convert.report import FileEntry, Report
from herd.convert.sample import Reading, Sample, sample_of
from herd.convert.threads import threads_for
from herd.convert.verify import Opened, Watch, compare, open_side
from herd.convert.weights import tensor_bytes
from herd.errors import ConfigError, PromptError
from herd.model.accounting import parameters
from herd.quant.scheme import block_type

__all__ = [
    "REPORT", "Job", "Options", "Target",
    "changes", "check_options", "convert", "counting", "likely_size", "perform", "report_beside", "source_of", "write_as",
]  # fmt: skip

Target = Literal["meta", "hf", "gguf", "peft"]
TARGETS: tuple[Target, ...] = ("meta", "hf", "gguf", "peft")
REPORT = "herd-report"
"""Name, without suffix, of the reports in a converted folder."""

_HASH_CHUNK = 8 << 20
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""The short names of the command line."""


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: Target,
    dtype: str | torch.dtype | None = None,
    quant: str | None = None,
    shards: int | None = None,
    bin: bool = False,
    base: str | os.PathLike[str] | None = None,
    herd_only: bool = False,
    overwrite: bool = False,
    keep_failed: bool = False,
    greedy: int | None = None,
    quality: Reading | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    watch: Watch | None = None,
    command: str = "",
) -> Report:
    """Write checkpoint `src` (a path or a name that `resolve` knows) to `dst` in format `to`, and prove that nothing was lost.

    "hf" and "meta" make a folder, "gguf" a file, or with more than one shard a folder of parts. Without `dtype` (f32, f16,
    bf16) every tensor keeps its type; quantized sources become bfloat16 unless `to` is "gguf". `quant` names a GGUF type or
    mix (q8_0, q4_k_m, ...). `shards` is the number of files (hf, gguf) or of model-parallel ranks (meta); `bin` writes
    pytorch_model.bin instead of safetensors. Memory: one tensor while writing, one layer of each side while comparing.

    The report says what was compared (see `herd.verify`) and lies beside the result: `herd-report.json` and `.txt` in a folder,
    `NAME.gguf.report.json` and `.txt` beside a file. A LoRA adapter (a PEFT folder or a GGUF file) becomes "peft" or "gguf", and
    `base` is the model that it belongs to. When it has not `passed`, there is nothing at `dst`; `keep_failed`
    keeps the result as `dst.failed`.

    `quality` names a text on which the report says how much was lost (`herd.quantize` does so by itself), `calibrate` a file of
    text that says which columns of matrices matter (`herd.convert.importance`): with `quant`, they are rounded with more care.

    `herd_only` writes GGUF files that herd reads and llama.cpp would run as another model (Llama 4 with numbers of its own).

    Raises a HerdError when the source cannot be read, the format cannot hold it, or the destination cannot be written.
    """
    check_options(to, dtype, quant, shards, bin, Path(dst))
    path, place = resolve(src), Path(dst).expanduser()
    folder = to != "gguf" or (shards or 1) > 1
    check_destination(place, folder=folder, overwrite=overwrite, inputs=[path])
    watch = watch or (lambda what, done, total: None)
    job = _adapter_job if adapter_kind(path) else _model_job
    made = job(path, place, to, Options(dtype, quant, shards, bin, base, herd_only, greedy, quality, calibrate), watch)
    return perform(
        made,
        place,
        folder=folder,
        inputs=[path],
        overwrite=overwrite,
        keep_failed=keep_failed,
        watch=watch,
        command=command,
    )


def perform(
    job: Job,
    place: Path,
    *,
    folder: bool,
    inputs: Sequence[Path],
    overwrite: bool,
    keep_failed: bool,
    watch: Watch,
    command: str,
) -> Report:
    """Do `job`: write under a hidden name, compare, and give the result its name `place` when the report has passed.

    `inputs` are the files it is made from, the first of them the report's A.
    """
    seconds: dict[str, float] = {}
    report: Report | None = None
    try:
        with (new_folder if folder else new_file)(place, size=job.size, overwrite=overwrite, inputs=inputs) as new:
            with _timed(seconds, "writing"):
                job.write(new, counting(watch, "writing", job.size))
            report = job.compare(new)
            with _timed(seconds, "hashing"):
                report = _signed(report, inputs[0], new, watch)
            report = replace(report, command=command, seconds=seconds | dict(report.seconds))
            if not report.passed:
                if keep_failed:
                    kept = f"the failed result was kept as {_keep(new, place)}"
                    report = replace(report, notes=(*report.notes, kept))
                raise _Rejected
            if folder:
                _write_reports(report, new / REPORT)
    except _Rejected:
        assert report is not None
        return report
    if not folder:
        _write_reports(report, report_beside(place))
    return report


def report_beside(file: Path) -> Path:
    """The reports of a single file, without the last suffix (.json, .txt)."""
    return file.with_name(file.name + ".report")


class _Rejected(Exception):
    """The result failed its proof: leave the block without giving it its name."""


@dataclass(frozen=True)
class Options:
    dtype: str | torch.dtype | None
    quant: str | None
    shards: int | None
    bin: bool
    base: str | os.PathLike[str] | None
    herd_only: bool
    greedy: int | None
    quality: Reading | None
    calibrate: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Job:
    """What is to be done: about how many bytes come, the function that writes them, and the one that compares."""

    size: int
    write: Callable[[Path, Callable[[int], None]], None]
    compare: Callable[[Path], Report]


def _model_job(path: Path, place: Path, to: Target, options: Options, watch: Watch) -> Job:
    if to == "peft":
        raise ConfigError(f"{path} is a model, and --to peft is for LoRA adapters: choose meta, hf or gguf")
    if options.base is not None:
        raise ConfigError(f"{path} is a model, and --base is for LoRA adapters: leave it out")
    named = DTYPES.get(options.dtype, options.dtype) if isinstance(options.dtype, str) else options.dtype
    dtype = dtype_named(named)
    a = open_side(path)
    source, notes = source_of(a)
    sample = None if options.quality is None else options.quality.sample(a.tokenizer, a.store.config)

    calibration = None if options.calibrate is None else _calibration(a, options)
    importance: list[Importance] = []

    def write(new: Path, tick: Callable[[int], None]) -> None:
        if calibration is not None:
            from herd.convert.importance import importance_of

            with threads_for(a.store.config):
                columns = importance_of(a.store, calibration, counting(watch, "calibrating", tensor_bytes(a.store)))
            importance.append(Importance(columns, Path(calibration.name).name, len(calibration.windows)))
            notes.append(f"importance of columns from {calibration.windows.numel():,} tokens of {calibration.name}")
            notes.extend(calibration.notes)
        with warnings.catch_warnings(record=True) as heard, threads_for(a.store.config):
            warnings.simplefilter("always")
            notes.extend(write_as(source, new, to, dtype, options, tick, *importance))
        told = dict.fromkeys(" ".join(str(w.message).split()) for w in heard)
        notes.extend(line.replace(str(new), str(place)) for line in told)  # the hidden name means nothing to anybody

    def compared(new: Path) -> Report:
        b = open_side(new)
        said = (*notes, *changes(a.store, b.store))
        title = f"convert to {to}" + (f" as {options.quant}" if options.quant else "")
        with threads_for(a.store.config):
            return compare(
                a,
                b,
                title=title,
                greedy=options.greedy,
                watch=watch,
                notes=said,
                shown_as=str(place),
                sample=sample,
                importance=importance[0].columns if importance else None,
            )

    return Job(likely_size(a.store, dtype, options.quant, keeps_blocks=to == "gguf"), write, compared)


def _adapter_job(path: Path, place: Path, to: Target, options: Options, watch: Watch) -> Job:
    if to not in ("peft", "gguf"):
        raise ConfigError(f"{path} is a LoRA adapter, which cannot become {to}: choose peft or gguf")
    for word, given in (
        ("dtype", options.dtype),
        ("quant", options.quant),
        ("shards", options.shards),
        ("bin", options.bin),
        ("quality", options.quality),
        ("calibrate", options.calibrate),
    ):
        if given:
            raise ConfigError(f"{path} is a LoRA adapter: --{word} is for models")
    a = open_adapter(path, options.base)
    notes: list[str] = []
    size = sum(t.nbytes for pair in a.adapter.factors.values() for t in (pair.a, pair.b))
    size += sum(t.nbytes for t in a.adapter.whole.values())

    def write(new: Path, tick: Callable[[int], None]) -> None:
        notes.extend(write_adapter(a, new, to, tick))

    def compared(new: Path) -> Report:
        return compare_adapters(a, new, to, notes=tuple(notes), shown_as=str(place))

    return Job(size, write, compared)


def check_options(
    to: str, dtype: str | torch.dtype | None, quant: str | None, shards: int | None, bin: bool, dst: Path
) -> None:
    if to not in TARGETS:
        raise ConfigError(f"there is no format {to!r} to convert to: choose one of {', '.join(TARGETS)}")
    if quant is not None and to != "gguf":
        raise ConfigError(f"--quant makes GGUF files, and the result is {to}: use --to gguf, or leave --quant out")
    if quant is not None and dtype is not None:
        raise ConfigError("--quant and --dtype exclude each other: a quantization says how every tensor is stored")
    if bin and to != "hf":
        raise ConfigError(f"--bin makes pytorch_model.bin, a Hugging Face file, and the result is {to}")
    if shards is not None and to == "peft":
        raise ConfigError("--shards is for models: adapters are written in one piece")
    if shards is not None and shards < 1:
        raise ConfigError(f"{shards} shards: give at least 1")
    file = to == "gguf" and (shards or 1) == 1
    if file and dst.suffix != ".gguf":
        raise ConfigError(f"{dst}: a GGUF result is one file, name it {dst.name or 'model'}.gguf")
    if not file and dst.suffix == ".gguf":
        what = f"{shards} GGUF parts are" if to == "gguf" else f"a {to} result is"
        raise ConfigError(f"{dst}: {what} written to a folder, name it {dst.stem or 'model'}")


def _calibration(a: Opened, options: Options) -> Sample:
    """The text that says which columns matter. Raises ConfigError."""
    from herd.convert.importance import WINDOWS

    if options.quant is None:
        raise ConfigError("calibrating is for quantizing: say with --quant to what")
    return sample_of(options.calibrate, a.tokenizer, a.store.config, windows=WINDOWS)


def source_of(a: Opened) -> tuple[Source, list[str]]:
    """What the writers get, and what had to be decided."""
    if isinstance(a.tokenizer, MissingTokenizer):
        note = "the source has no tokenizer, so the result has none: neither prompts nor texts could be compared"
        return Source(a.store, None, a.generation, None), [note]
    if a.tokenizer.template:
        return Source(a.store, a.tokenizer, a.generation, a.tokenizer.template), []
    try:
        name = detect(a.tokenizer).name
    except PromptError:
        return Source(a.store, a.tokenizer, a.generation, None), []
    template = template_of(name)
    notes = [] if template is None else [f"the source has no chat template: {name} in herd's own words goes with it"]
    return Source(a.store, a.tokenizer, a.generation, template), notes


def write_as(
    source: Source,
    new: Path,
    to: str,
    dtype: torch.dtype | None,
    options: Options,
    tick: Callable[[int], None],
    importance: Importance | None = None,
) -> list[str]:
    """Call the writer; what it says was not carried over."""
    # Imported where used: one format should not pay for the others.
    if to == "hf":
        from herd.checkpoint.write.hf import write_hf

        return write_hf(source, new, dtype=dtype, shards=options.shards, bin=options.bin, tick=tick)
    if to == "meta":
        from herd.checkpoint.write.meta import write_meta

        return list(write_meta(source, new, dtype=dtype, shards=options.shards or 1, tick=tick) or [])
    from herd.checkpoint.write.gguf_model import write_gguf

    shards = options.shards or 1
    file = new if shards == 1 else new / f"{new.name}.gguf"
    write_gguf(
        source,
        file,
        dtype=dtype,
        quant=options.quant,
        shards=shards,
        herd_only=options.herd_only,
        importance=importance,
        tick=tick,
    )
    return []


def likely_size(store: TensorStore, dtype: torch.dtype | None, quant: str | None, *, keeps_blocks: bool) -> int:
    """About how many bytes the weights of the result take: for the free-space check and the bar. Mixes hold wider types, too."""
    if quant is not None:
        named = next((kind for word in quant.upper().split("_M") if (kind := block_type(word))), None)
        bits = 4.5 if named is None else 8 * named.nbytes / named.values
        return int(1.15 * parameters(store.config) * bits / 8)
    if dtype is not None:
        return parameters(store.config) * dtype.itemsize
    if keeps_blocks:
        packed = [one for name in store.names() if (one := packed_of(store, name)) is not None]
        return tensor_bytes(store) + sum(max(one.likely_bytes - one.nbytes, 0) for one in packed)
    total = 0
    for name in store.names():
        info = store.info(name)
        kind = block_type(info.stored)
        decoded = (kind is not None and kind.decode is not None) or packed_of(store, name) is not None
        itemsize = 2 if decoded else info.dtype.itemsize
        total += torch.Size(info.shape).numel() * itemsize
    return total


def changes(a: TensorStore, b: TensorStore) -> list[str]:
    """Which types became which others, in words: nothing is dequantized or cast without a line."""
    changed: dict[tuple[str, str, bool, bool], int] = {}
    for name in b.names():
        if name in set(a.names()):
            packed, after = packed_of(a, name), b.info(name).stored
            pair = a.info(name).stored, after, packed is not None, packed is not None and packed.holds(after)
            changed[pair] = changed.get(pair, 0) + 1
    notes = []
    for (before, after, packed, exact), count in changed.items():
        if before != after:
            old, new = block_type(before), block_type(after)
            word = "cast"
            if exact:
                word = "repacked with the same values"
            elif packed or (old is not None and old.decode is not None):
                word = "dequantized" if new is None or new.decode is None else "dequantized and quantized again"
            elif new is not None and new.decode is not None:
                word = "quantized"
            notes.append(f"{count} tensors were {word}: {before} to {after}")
    return notes


def _signed(report: Report, source: Path, new: Path, watch: Watch) -> Report:
    """The report with the SHA-256 of every file of both sides."""
    sides = (report.a, source), (report.b, new)
    total = sum(entry.nbytes for side, _ in sides for entry in side.files)
    tick = counting(watch, "hashing", total)
    signed = []
    for side, path in sides:
        folder = path if path.is_dir() else path.parent
        files = (FileEntry(e.name, e.nbytes, _sha256(folder / e.name, tick)) for e in side.files)
        signed.append(replace(side, files=tuple(files)))
    return replace(report, a=signed[0], b=signed[1])


def _sha256(file: Path, tick: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(_HASH_CHUNK):
            digest.update(chunk)
            tick(len(chunk))
    return digest.hexdigest()


def _write_reports(report: Report, stem: Path) -> None:
    """`stem`.json and `stem`.txt."""
    data = json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n"
    stem.with_name(stem.name + ".json").write_text(data, encoding="utf-8")
    stem.with_name(stem.name + ".txt").write_text(report.text(), encoding="utf-8")


def _keep(new: Path, dst: Path) -> Path:
    kept = dst.with_name(dst.name + ".failed")
    if kept.is_dir():
        shutil.rmtree(kept)
    new.replace(kept)
    return kept


def counting(watch: Watch, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        watch(what, done, max(total, done))

    return tick


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[what] = time.monotonic() - start
