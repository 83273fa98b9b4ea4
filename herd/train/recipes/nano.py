"""Rebuild herd-nano, the small chat model that ships in the package, from the texts up.

    python -m herd.train.recipes.nano --data ../shared/data --out runs/nano --minutes 115

Stages, each skipped when its result is already in the folder given by --out:

1. vocabulary  byte-level BPE in the Llama 3 scheme                      -> tokenizer/
2. stable      constant learning rate on children's books                -> stable/checkpoints/
3. anneal      rate falls to zero on the simplest texts, a third chat   -> anneal/checkpoints/
4. chat        fine-tuning on conversations, loss on the replies only    -> chat/checkpoints/
5. export      Hugging Face folder                                       -> export/
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer

from herd.checkpoint.load import fill
from herd.checkpoint.open import open_store
from herd.data.batch import Loader
from herd.data.encode import Example, encode_chat, encode_text
from herd.data.pack import Rows, concatenate, pack_stream, pack_whole
from herd.data.read import RowReport
from herd.data.records import ChatRecord
from herd.model.config import ModelConfig, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.train.config import Budget, OptimConfig, SavePart, ScheduleConfig, TrainConfig
from herd.train.export import export_folder
from herd.train.measure import bits_per_byte
from herd.train.objective import NextToken
from herd.train.prepare import prepare_model
from herd.train.recipes.nano_card import write_card, write_credits
from herd.train.recipes.nano_chat import chat_rows
from herd.train.recipes.nano_check import SAMPLING, check
from herd.train.recipes.nano_format import Headers
from herd.train.recipes.nano_stories import story_rows
from herd.train.recipes.nano_texts import Text, anneal_texts, load_texts, stable_texts, validation_texts
from herd.train.state import latest
from herd.train.trainer import Trainer, load_weights
from herd.train.vocabulary import special_ids, train_vocabulary, write_tokenizer
from herd.train.watch import Begin, Silent, StepReport

SEED = 20
VOCAB_SIZE = 4096
DTYPE = torch.float16
CONTEXT = 512
SHORT = 256
"""Row length of the stable phase: half the context costs less and teaches the same words."""

CONFIG = ModelConfig(
    dim=256,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    hidden_dim=704,
    vocab_size=VOCAB_SIZE,
    layers=plain(6),
    norm_eps=1e-5,
    rope_theta=10_000.0,
    max_seq_len=CONTEXT,
    tie_embeddings=True,
)


def make_vocabulary(texts: list[Text], out: Path) -> FastTokenizer:
    """Stage 1: train the vocabulary on what the model will read, or open the one that is there."""
    path = out / "tokenizer"
    if not (path / "tokenizer.json").exists():
        read = [t.text for t in texts if t.grade <= 8] + 2 * [t.text for t in texts if t.kind == "picture"]
        write_tokenizer(train_vocabulary(read, VOCAB_SIZE), path, CONTEXT)
    return FastTokenizer.from_file(str(path / "tokenizer.json"))


def encode_texts(tokenizer: FastTokenizer, texts: list[Text]) -> list[Example]:
    """Documents to examples, in order."""
    special = special_ids(tokenizer)
    bos, eos = special["<|begin_of_text|>"], special["<|end_of_text|>"]
    encoded = tokenizer.encode_batch([t.text for t in texts], add_special_tokens=False)
    return [encode_text(e.ids, bos=bos, eos=eos) for e in encoded]


def make_evaluation(tokenizer: FastTokenizer, data: Path) -> Callable[[Llama], dict[str, float]]:
    """Held-out bits per byte on the children's documents of eval/lm_valid."""
    documents = [(tokenizer.encode(t, add_special_tokens=False).ids, len(t.encode())) for t in validation_texts(data)]
    bos = special_ids(tokenizer)["<|begin_of_text|>"]
    return lambda model: {"bits_per_byte": bits_per_byte(model, documents, bos, CONTEXT - 1)}


def stable_rows(tokenizer: FastTokenizer, texts: list[Text]) -> Rows:
    """One epoch of the stable phase in a shuffled order, packed."""
    pool = stable_texts(texts)
    random.Random(SEED).shuffle(pool)
    return pack_stream(encode_texts(tokenizer, pool), SHORT)


def chat_rows_packed(headers: Headers, records: Sequence[ChatRecord]) -> Rows:
    """Conversations in whole rows; those longer than the context are counted and left out."""
    examples = [encode_chat(record, headers) for record in records]
    rows, too_long = pack_whole(examples, CONTEXT, headers.special["<|finetune_right_pad_id|>"])
    print(
        f"chat: {len(examples) - len(too_long)} conversations, {len(too_long)} too long, {len(rows)} rows", flush=True
    )
    return rows


def anneal_rows(tokenizer: FastTokenizer, texts: list[Text], data: Path) -> Rows:
    """One epoch of the decay phase: the simplest texts and about a third of conversations."""
    pool = anneal_texts(texts)
    random.Random(SEED + 1).shuffle(pool)
    headers = Headers(tokenizer)
    records = story_rows(texts, SEED + 2, made=5000) + chat_rows(SEED + 2, data)
    return concatenate([pack_stream(encode_texts(tokenizer, pool), CONTEXT), chat_rows_packed(headers, records)])


def tuning_rows(tokenizer: FastTokenizer, texts: list[Text], data: Path) -> Rows:
    """One epoch of the fine-tune: stories and questions."""
    records = story_rows(texts, SEED + 3, made=1600) + chat_rows(SEED + 3, data, repeat=3)
    return chat_rows_packed(Headers(tokenizer), records)


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase of training: share of the minutes, rows of its data, and rates."""

    name: str
    share: float
    rows: Callable[[], Rows]
    batch_rows: int
    accumulate: int
    warmup: int
    decay: float
    muon_lr: float
    adam_lr: float


class Lines(Silent):
    """A line now and then, and one for each evaluation."""

    def __init__(self, every: int) -> None:
        self.every, self.seconds, self.tokens = every, 0.0, 0

    def on_begin(self, info: Begin) -> None:
        self.seconds, self.tokens = info.seconds, info.tokens
        if info.resumed is not None:
            print(f"continuing from {info.resumed}", flush=True)

    def on_step(self, report: StepReport) -> None:
        if report.step % self.every:
            return
        speed = (report.all_tokens - self.tokens) / max(1e-9, report.all_seconds - self.seconds)
        self.seconds, self.tokens = report.all_seconds, report.all_tokens
        left = report.all_seconds * (1 - report.progress) / max(report.progress, 1e-9)
        print(
            f"step {report.step} loss {report.loss:.4f} norm {report.norm:.2f} rate {report.rate:.2e} "
            f"tokens {report.all_tokens / 1e6:.2f}M {speed:.0f} tok/s {report.progress:.1%} eta {left / 60:.1f} min",
            flush=True,
        )

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        print(f"step {step} " + " ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)

    def on_note(self, text: str) -> None:
        print(text, flush=True)


def run_stages(
    args: argparse.Namespace, stages: Sequence[Stage], evaluate: Callable[[Llama], dict[str, float]]
) -> Llama:
    """Run or continue each stage; a stage whose budget is used up is only loaded."""
    model = init_weights(Llama(CONFIG))
    before: Path | None = None
    for stage in stages:
        out = args.out / stage.name
        config = TrainConfig(
            budget=Budget(minutes=args.minutes * stage.share),
            schedule=ScheduleConfig(warmup_steps=stage.warmup, decay_fraction=stage.decay),
            optim=OptimConfig(kind="muon", muon_lr=stage.muon_lr, lr=stage.adam_lr),
            accumulate=stage.accumulate,
            compile=not args.eager,
            save=SavePart(every_minutes=3.0),
        )
        if before is None:
            prepare_model(model, config)
        rows = stage.rows()
        print(
            f"{stage.name}: {rows.tokens.size / 1e6:.2f}M tokens an epoch, {rows.learned / 1e6:.2f}M learned",
            flush=True,
        )
        loader = Loader(rows, stage.batch_rows, SEED)
        lines = Lines(config.log_every)
        trainer = Trainer(model, NextToken(), loader, config, out=out, evaluate=evaluate, watchers=[lines])
        if before is not None and latest(out) is None:
            trainer.adopt(before)
        trainer.fit()
        before = latest(out, lines.on_note)
    return model


def export(model: Llama, tokenizer: FastTokenizer, args: argparse.Namespace) -> None:
    """Stage 5: the folder that ships, checked by asking it."""
    folder = args.out / "export"
    headers = Headers(tokenizer)
    stop = [headers.special[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    bos, pad = headers.special["<|begin_of_text|>"], headers.special["<|finetune_right_pad_id|>"]
    export_folder(model, folder, DTYPE, bos=bos, stop=stop, pad=pad, sampling=SAMPLING)
    write_tokenizer(tokenizer, folder, CONTEXT)
    shipped = fill(open_store(folder), dtype=torch.float32)
    write_credits(folder, args.data)
    evaluate = make_evaluation(tokenizer, args.data)
    base = Llama(CONFIG)
    load_weights(args.out / "anneal", base)
    bits = (evaluate(base)["bits_per_byte"], evaluate(shipped)["bits_per_byte"])
    write_card(folder, shipped, check(shipped, headers), bits, args.out)


def main() -> None:
    """Run the stages that are still to be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data collection")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--minutes", type=float, default=115.0, help="training time of all stages together")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--eager", action="store_true", help="do not compile (slower steps, no start-up cost)")
    parser.add_argument("--until", choices=("stable", "anneal", "chat", "export"), default="export")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    report = RowReport()
    texts = load_texts(args.data, report)
    report.check()
    tokenizer = make_vocabulary(texts, args.out)
    stages = [
        Stage("stable", 0.56, lambda: stable_rows(tokenizer, texts), 16, 2, 60, 0.0, 0.02, 3e-3),
        Stage("anneal", 0.22, lambda: anneal_rows(tokenizer, texts, args.data), 8, 2, 0, 1.0, 0.02, 3e-3),
        Stage("chat", 0.22, lambda: tuning_rows(tokenizer, texts, args.data), 8, 1, 20, 1.0, 0.01, 1.5e-3),
    ]
    names = [stage.name for stage in stages]
    wanted = stages if args.until == "export" else stages[: names.index(args.until) + 1]
    model = run_stages(args, wanted, make_evaluation(tokenizer, args.data))
    if args.until == "export":
        export(model, tokenizer, args)


if __name__ == "__main__":
    main()
