"""What can be known to fail before the model is loaded: no such data, targets that no model has, rows that the prompt format
cannot write or that are too long, what this machine cannot do.

A run says all of it, too, but some minutes later; a dry run would never.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from herd.adapters.apply import TARGETS
from herd.chat.base import BaseFormat
from herd.chat.formats import FORMATS
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.vocabulary import load_tokenizer, tokenizer_of
from herd.data.adapt import Kind, kind_of
from herd.data.config import DataPart, SourcePart
from herd.data.files import find_files
from herd.data.read import read_file
from herd.data.report import RowReport
from herd.data.tokenworker import Encoder, Job
from herd.errors import ConfigError, DataError
from herd.train.config import RunConfig
from herd.train.float8 import supported
from herd.train.qat import INT8_INT4, mix_of
from herd.train.start import device_of, format_of, unknown_format

__all__ = ["check", "lacking", "try_rows"]

LOOKED_AT = 8
"""Files of each source whose first rows are read; a run reads them all."""
FIRST = 20
"""Conversations and completions of each of those files that `try_rows` makes tokens of."""

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
    name = config.data.chat_format
    if name is not None and name not in FORMATS:
        raise ConfigError(f"data.chat_format: there is no prompt format {name!r}; choose one of {', '.join(FORMATS)}")
    if config.data.held_out is not None and config.data.held_out_share is None:
        find_files(config.data.held_out)
    return [_source(Path(part.path), part.kind) for part in config.data.sources]


def try_rows(config: RunConfig) -> None:
    """Make tokens of the first conversations and completions as the run will of all rows. Reads the tokenizer, and no weights.

    Raises what the run would: for a prompt format that is missing or cannot write them, bad rows, and rows that are too long.
    """
    data, source = config.data, config.model.source
    tokenizer = tokenizer_of(open_store(resolve(source))) if source else load_tokenizer(config.model.tokenizer)
    form = format_of(config, tokenizer)
    if config.recipe == "sft" and isinstance(form, BaseFormat):
        raise unknown_format(config)
    told = config.recipe == "sft" or data.chat_format is not None  # else texts are expected, which need none
    encoder = Encoder(tokenizer, form if told and not isinstance(form, BaseFormat) else None)
    length = min((stage.length for stage in config.stages), default=data.length)
    parts = list(data.sources)
    if data.held_out is not None and data.held_out_share is None:
        parts.append(SourcePart(path=data.held_out))
    for part in parts:
        for file in islice(find_files(part.path), LOOKED_AT):
            _try_file(file, part.kind, encoder, data, length)


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


def _try_file(file: Path, kind: Kind | None, encoder: Encoder, data: DataPart, length: int) -> None:
    kind = kind or kind_of(file)
    if kind == "text":  # any text can be used: it is split where rows end
        return
    rows = list(islice(read_file(file, RowReport(), bad=data.bad_rows), FIRST))
    if kind is None or not rows:
        return
    made = encoder.run(Job(None, kind, rows))
    if made.bad and data.bad_rows == "stop":
        line, why = made.bad[0]
        raise DataError(f"{file}:{line}: {why}")
    sizes = made.documents.sizes
    if data.long_rows == "stop" and (long := sizes > length).any():
        first = int(long.argmax())
        raise DataError(
            f"{file}:{made.documents.lines[first]}: {sizes[first]} tokens are longer than a row of {length}, as are "
            f"{long.sum()} of the first {len(sizes)} of this file, the longest {sizes.max()}: raise data.length, or leave them "
            "out with data.long_rows=skip"
        )


def _source(path: Path, kind: str | None) -> str:
    files = find_files(path)
    kinds = {kind} if kind is not None else {kind_of(file): None for file in islice(files, LOOKED_AT)}.keys()
    for found in ("preference", "prompt"):
        if found in kinds:
            raise DataError(f"{path}: {found} rows: no recipe of herd trains on them yet (herd data lint reads them)")
    rows = ", ".join(sorted(found for found in kinds if found is not None)) or "no row that can be read"
    return f"{path}: {len(files):,} {'file' if len(files) == 1 else 'files'}, {rows}"
