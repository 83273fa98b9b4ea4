"""Long contexts: texts in stages of growing length, each with rotary frequencies of its own.

    herd train extend model.source=MODEL data.sources=books/ out=runs/long

A stage is a run of `herd.train.recipes.pretrain` that starts from the weights of the one before, in a folder of its own
(OUT/stage-1-8192, ...; the last in OUT itself), with a fresh optimiser and schedule, and the data anew (in another order: what
one stage read may come again in the next). Stages that are finished are not repeated; one that was trained with other settings
than are asked for now is refused.
This is how Llama 3.1 went from 8K to 128K positions (arXiv 2407.21783, section 3.4.2: six stages), and Code Llama to 16K with
a rope_theta of 1,000,000 (arXiv 2308.12950, section 2.4).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from herd.data.build import Progress
from herd.errors import ConfigError
from herd.train.config import Budget, RunConfig
from herd.train.overrides import load_config
from herd.train.recipes import pretrain
from herd.train.run import CONFIG, ConfigFile, Resume, unlike
from herd.train.start import stored_dtype
from herd.train.watch import Watcher

__all__ = ["run", "stage"]


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
    """Do the stages that are still to be done; returns the last evaluation. See `pretrain.run`; `until` is for each stage."""
    figures: dict[str, float] = {}
    for number, part in enumerate(config.stages, start=1):
        this = stage(config, number)
        last = number == len(config.stages)
        if not last and (Path(this.out) / "model" / "config.json").exists():
            if lines := unlike(load_config(Path(this.out) / CONFIG), this):
                told = f"{this.out} is a stage of another run than this one:\n  " + "\n  ".join(lines)
                if exact:
                    raise ConfigError(
                        f"{told}\nRestore these settings, go on all the same (--inexact), or choose another `out`"
                    )
                tell(told)
            tell(f"stage {number} of {len(config.stages)}, {part.length} positions: done, see {this.out}")
            continue
        tell(f"stage {number} of {len(config.stages)}: rows of {part.length} positions, in {this.out}")
        going_on = resume if last or resume in ("auto", "never") else "auto"  # a path is a checkpoint of the last stage
        more = (*watchers, ConfigFile(config))  # the folder goes on with all stages, not with one
        figures = pretrain.run(this, resume=going_on, exact=exact, watchers=more, tell=tell, tick=tick, until=until)
    return figures


def stage(config: RunConfig, number: int) -> RunConfig:
    """The run of the `number`-th stage, from 1."""
    part, last = config.stages[number - 1], number == len(config.stages)
    share = part.share / sum(each.share for each in config.stages)
    model = config.model
    save_dtype = model.save_dtype or stored_dtype(model)
    if number > 1:  # what the stage before wrote, frequencies included
        before = Path(_folder(config, number - 1)) / "model"
        model = replace(model, source=str(before), shape=None, tokenizer="", rope_theta=None, rope_scaling=None)
    model = replace(
        model,
        rope_theta=part.rope_theta or model.rope_theta,
        rope_scaling=part.rope_scaling or model.rope_scaling,
        max_seq_len=part.length,
        save_dtype=save_dtype if last else "float32",  # what the next stage starts from is not rounded
    )
    rows = part.rows or max(1, config.data.rows * config.data.length // part.length)
    return replace(
        config,
        recipe="pretrain",
        out=_folder(config, number),
        model=model,
        data=replace(config.data, length=part.length, rows=rows),
        train=replace(config.train, budget=_share(config.train.budget, share)),
        stages=(),
    )


def _folder(config: RunConfig, number: int) -> str:
    if number == len(config.stages):
        return config.out
    return str(Path(config.out) / f"stage-{number}-{config.stages[number - 1].length}")


def _share(budget: Budget, share: float) -> Budget:
    """That share of every limit."""
    steps = None if budget.steps is None else max(1, round(budget.steps * share))
    tokens = None if budget.tokens is None else max(1, round(budget.tokens * share))
    return Budget(steps=steps, tokens=tokens, minutes=None if budget.minutes is None else budget.minutes * share)


if __name__ == "__main__":
    run(load_config(sys.argv[1], sys.argv[2:]))
