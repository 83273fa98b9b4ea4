"""`herd generate`: the answers to a file of prompts, many at once; a run that was stopped can be gone on with."""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from herd.cli.batch import Row, answer, answered, failure, read_rows
from herd.cli.completion import models
from herd.cli.console import note
from herd.cli.options import adapter_option, model_options, sampling, sampling_options, tensor_parallel_option
from herd.cli.progress import busy, progress
from herd.cli.sizes import duration
from herd.errors import ConfigError, HerdError
from herd.hub.created import find

if TYPE_CHECKING:
    from herd.engine.llm import LLM, Pending

__all__ = ["command"]

EPILOG = """\
Examples:

\b
  herd generate nano --batch-file prompts.jsonl --out answers.jsonl
  herd generate MODEL --batch-file prompts.jsonl --out answers.jsonl --resume   go on where it stopped
  herd generate MODEL --batch-file prompts.jsonl --out - --temp 0 -n 200        to standard output
  herd generate MODEL --batch-file prompts.jsonl --out answers.jsonl --adapter ./my-lora --draft lookup

A row of the file is one JSON object: {"prompt": "..."}, {"messages": [...]}, or a request as in OpenAI's batch files. It may
have an "id" and sampling fields of its own, which go before those of the command line. Answers come as they are ready, with
the id of their row (its line number when it has none). A row that fails gets an "error", and the exit status is 1.
"""
ADAPTER = "--adapter"
"""What the one adapter is called inside."""
AHEAD = 3
"""Rows that are queued for each that runs: enough that the engine never waits, few enough that huge files need no memory."""


@click.command(epilog=EPILOG)
@click.argument("model", shell_complete=models)
@click.option(
    "--batch-file",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="Rows of prompts (JSON Lines).",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE", help="Where answers go."
)
@click.option("--resume", is_flag=True, help="Keep the answers that --out has, and make the others.")
@click.option("--overwrite", is_flag=True, help="Replace --out.")
@sampling_options
@model_options
@click.option("--kv", default="auto", metavar="TYPE", help="Numbers of keys and values: auto, f32, f16, bf16, int8.")
@click.option(
    "--memory", metavar="SIZE", help='Memory for keys and values, such as "4 GiB" (default: from what is free).'
)
@click.option(
    "--max-seqs", type=click.IntRange(1, 1024), default=16, show_default=True, metavar="N", help="Replies at once."
)
@adapter_option
@tensor_parallel_option
@click.option("--draft", metavar="NAME", help="Guess tokens ahead: lookup, or a smaller model of the same vocabulary.")
@click.option("--deterministic", is_flag=True, help="Answers do not depend on what runs beside them, to the last bit.")
def command(model: str, source: Path, out: Path, resume: bool, overwrite: bool, **options: Any) -> int:
    """Answer every row of a batch FILE with MODEL, many at once."""
    chosen, options = sampling(options), _as_created(model, options)
    if options["tensor_parallel"] > 1 and options["adapter"] is not None:
        raise click.UsageError(
            "--adapter: adapters are not possible with --tensor-parallel-size: merge a LoRA first (herd merge)"
        )
    if resume and (overwrite or str(out) == "-"):
        raise click.UsageError("--resume goes on with a file: leave --overwrite out, and give --out a name")
    ids = _ids(source)
    if str(out) != "-" and out.exists() and not (resume or overwrite):
        raise HerdError(f"{out} exists: --resume goes on with it, --overwrite replaces it")
    if out.resolve() == source.resolve():
        raise HerdError("--out is the batch file itself: give another name")
    done = answered(out) if resume else set()
    left = len(ids - done)
    if resume:
        note(f"{len(ids) - left:,} of {len(ids):,} rows are answered already")
    if not left:
        return 0
    with busy(f"loading {model}"):
        llm = _opened(model, options)
    note(llm.budget.sentence())
    with llm, _writing(out, append=resume) as file:
        run = _Run(llm, model, chosen, file, left, None if options["adapter"] is None else ADAPTER)
        try:
            run.go(row for row in read_rows(source) if row.id not in done)
        except KeyboardInterrupt:
            note(
                f"stopped: {run.count:,} of {left:,} rows are answered"
                + ("" if file is sys.stdout else "; --resume goes on")
            )
            raise
    note(run.summary())
    return 1 if run.failed else 0


def _as_created(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, and where they say nothing what `herd create` said of the model. Raises HerdError for what rows would miss."""
    made = find(model)
    if made is None:
        return options
    if made.system or made.messages:
        raise HerdError(
            f"{model} was made with a system prompt or turns before each conversation, and rows are answered as they are: write "
            f"these into the rows and give {made.base}, or ask {model} through herd serve"
        )
    own = {"max_len": made.context, "format_name": made.format, "adapter": made.adapter}
    return options | {name: value for name, value in own.items() if options[name] is None}


def _ids(source: Path) -> set[str | int]:
    """The ids of all rows. Raises HerdError when two rows have the same."""
    ids: set[str | int] = set()
    for row in read_rows(source):
        if row.id in ids:
            raise HerdError(
                f"{source}: line {row.line} has the id {str(row.id)[:40]!r} of an earlier row: ids must differ"
            )
        ids.add(row.id)
    if not ids:
        raise HerdError(f"{source} has no rows")
    return ids


def _opened(model: str, options: Mapping[str, Any]) -> LLM:
    import os

    import torch

    from herd.engine.config import SMALL
    from herd.engine.llm import LLM
    from herd.model.accounting import parameters

    llm = LLM(
        model,
        weights=options["weights"],
        dtype=options["dtype"],
        device=options["device"],
        format=options["format_name"],
        kv=options["kv"],
        max_len=options["max_len"],
        memory=options["memory"],
        max_seqs=options["max_seqs"],
        deterministic=options["deterministic"],
        draft=options["draft"],
        tensor_parallel=options["tensor_parallel"],
        created=False,  # see `_as_created`
    )
    if options["adapter"] is not None:
        loaded = llm.load_adapter(ADAPTER, options["adapter"])
        if loaded.change == 0 and not loaded.virtual:
            note(f"[the adapter {options['adapter']} changes nothing: all of its B matrices are zero]")
    if options["tensor_parallel"] == 1 and parameters(llm.config) <= SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return llm


@contextmanager
def _writing(out: Path, *, append: bool) -> Iterator[IO[str]]:
    if str(out) == "-":
        yield sys.stdout
        return
    try:
        file = out.open("a" if append else "w", encoding="utf-8")
    except OSError as error:
        raise HerdError(f"{out} cannot be written: {error.strerror}") from None
    with file:
        yield file


class _Run:
    """Rows on their way through the model: some ahead of those that run, answers written as they come."""

    def __init__(
        self, llm: LLM, model: str, chosen: Mapping[str, Any], file: IO[str], total: int, adapter: str | None = None
    ) -> None:
        self.llm, self.model, self.chosen, self.file, self.total = llm, model, chosen, file, total
        self.adapter = adapter
        self.count = self.failed = self.tokens = 0
        self._began = time.perf_counter()
        self._running: dict[int, Pending] = {}
        self._ready: queue.SimpleQueue[Row] = queue.SimpleQueue()

    def go(self, rows: Iterator[Row]) -> None:
        """Answer all of them. Raises KeyboardInterrupt with those in flight ended."""
        room = self.llm.budget.seqs * (1 + AHEAD)
        with progress("generating", "rows", self._pace) as tick:
            try:
                for row in rows:
                    self._begin(row)
                    while len(self._running) >= room or (self._running and not self._ready.empty()):
                        self._take(tick)
                    tick(self.count, self.total)
                while self._running:
                    self._take(tick)
            finally:
                for pending in self._running.values():
                    pending.close()

    def summary(self) -> str:
        """What was done, in a line."""
        seconds = time.perf_counter() - self._began
        failed = f', {self.failed:,} of them failed (see "error" in the answers)' if self.failed else ""
        rate = f"{self.tokens / seconds:,.0f} tokens/s"
        return f"{self.count:,} rows in {duration(seconds)}{failed}; {self.tokens:,} tokens, {rate}"

    def _pace(self) -> str:
        return f"{self.llm.stats().tokens_per_second:,.0f} tokens/s"

    def _begin(self, row: Row) -> None:
        if row.error is not None:
            self._fail(row, row.error)
            return
        try:
            params = self.llm.params(**{**self.chosen, **row.sampling})
            pending = self.llm.submit(row.prompt, params, tools=row.tools, adapter=self.adapter)
        except (HerdError, ConfigError) as error:
            self._fail(row, str(error))
            return
        self._running[row.line] = pending
        pending.future.add_done_callback(lambda _: self._ready.put(row))

    def _take(self, tick: Any) -> None:
        """Wait for an answer and write it."""
        row = self._ready.get()
        pending = self._running.pop(row.line)
        try:
            reply = pending.wait()
        except HerdError as error:
            self._fail(row, str(error))
        else:
            self.tokens += len(reply.tokens)
            self._write(answer(row, reply, self.model))
        tick(self.count, self.total)

    def _fail(self, row: Row, why: str) -> None:
        self.failed += 1
        self._write(failure(row, why))

    def _write(self, content: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(content, ensure_ascii=False) + "\n")
        self.file.flush()
        self.count += 1
