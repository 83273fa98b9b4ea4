"""Rows to tokens, here or in processes of its own, always in the order of the rows. No torch.

A process is `python -m herd.data.tokenworker`: it reads pickled jobs from its standard input, answers on its standard output,
and ends when its input does, so that none outlives the program that started it, however that ends. (multiprocessing would run
the caller's main module again, or fork a process that has threads.)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from herd.chat.format import ChatFormat
from herd.data.adapt import Kind, adapt
from herd.data.encode import IGNORE, FormatError, check_prompts, encode
from herd.data.read import Row
from herd.data.records import ChatRecord, TextRecord
from herd.data.report import RowReport
from herd.data.shards import Tokenized
from herd.errors import DataError, HerdError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Encoder", "Job", "Outcome", "in_order"]

CHECKED_FIRST, CHECKED_EVERY = 16, 64
"""Lines whose conversations are rendered once more as prompts (`check_prompts`): those of a file's head, then every 64th."""


@dataclass(frozen=True, slots=True)
class Job:
    """Rows of one kind; `tag` comes back with what became of them."""

    tag: Any
    kind: Kind
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The documents of a job, the rows that became none (line and reason), and what adapting them repaired."""

    tag: Any
    documents: Tokenized
    bad: list[tuple[int, str]]
    changed: dict[str, int]


@dataclass(frozen=True, slots=True)
class Encoder:
    """What a row is made to tokens with. `checked` False leaves out `check_prompts`."""

    tokenizer: Tokenizer
    format: ChatFormat | None
    checked: bool = True

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of token ids on disk."""
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def run(self, job: Job) -> Outcome:
        """The documents of `job`, in order. Raises FormatError when the prompt format is none to train with."""
        report = RowReport()
        special = self.tokenizer.special
        tokens: list[Any] = []
        masks: list[Any] = []
        sizes: list[int] = []
        lines: list[int] = []
        bad: list[tuple[int, str]] = []
        for row in job.rows:
            try:
                record = adapt(row, job.kind, report)
                if isinstance(record, TextRecord):
                    ids = [special.bos, *self.tokenizer.encode(record.text), special.eos]
                else:
                    if (
                        self.checked
                        and self.format is not None
                        and isinstance(record, ChatRecord)
                        and _is_checked(row.line)
                    ):
                        check_prompts(record, self.format)
                    example = encode(record, self.tokenizer, self.format)
                    ids = example.tokens
                    masks.append(np.frombuffer(array("i", example.labels), np.int32) != IGNORE)
            except FormatError as error:
                raise FormatError(f"{row.where}: {error}") from error
            except HerdError as error:
                bad.append((row.line, str(error)))
                continue
            # From lists by way of `array`: numpy's own way takes three times as long.
            tokens.append(np.frombuffer(array(self.dtype.char, ids), self.dtype))
            sizes.append(len(ids))
            lines.append(row.line)
        learned = None if job.kind == "text" else np.concatenate([np.zeros(0, np.uint8), *masks]).astype(np.uint8)
        documents = Tokenized(
            np.concatenate([np.zeros(0, self.dtype), *tokens]),
            np.array(sizes, np.int64),
            np.array(lines, np.uint32),
            learned,
        )
        return Outcome(job.tag, documents, bad, dict(report.changed))


def _is_checked(line: int) -> bool:
    return line <= CHECKED_FIRST or line % CHECKED_EVERY == 0


def in_order(encoder: Encoder, jobs: Iterable[Job], processes: int) -> Iterator[Outcome]:
    """The outcomes of `jobs` in their order, made by `processes` processes (1: this one).

    At most a few jobs per process are held at once. Raises what a job raised, and DataError when a process dies.
    """
    if processes == 1:
        yield from map(encoder.run, jobs)
        return
    crew = _Crew(encoder, iter(jobs), processes)
    try:
        yield from crew.outcomes()
    finally:
        crew.close()


_SIZE = struct.Struct("<Q")


def _send(file: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value, protocol=5)
    file.write(_SIZE.pack(len(data)))
    file.write(data)
    file.flush()


def _receive(file: IO[bytes]) -> Any:
    head = file.read(_SIZE.size)
    if len(head) < _SIZE.size:
        raise EOFError
    data = file.read(_SIZE.unpack(head)[0])
    return pickle.loads(data)  # from our own process


class _Crew:
    """Processes, a thread for each that carries jobs there and outcomes back, and the outcomes that are early."""

    AHEAD = 3
    """Jobs per process that may be begun before the outcome of the oldest has been taken."""

    def __init__(self, encoder: Encoder, jobs: Iterator[Job], processes: int) -> None:
        self._jobs, self._taking = jobs, threading.Lock()
        self._next = 0
        self._room = threading.Semaphore(self.AHEAD * processes)
        self._done: dict[int, Outcome | BaseException | None] = {}
        self._news = threading.Condition()
        self._over = False
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-m", "herd.data.tokenworker"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(processes)
        ]
        started = pickle.dumps(encoder, protocol=5)
        self._threads = [
            threading.Thread(target=self._serve, args=(process, started), daemon=True) for process in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def outcomes(self) -> Iterator[Outcome]:
        for at in itertools.count():
            with self._news:
                while at not in self._done:
                    self._news.wait()
                outcome = self._done.pop(at)
            if outcome is None:
                return
            if isinstance(outcome, BaseException):
                raise outcome
            self._room.release()
            yield outcome

    def close(self) -> None:
        self._over = True
        for _ in self._threads:
            self._room.release()
        for process in self._processes:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()

    def _take(self) -> tuple[int, Job | None]:
        """The next job and its number. The end, or an error of the reader, takes the place of an outcome."""
        with self._taking:
            at = self._next
            if at < 0:
                return at, None
            try:
                job = next(self._jobs)
                self._next += 1
                return at, job
            except StopIteration:
                self._next = -1
                self._put(at, None)
            except BaseException as error:
                self._next = -1
                self._put(at, error)
            return at, None

    def _put(self, at: int, outcome: Outcome | BaseException | None) -> None:
        with self._news:
            self._done[at] = outcome
            self._news.notify_all()

    def _serve(self, process: subprocess.Popen[bytes], started: bytes) -> None:
        at = -1
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(_SIZE.pack(len(started)) + started)
            process.stdin.flush()
            while True:
                self._room.acquire()
                if self._over:
                    return
                at, job = self._take()
                if job is None:
                    return
                _send(process.stdin, job)
                self._put(at, _receive(process.stdout))
        except (EOFError, OSError) as error:
            if not self._over:
                code = process.poll()
                why = (
                    f"a process that tokenizes has ended by itself (exit code {code}): was it killed, or out of memory?"
                )
                self._lost(at, DataError(why), error)
        except BaseException as error:
            self._lost(at, error, None)

    def _lost(self, at: int, error: BaseException, cause: BaseException | None) -> None:
        error.__cause__ = cause
        with self._taking:
            at = self._next if at < 0 else at
            self._next = -1
        self._put(at, error)


def main() -> None:
    """Serve jobs until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that prints may mix into the answers
    try:
        encoder: Encoder = _receive(source)
        while True:
            job: Job = _receive(source)
            try:
                answer: Outcome | BaseException = encoder.run(job)
            except Exception as error:
                answer = error
            _send(out, answer)
    except (EOFError, BrokenPipeError):
        pass


if __name__ == "__main__":
    main()
