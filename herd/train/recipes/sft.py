"""Supervised fine-tuning: learning to answer as conversations do, by all weights or by an adapter (`method.kind`).

    herd train sft model.source=MODEL data.sources=chats.jsonl
    herd train lora model.source=MODEL data.sources=chats.jsonl        the same recipe with method.kind=lora
    herd recipes cp sft mine.py --python, then change it, then: python mine.py CONFIG.yaml [key=value ...]

What it does, in order: model, data, method, what is measured, the loop, the result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from herd.chat.base import BaseFormat
from herd.data.build import Progress
from herd.data.open import open_data
from herd.parallel import launch
from herd.parallel.prepare import prepare
from herd.train.config import RunConfig
from herd.train.objective import NextToken
from herd.train.overrides import load_config
from herd.train.prepare import prepare_model
from herd.train.qat import prepare_qat
from herd.train.router import Routers
from herd.train.run import Resume, budget_rows, facts_of, payload_of, result, settle, watchers_of
from herd.train.samples import Evaluation
from herd.train.start import adapt, device_of, start, unknown_format
from herd.train.trainer import Trainer
from herd.train.watch import Watcher

__all__ = ["run"]


def run(
    config: RunConfig,
    *,
    resume: Resume = "auto",
    exact: bool = True,
    watchers: Sequence[Watcher] = (),
    tell: Callable[[str], None] = print,
    tick: Callable[[Progress], None] = lambda progress: None,
    until: int | None = None,
) -> dict[str, float]:
    """Do the run that `config` describes, or go on with it; returns the last evaluation.

    `watchers` are told how it goes, `tell` what was decided on the way, `tick` how far loading, tokenizing and writing are.
    `until` stops earlier, after so many steps, without a result. Raises a HerdError that names the key to change, or Stopped
    after a signal.
    """
    settle(config)
    mesh = launch.start(config.parallel, device_of(config.device).type)

    # The model, and the prompt format in which it is asked and answers.
    def loading(done: int, total: int) -> None:
        tick(Progress("loading" if config.model.source else "drawing weights", done, total))

    begun = start(config, mesh.device, loading, later=mesh.world > 1)
    if isinstance(begun.format, BaseFormat):
        raise unknown_format(config)
    model = adapt(begun.model, config.method, config.model.seed)

    # The data: conversations as the format writes them, loss on what the assistant says.
    form, dp = begun.format, mesh.dp_size
    loader, held_out, report = open_data(
        config.data, begun.tokenizer, form, mesh.dp_rank, dp, total=budget_rows(config, dp), tick=tick, tell=tell
    )
    tell("\n".join(report.lines()))

    # The method on these machines: rounding, recomputing, low precision, compiling; cut over the ranks.
    if config.method.qat is not None:
        tell("\n".join(prepare_qat(model, config.method.qat)))
    spread = prepare(model, mesh, middle=lambda whole: prepare_model(whole, config.train), tick=loading)

    # What is learned, what is measured, and who is told.
    routers = Routers(model, config.train.router_aux, config.train.router_z)
    objective = NextToken(config.train.loss_chunk, mesh.packed, routers or None)
    judge = config.train.evaluate
    evaluation = Evaluation(objective, held_out, begun.tokenizer, form, judge.prompts, judge.max_tokens, spread)
    trainer = Trainer(
        model,
        objective,
        loader,
        config.train,
        out=Path(config.out),
        spread=spread,
        payload=payload_of(model.config, mesh),
        watchers=watchers_of(config, model, mesh, watchers),
        evaluate=evaluation if evaluation.measures else None,
        resume=resume,
        exact=exact,
        facts=facts_of(config, begun, report),
    )

    # The loop, and the result: a folder, or an adapter, that herd run and herd serve open.
    figures = trainer.fit(until)
    result(trainer, begun, config, tell, tick)
    return figures


if __name__ == "__main__":
    run(load_config(sys.argv[1], sys.argv[2:]))
