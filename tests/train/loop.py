"""A run small enough to be done hundreds of times, and hard enough to be done wrong: packed rows, unequal shares of supervised
tokens, accumulation, dropout in adapters. Also a program, see `main`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from herd.adapters.apply import LoraConfig, apply_lora, trained
from herd.data.batch import Loader
from herd.data.encode import IGNORE, Example, encode_text
from herd.data.pack import Rows, pack_stream
from herd.errors import HerdError
from herd.model.config import ModelConfig, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.parallel.checkpoint import Sharded
from herd.parallel.config import ParallelPart
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import prepare
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
    mesh = options.pop("mesh", None)
    if mesh is not None:
        options["spread"] = prepare(made, mesh)
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
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else repr(tensor).encode()


def train(out: Path, steps: int, lora: bool, rank: int, world: int, log: str, number: int) -> None:
    """A run that saves after every step, in this process; says every loss as it is made, and the fingerprint at the end.

    The main rank writes into LOG.saves when a save begins, and when it is over: seconds of a clock that all processes share.
    """
    options: dict[str, Any] = {}
    if world > 1:
        from datetime import timedelta

        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{log}.store-{number}", world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=120),
        )
        mesh = Mesh.of(ParallelPart(dp_shard=world))
        options = {
            "mesh": mesh,
            "payload": Sharded(tied=True),
            "objective": NextToken(attend=mesh.packed),
            "loader": Loader(rows(), 4 // world, seed=1, rank=mesh.dp_rank, world=mesh.dp_size),
        }
    save = SavePart(every_steps=1, every_minutes=None)
    run, seen = trainer(steps, out, lora=lora, changes={"save": save}, **options)
    keep = seen.on_step

    def tell(report: Any) -> None:
        keep(report)
        os.write(1, f"{report.step} {report.loss.hex()} {report.norm.hex()}\n".encode())

    seen.on_step = tell  # type: ignore[method-assign]
    if rank == 0:
        times, save = os.open(f"{log}.saves", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), run.save

        def timed() -> Path:
            os.write(times, f"{time.monotonic()}\n".encode())
            place = save()
            os.write(times, f"{time.monotonic()}\n".encode())
            return place

        run.save = timed  # type: ignore[method-assign]
    run.fit()
    made = fingerprint(run)
    if rank == 0:
        os.write(1, f"done {made}\n".encode())


def main() -> None:
    """For every line "OUT STEPS LORA LOG WORLD" on stdin: train in forked processes that write LOG; says their numbers, then
    their ends.

    Importing torch takes seconds, training these models milliseconds: the fork is what makes hundreds of kills affordable.
    """
    torch.set_num_threads(1)
    children: list[int] = []
    for number, line in enumerate(sys.stdin):
        for child in children:
            os.waitpid(child, 0)
        out, steps, lora, log, ranks = line.split()
        world = int(ranks)
        children = [_child(Path(out), int(steps), lora == "1", log, rank, world, number) for rank in range(world)]
        print(*children, flush=True)
        # Their numbers stay their own until the next line comes.
        ends = [os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT) for child in children]
        print(*(end.si_status for end in ends if end is not None), flush=True)


def _child(out: Path, steps: int, lora: bool, log: str, rank: int, world: int, number: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for descriptor, name in ((1, log), (2, f"{log}.errors-{rank}")):
            os.dup2(
                os.open(name, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if rank == 0 else os.O_APPEND), 0o644), descriptor
            )
        train(out, steps, lora, rank, world, log, number)
        status = 0
    except HerdError as error:
        os.write(2, f"{error}\n".encode())
        status = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
