"""A run small enough to be done hundreds of times, and hard enough to be done wrong: packed rows, unequal shares of supervised
tokens, accumulation, dropout in adapters. Also a program, see `main`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.adapters.apply import LoraConfig, apply_lora, trained
from herd.data.batch import Loader
from herd.data.encode import IGNORE, Example, encode_text
from herd.data.pack import Rows, pack_stream
from herd.model.config import ModelConfig, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.train.config import Budget, EvaluatePart, OptimConfig, SavePart, ScheduleConfig, TrainConfig
from herd.train.moment import tensors_of
from herd.train.objective import NextToken
from herd.train.trainer import Trainer
from herd.train.watch import Recorder

CONFIG = ModelConfig(
    dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=40, layers=plain(2), tie_embeddings=True
)


def rows() -> Rows:
    """Packed documents of 20 tokens; of every third only the second half is learned."""
    examples = []
    for d in range(1, 24):
        whole = encode_text([3 + (i * d) % 30 for i in range(20)], bos=1, eos=2)
        labels = (IGNORE,) * 11 + whole.labels[11:] if d % 3 == 0 else whole.labels
        examples.append(Example(whole.tokens, labels))
    return pack_stream(examples, 16)


def model(lora: bool = False, seed: int = 0) -> Llama:
    """Random weights from `seed`; with `lora` adapters with dropout, in which random numbers matter."""
    torch.manual_seed(seed)
    made = init_weights(Llama(CONFIG))
    if lora:
        apply_lora(made, LoraConfig(4, 8.0, dropout=0.2))
    return made


def config(steps: int = 10, **changes: Any) -> TrainConfig:
    """Muon with AdamW, accumulation of two; saved by steps only."""
    fields: dict[str, Any] = {
        "budget": Budget(steps=steps),
        "optim": OptimConfig(kind="muon", lr=3e-3),
        "schedule": ScheduleConfig(warmup_steps=2, decay_fraction=0.5),
        "accumulate": 2,
        "save": SavePart(every_steps=2, every_minutes=None),
        "evaluate": EvaluatePart(every_minutes=None),
    }
    return TrainConfig(**(fields | changes))


def trainer(
    steps: int = 10, out: Path | None = None, *, lora: bool = False, batch: int = 4, changes: Any = None, **options: Any
) -> tuple[Trainer, Recorder]:
    """A trainer and what it tells."""
    seen = Recorder()
    made = model(lora)
    options.setdefault("watchers", [seen])
    options.setdefault("objective", NextToken())
    options.setdefault("loader", Loader(rows(), batch, seed=1))
    run = Trainer(made, config=config(steps, **(changes or {})), out=out, **options)
    return run, seen


def fingerprint(run: Trainer) -> str:
    """SHA-256 of every byte that the run has made: weights, optimiser, loader, counts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(run.model, run.optimisers, {}).items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    done = run.counters
    digest.update(repr((run.loader.state, done.step, done.tokens, done.supervised)).encode())
    return digest.hexdigest()


def weights(run: Trainer) -> dict[str, Tensor]:
    """Copies of what trained."""
    return {name: weight.detach().clone() for name, weight in trained(run.model).items()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else repr(tensor).encode()


def train(out: Path, steps: int, lora: bool) -> None:
    """A run that saves after every step, in this process; says every loss as it is made, and the fingerprint at the end."""
    save = SavePart(every_steps=1, every_minutes=None)
    run, seen = trainer(steps, out, lora=lora, changes={"save": save})
    keep = seen.on_step

    def tell(report: Any) -> None:
        keep(report)
        os.write(1, f"{report.step} {report.loss.hex()} {report.norm.hex()}\n".encode())

    seen.on_step = tell  # type: ignore[method-assign]
    run.fit()
    os.write(1, f"done {fingerprint(run)}\n".encode())


def main() -> None:
    """For every line "OUT STEPS LORA LOG" on stdin: train in a forked process that writes LOG; says its number and then its end.

    Importing torch takes seconds, training these models milliseconds: the fork is what makes hundreds of kills affordable.
    """
    torch.set_num_threads(1)
    child = 0
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)
        out, steps, lora, log = line.split()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
                train(Path(out), int(steps), lora == "1")
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        ended = os.waitid(
            os.P_PID, child, os.WEXITED | os.WNOWAIT
        )  # its number stays its own until the next line comes
        assert ended is not None
        print(ended.si_status, flush=True)


if __name__ == "__main__":
    main()
