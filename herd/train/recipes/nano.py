"""Rebuild herd-nano, the small chat model that ships in the package, from the texts up.

    python -m herd.train.recipes.nano --data ../shared/data --out runs/nano

Nothing here trains in a way of its own: data are files, and the two runs are configurations that `herd train` takes, in folders
that `herd train runs/nano/pretrain` goes on with and `herd plot` draws. What is done already is not done again:

1. data        texts and conversations, as rows                                  -> data/
2. vocabulary  as `herd tokenizer train` learns it                               -> tokenizer/
3. pretrain    texts; then, as the rate falls, simpler ones and a quarter chat   -> pretrain/
4. chat        conversations, loss on the replies; a quarter stays text          -> chat/
5. export      the folder that ships, asked and measured                         -> export/
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from herd.chat.formats import detect
from herd.chat.templates import template_of
from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.vocabulary import tokenizer_of
from herd.checkpoint.write.atomic import new_folder
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.source import Source
from herd.errors import HerdError
from herd.files import read_json
from herd.train.config import RunConfig
from herd.train.overrides import load_config
from herd.train.recipes.nano_card import CLOCK, write_card, write_credits
from herd.train.recipes.nano_check import SAMPLING, check, held_out_bits
from herd.train.recipes.nano_data import HELD_OUT, make_vocabulary, write_data
from herd.train.run import run_recipe
from herd.train.watch import Begin, Silent, StepReport

__all__ = ["chat", "main", "pretrain"]

SHAPE = {
    "dim": 256,
    "n_layers": 6,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 64,
    "hidden_dim": 704,
    "norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_embeddings": True,
}
CONTEXT = 512
TOKENS = 18_800_000
"""Of both runs together: what the first herd-nano read in 110 minutes on one core. A budget of tokens gives the same weights
again, whatever else the machine does meanwhile; one of minutes does not."""
SHARE = {"pretrain": 0.83, "chat": 0.17}
"""Of the tokens."""
LAST = {"books": 0.41, "simple": 0.15, "pictures": 0.12, "news": 0.07, "stories": 0.08, "talk": 0.17}
"""What is read while the rate falls: the texts as before, simpler ones more often, and a quarter of conversations."""
DECAY = 0.35
"""The share of pretraining in which the rate falls to zero."""


def pretrain(out: Path, tokens: int, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that learns to write: constant rate on all texts, then falling rate on simpler ones, with conversations.

    The longer and the later the rate falls over what is wanted, the more of it stays; conversations come in here already, so
    that the fine-tune has little to move.
    """
    stages = [
        {"until": 1 - DECAY, "weights": {"books": 0.83, "pictures": 0.12, "news": 0.05}},
        {"until": 1.0, "weights": LAST},
    ]
    sources = [{"path": str(out / "data" / f"{name}.jsonl"), "max_epochs": 8.0} for name in LAST]
    return load_config(
        {
            "recipe": "pretrain",
            "out": str(out / "pretrain"),
            "model": {
                "shape": SHAPE,
                "tokenizer": str(out / "tokenizer"),
                "save_dtype": "float32",
                "seed": 20,
            },
            "data": {"sources": sources, "stages": stages, "seed": 20, "chat_format": "llama3", **_data(out)},
            "train": {
                "budget": {"tokens": round(tokens * SHARE["pretrain"])},
                "schedule": {"kind": "wsd", "warmup_steps": 60, "decay_fraction": DECAY},
                "optim": {"kind": "muon", "muon_lr": 0.015, "lr": 2.5e-3, "muon_dtype": "bfloat16"},
                "accumulate": 2,
                "evaluate": {
                    "every_steps": 1000,
                    "every_minutes": None,
                    "prompts": ["Once upon a time there was a little dog"],
                },
                **_loop(),
            },
            "device": "cpu",
        },
        overrides,
    )


def chat(out: Path, tokens: int, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that learns to answer. A quarter of the rows stays text: without it the model forgets how books are written."""
    weights = {"talk": 0.48, "stories": 0.27, "books": 0.13, "simple": 0.05, "pictures": 0.05, "news": 0.02}
    sources = [
        {"path": str(out / "data" / f"{name}.jsonl"), "weight": weight, "max_epochs": 8.0}
        for name, weight in weights.items()
    ]
    return load_config(
        {
            "recipe": "sft",
            "out": str(out / "chat"),
            "model": {"source": str(out / "pretrain" / "model"), "save_dtype": "float16"},
            "data": {"sources": sources, "seed": 21, "chat_format": "llama3", **_data(out)},
            "train": {
                "budget": {"tokens": round(tokens * SHARE["chat"])},
                "schedule": {"kind": "linear", "warmup_steps": 30},
                "optim": {"kind": "muon", "muon_lr": 0.01, "lr": 1.5e-3, "muon_dtype": "bfloat16"},
                "accumulate": 2,
                "evaluate": {
                    "every_steps": 400,
                    "every_minutes": None,
                    "prompts": ["tell me a story about a dog", "what is 9 minus 4", "who are you"],
                    "max_tokens": 300,
                },
                **_loop(),
            },
            "device": "cpu",
        },
        overrides,
    )


def _data(out: Path) -> dict[str, Any]:
    return {
        "length": CONTEXT,
        "rows": 4,
        "long_rows": "skip",
        "held_out": str(out / "data" / HELD_OUT),
        "shards": str(out / "shards"),
    }


def _loop() -> dict[str, Any]:
    """Products in bfloat16 over float32 weights: two thirds of the time where a processor multiplies them. Compiled blocks."""
    return {"precision": "bfloat16", "compile": True, "save": {"every_minutes": 5.0}, "log_every": 20}


def say(text: str) -> None:
    """A line of the log, at once."""
    print(text, flush=True)


class Lines(Silent):
    """A line now and then, and one for each evaluation; and the processor time of the run in `folder`, over all its parts."""

    def __init__(self, folder: Path, every: int = 20) -> None:
        self.clock, self.every = folder / CLOCK, every
        self.seconds, self.tokens, self.used = 0.0, 0, 0.0

    def on_begin(self, info: Begin) -> None:
        self.seconds, self.tokens = info.seconds, info.tokens
        before = read_json(self.clock)["cpu_seconds"] if info.resumed is not None and self.clock.exists() else 0.0
        self.used = before - time.process_time()
        if info.resumed is not None:
            say(f"continuing from {info.resumed}")

    def on_step(self, report: StepReport) -> None:
        used = self.used + time.process_time()
        self.clock.write_text(json.dumps({"cpu_seconds": round(used, 1)}), encoding="utf-8")
        if report.step % self.every and report.progress < 1:
            return
        speed = (report.all_tokens - self.tokens) / max(1e-9, report.all_seconds - self.seconds)
        self.seconds, self.tokens = report.all_seconds, report.all_tokens
        say(
            f"step {report.step} loss {report.loss:.4f} norm {report.norm:.2f} rate {report.rate:.2e} "
            f"tokens {report.all_tokens / 1e6:.2f}M {speed:.0f} tok/s {report.progress:.1%} cpu {used / 60:.1f} min"
        )

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        say(f"step {step} " + " ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def on_text(self, step: int, prompt: str, reply: str) -> None:
        say(f"step {step} {prompt} -> {reply}")

    def on_note(self, text: str) -> None:
        say(text)


def export(out: Path, collection: Path) -> None:
    """The folder that ships: the chat run's model with the sampling that goes with it, and a card with its figures."""
    folder, store = out / "export", open_store(out / "chat" / "model")
    tokenizer = tokenizer_of(store)
    defaults = replace(getattr(store, "generation", GenerationDefaults()), **SAMPLING)
    shipped = fill(store, dtype=torch.float32)
    base = fill(open_store(out / "pretrain" / "model"), dtype=torch.float32)
    bits = [held_out_bits(model, tokenizer, collection) for model in (base, shipped)]
    checked = check(shipped, tokenizer, detect(tokenizer))
    with new_folder(folder, overwrite=True) as place:
        write_hf(Source(store, tokenizer, defaults, template_of("llama3")), place)
        write_credits(place, collection)
        write_card(place, shipped, checked, (bits[0], bits[1]), out)
    say(
        f"{folder}: {bits[0]:.4f} bits per byte before the chat stage, {bits[1]:.4f} after it; {checked.right} of "
        f"{checked.asked} questions, {checked.stopped} of {checked.asked + checked.stories} replies ended"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is still to be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data collection")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="read by both runs together")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--until", choices=("data", "pretrain", "chat", "export"), default="export")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="keys of both runs, for example train.compile=false"
    )
    args = parser.parse_args(argv)
    write_data(args.data, args.out / "data", say)
    make_vocabulary(args.out / "data", args.out / "tokenizer", say)
    for name, configured in (("pretrain", pretrain), ("chat", chat)):
        if args.until == "data":
            return
        if not (args.out / name / "model" / "config.json").exists():
            config = configured(args.out, args.tokens, [f"threads={args.threads}", *args.overrides])
            run_recipe(config, watchers=[Lines(Path(config.out))], tell=say)
        if args.until == name:
            return
    export(args.out, args.data)


if __name__ == "__main__":
    try:
        main()
    except HerdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
