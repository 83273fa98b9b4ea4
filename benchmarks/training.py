"""Training beside transformers (and PEFT): tokens a second, peak memory, share of what the machine's products can do.

    python benchmarks/training.py [--only full-fp32,lora-bf16,...] [--rounds 5] [--threads 2] [--json FILE] [--write]

One process per player, the same weights (a folder both open), the same batches, AdamW fused in both, gradients clipped in both;
the first loss of both must agree before anything is timed. Steps are interleaved, a step of each player in turn; figures are
medians, with the quartiles beside them, and beside seconds of the clock those of the processor, which other programs on the
machine change less. In each round the peak of this machine's matrix products is measured, too (random
numbers, the model's own shapes), and MFU is the causal count over that. Peak memory is the process's largest resident size.

transformers runs as its Trainer would: eager, sdpa; in bf16 under autocast over float32 weights (full), or with a bf16 base and
PEFT's float32 factors (lora; with and without autocast, the faster one counts). `--write` puts the section into results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.md")
SHAPE = {
    "hidden_size": 640, "num_hidden_layers": 10, "num_attention_heads": 10, "num_key_value_heads": 5,
    "intermediate_size": 1728, "vocab_size": 32000, "tie_word_embeddings": True, "max_position_embeddings": 2048,
    "head_dim": 64,
}  # fmt: skip
ROWS, LENGTH, RANK = 2, 512, 16
CASES: dict[str, list[str]] = {
    "full-fp32": ["transformers", "herd", "herd-compile"],
    "full-bf16": ["transformers", "herd", "herd-compile"],
    "lora-fp32": ["transformers", "herd", "herd-compile"],
    "lora-bf16": ["transformers", "transformers-autocast", "herd", "herd-compile"],
    "chats-fp32": ["transformers", "herd", "herd-compile"],
    "qlora-bf16": ["herd"],
}
"""full, lora: rows of 512 tokens, all learned. chats: lora on conversations of 40 to 512 tokens of which the second half is
learned: padded to the longest for transformers, packed with document borders for herd; tokens are those of conversations."""
AGREE = {"fp32": 2e-4, "bf16": 3e-2}
"""How far first losses may be apart, in nats a token."""


# A player, in a process of its own


def batches(case: str, player: str) -> tuple[list[Any], int, int]:
    """([(tokens, labels, positions or mask)], tokens that count, supervised) of one step."""
    import torch

    random = torch.Generator().manual_seed(3)
    if not case.startswith("chats"):
        tokens = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH), generator=random)
        labels = torch.cat([tokens[:, 1:], torch.full((ROWS, 1), -100)], 1)
        positions = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
        return [(tokens, labels, positions)], tokens.numel(), int((labels != -100).sum())
    lengths = [40, 90, 130, 170, 210, 260, 300, 512, 77, 259]
    texts = [torch.randint(0, SHAPE["vocab_size"], (n,), generator=random) for n in lengths]
    targets = [
        torch.cat([torch.full((n // 2,), -100), t[n // 2 + 1 :], torch.tensor([-100])])
        for n, t in zip(lengths, texts, strict=True)
    ]
    count, learned = sum(lengths), sum(int((t != -100).sum()) for t in targets)
    if player.startswith("transformers"):
        parts = []
        for start in range(0, len(texts), 5):
            some, wanted = texts[start : start + 5], targets[start : start + 5]
            pad = torch.nn.utils.rnn.pad_sequence
            tokens, labels = pad(some, True, 0), pad(wanted, True, -100)
            mask = pad([torch.ones(len(t), dtype=torch.int64) for t in some], True, 0)
            parts.append((tokens, labels, mask))
        return parts, count, learned
    rows = [[7], [6, 4], [9, 5], [3, 2, 1, 8, 0]]  # best fit into 512; the last one has 507
    parts = []
    for two in (rows[:2], rows[2:]):
        made = []
        for row in two:
            tokens, labels = torch.cat([texts[i] for i in row]), torch.cat([targets[i] for i in row])
            positions = torch.cat([torch.arange(lengths[i]) for i in row])
            extra = LENGTH + 8 - len(tokens)
            grow = torch.nn.functional.pad
            made.append(
                (
                    grow(tokens, (0, extra)),
                    grow(labels, (0, extra), value=-100),
                    torch.cat([positions, torch.arange(extra)]),
                )
            )
        parts.append(tuple(torch.stack(column) for column in zip(*made, strict=True)))
    return parts, count, learned


def theirs(case: str, player: str, folder: str) -> tuple[Callable[[], float], dict[str, Any]]:
    import contextlib

    import torch
    from transformers import AutoModelForCausalLM

    method, _, kind = case.partition("-")
    narrow = kind == "bf16"
    held = torch.bfloat16 if narrow and method != "full" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=held, attn_implementation="sdpa")
    if method != "full":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    auto = narrow and (method == "full" or player.endswith("autocast"))
    parts, _, learned = batches(case, player)

    def step() -> float:
        total = 0.0
        for tokens, labels, mask in parts:
            with torch.autocast("cpu", torch.bfloat16) if auto else contextlib.nullcontext():
                padded = mask if case.startswith("chats") else None
                # `labels` of transformers are shifted inside; giving it unshifted ones is what its Trainer does.
                unshifted = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], 1)
                loss = model(input_ids=tokens, attention_mask=padded, labels=unshifted, num_items_in_batch=learned).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return total

    return step, {"parameters": sum(p.numel() for p in model.parameters()), "trained": sum(p.numel() for p in trained)}


def ours(case: str, player: str, folder: str) -> tuple[Callable[[], float], dict[str, Any]]:
    import torch

    from herd.adapters.apply import LoraConfig, apply_lora
    from herd.checkpoint.load import load_model
    from herd.data.batch import TokenBatch
    from herd.train.config import Budget, OptimConfig, TrainConfig
    from herd.train.memory import keep_freed_memory
    from herd.train.objective import NextToken
    from herd.train.optim import make_optimisers
    from herd.train.prepare import prepare_model

    keep_freed_memory()
    method, _, kind = case.partition("-")
    narrow = kind == "bf16"
    held = torch.bfloat16 if narrow and method != "full" else torch.float32
    model = load_model(Path(folder), dtype=held, weights="nf4" if method == "qlora" else "plain")
    if method != "full":
        torch.manual_seed(0)
        apply_lora(model, LoraConfig(rank=RANK, alpha=32))
    else:
        model.requires_grad_(True)
    model.train()
    config = TrainConfig(
        budget=Budget(steps=1), optim=OptimConfig(lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999)),
        precision="bfloat16" if narrow else "float32", compile=player.endswith("compile"),
    )  # fmt: skip
    prepare_model(model, config)
    optimisers = make_optimisers(model, config.optim)
    trained = [p for p in model.parameters() if p.requires_grad]
    objective = NextToken(chunk=config.loss_chunk)
    parts, _, learned = batches(case, player)
    ready = [TokenBatch(*part) for part in parts]

    def step() -> float:
        total = 0.0
        for batch in ready:
            loss = objective(model, batch).total / learned
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return total

    held_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    matrices = {id(m.matrix): m.matrix.nbytes for m in model.modules() if hasattr(m, "matrix")}
    return step, {"trained": sum(p.numel() for p in trained), "frozen_bytes": held_bytes + sum(matrices.values())}


def limits(case: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """Products of the model's own shapes, random numbers: operations a second of the best one."""
    import torch

    dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
    tokens = ROWS * LENGTH
    shapes = [(tokens, 640, 1728), (tokens, 1728, 640), (tokens, 640, 640)]
    pairs = [(torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)) for m, k, n in shapes]

    def step() -> float:
        best = 0.0
        for a, b in pairs:
            for _ in range(6):
                began = time.perf_counter()
                torch.mm(a, b)
                best = max(best, 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - began))
        return best

    return step, {}


def worker(case: str, player: str, folder: str, threads: int) -> None:
    """Answer every line with a step: one JSON object each."""
    import torch

    torch.set_num_threads(threads)
    before = _peak()
    if player == "limits":
        step, facts = limits(case)
    else:
        step, facts = (theirs if player.startswith("transformers") else ours)(case, player, folder)
        facts["tokens"] = batches(case, player)[1]
    print(json.dumps({"facts": facts, "before": before}), flush=True)
    for _ in sys.stdin:
        began, used = time.perf_counter(), time.process_time()
        value = step()
        took = {"seconds": time.perf_counter() - began, "processor": time.process_time() - used}
        print(json.dumps(took | {"value": value, "peak": _peak()}), flush=True)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


# The parent


class Player:
    """A worker's process."""

    def __init__(self, case: str, name: str, folder: str, threads: int) -> None:
        self.name = name
        command = [sys.executable, __file__, "--worker", json.dumps([case, name, folder, threads])]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.begun: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"{self.name} ended: run its worker by hand to see why")
            if line.startswith("{"):
                return json.loads(line)

    def begin(self) -> None:
        """Wait until it is ready."""
        self.begun = self._read()

    def step(self, keep: bool = True) -> dict[str, Any]:
        """One step, timed inside."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found = self._read()
        if keep:
            self.steps.append(found)
        return found

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(case: str, folder: str, rounds: int, threads: int) -> dict[str, Any]:
    """One case: all players beside each other."""
    players = [Player(case, name, folder, threads) for name in CASES[case]]
    machine = Player(case, "limits", folder, threads)
    for p in (*players, machine):
        p.begin()
    first = {p.name: p.step(keep=False)["value"] for p in players}
    for p in players:
        p.step(keep=False)
    usual = first.get("transformers", next(iter(first.values())))
    tolerance = AGREE["bf16" if case.endswith("bf16") else "fp32"]
    if max(abs(value - usual) for value in first.values()) > tolerance:
        raise SystemExit(f"{case}: the players do not compute the same loss: {first}")
    for at in range(rounds):
        machine.step()
        for p in players if at % 2 == 0 else reversed(players):
            p.step()
    found: dict[str, Any] = {"case": case, "losses": first, "peak_flops": max(s["value"] for s in machine.steps)}
    for p in players:
        seconds = sorted(s["seconds"] for s in p.steps)
        low, _, high = statistics.quantiles(seconds, n=4)
        tokens = p.begun["facts"]["tokens"]
        found[p.name] = {
            "tokens_s": tokens / statistics.median(seconds), "low": tokens / high, "high": tokens / low,
            "processor_tokens_s": tokens / statistics.median(s["processor"] for s in p.steps),
            "peak": p.steps[-1]["peak"], "before": p.begun["before"], **p.begun["facts"],
        }  # fmt: skip
    for p in (*players, machine):
        p.end()
    return found


def work(case: str) -> float:
    """Operations of a trained token, causal count."""
    from herd.model.config import ModelConfig, plain
    from herd.train.throughput import work_of

    config = ModelConfig(
        dim=640,
        n_heads=10,
        n_kv_heads=5,
        head_dim=64,
        hidden_dim=1728,
        vocab_size=32000,
        layers=plain(10),
        tie_embeddings=True,
    )
    lora = None if case.startswith("full") else 10 * RANK * (2 * 640 + 2 * (640 + 320) + 640 * 2 + 3 * (640 + 1728))
    return work_of(config, LENGTH, lora).attention


def table(results: list[dict[str, Any]], threads: int) -> str:
    """The section of results.md."""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    import torch
    import transformers

    lines = [
        "## Training",
        "",
        f"`python benchmarks/training.py`: a model of 66 M parameters (10 layers of 640, 32,000 tokens, tied), {ROWS} rows of "
        f"{LENGTH} tokens a step, {threads} threads of {cpu}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}. Medians of interleaved steps (quartiles in "
        "brackets); MFU is the causal count over "
        "the products measured in the same run; memory is the process's peak, the libraries included.",
        "",
        "| case | player | tokens/s | x transformers | tokens a processor second | x transformers | MFU | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        peers = [r[n] for n in CASES[r["case"]] if n.startswith("transformers")]
        for name in CASES[r["case"]]:
            f = r[name]
            share = work(r["case"]) * f["tokens_s"] / r["peak_flops"]
            ratio, used = (
                f"{f[key] / max(peer[key] for peer in peers):.2f}" if peers else ""
                for key in ("tokens_s", "processor_tokens_s")
            )
            mfu = (
                f"{100 * share:.0f} % of {r['peak_flops'] / 1e9:.0f} GFLOP/s"
                if not r["case"].startswith("chats")
                else ""
            )
            lines.append(
                f"| {r['case']} | {name} | {f['tokens_s']:.0f} ({f['low']:.0f} to {f['high']:.0f}) | {ratio} | "
                f"{f['processor_tokens_s']:.0f} | {used} | {mfu} | {f['peak'] / 1e9:.2f} GB |"
            )
    frozen = {r["case"]: r["herd"]["frozen_bytes"] for r in results}
    if {"qlora-bf16", "lora-bf16"} <= frozen.keys():
        small, large = frozen["qlora-bf16"], frozen["lora-bf16"]
        lines += [
            "",
            f"QLoRA's base takes {small / 1e6:.1f} MB where LoRA's in bfloat16 takes {large / 1e6:.1f} MB: {small / large:.2f} "
            "(a third of this small model is its embedding, in Q8_0).",
        ]
    return "\n".join([*lines, ""])


def prepare(folder: str) -> None:
    """Random weights that both players open."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="keeps the weights here")
    parser.add_argument("--json", type=Path, help="adds one line a case to this file")
    parser.add_argument(
        "--write", action="store_true", help="writes the section Training of results.md, of all lines of --json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*json.loads(args.worker))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or scratch
        if not (Path(folder) / "config.json").exists():
            prepare(folder)
        results = []
        for case in filter(None, args.only.split(",")):
            results.append(measure(case, folder, args.rounds, args.threads))
            print(json.dumps(results[-1]), flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    if args.json and args.json.exists():
        latest = {r["case"]: r for r in map(json.loads, args.json.read_text().splitlines())}
        results = [latest[case] for case in CASES if case in latest]
    section = table(results, args.threads)
    print(section)
    if args.write:
        text = RESULTS.read_text()
        start = text.find("## Training\n")
        if start < 0:
            text = text.rstrip("\n") + "\n\n" + section
        else:
            end = text.find("\n## ", start + 1)
            text = text[:start] + section + ("" if end < 0 else text[end + 1 :])
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
