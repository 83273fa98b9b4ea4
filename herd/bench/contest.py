"""Players take turns at the same work, round after round, and between them the machine shows what it can do at all."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from herd.bench.gpu_goals import eighth_bytes, goals
from herd.bench.machine import last_level_cache, load_average, machine
from herd.bench.material import gguf_file, hf_folder, step_bytes
from herd.bench.players.base import Setup
from herd.bench.process import Process, check_peers
from herd.bench.subject import Subject, prompts
from herd.checkpoint.open import open_store
from herd.errors import ConfigError
from herd.model.accounting import flops_per_token, kv_bytes_per_token, parameters

__all__ = ["QUIET", "Plan", "Task", "contest", "described", "files_of", "weight_bytes"]

Task = Literal["decode", "prefill", "batch", "cold-start"]
Say = Callable[[str, int, int], None]
"""(what is being done, done, in all)."""

QUIET = 0.05
"""Other programs' share of the cores below which a sample counts as quiet."""
SMALL = 10_000_000
"""Parameters."""
KV_BYTES = 2
"""Of one number in the cache: bfloat16 for herd and transformers, float16 for llama.cpp."""
FORMS = {"BF16": ("F16", "BF16")}
"""What llama.cpp is measured with beside herd's weights, where that is not the same: its float16 kernels are its best ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to measure. `kinds` are GGUF mixes, None the file as it is; `tries` samples at most are taken for a quiet one."""

    task: Task
    subject: Subject
    kinds: Sequence[str | None]
    threads: int
    folder: Path
    prompt: int = 128
    tokens: int = 64
    batches: Sequence[int] = (1,)
    runs: int = 5
    tries: int = 1
    peers: Sequence[str] = ()
    device: str = "cpu"


@dataclass(slots=True)
class _Contestant:
    """A player's process with what its figures are held against."""

    process: Process
    who: str
    kind: str
    step_bytes: int
    file_bytes: int
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    set_aside: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    resident: int | None = None


def contest(plan: Plan, say: Say = lambda what, done, total: None) -> dict[str, Any]:
    """Everything that was measured, as plain data: {"machine", "plan", "limits", "rows", "agreement", "notes"}.

    Raises ConfigError for plans that make no sense and peers that are not there, BenchError when a player fails.
    """
    _check(plan)
    check_peers(list(plan.peers))
    report: dict[str, Any] = {"machine": machine(), "plan": described(plan), "limits": {}, "rows": []}
    report |= {"agreement": [], "notes": []}
    for kind in plan.kinds:
        _one_kind(plan, kind, report, say)
    report["machine"]["load_after"] = load_average()
    return report


def _check(plan: Plan) -> None:
    config, length = plan.subject.config, _length(plan)
    if length > config.max_seq_len:
        raise ConfigError(
            f"{length} positions are needed, and {plan.subject.name} has {config.max_seq_len}: shorten --prompt or --tokens"
        )
    if plan.device == "cpu" and "FP8" in plan.kinds:
        raise ConfigError("fp8 weights are measured on a GPU: a CPU has no products for them (--device cuda)")
    if plan.device != "cpu" and "llama.cpp" in plan.peers:
        raise ConfigError("llama.cpp is measured as it was built here, for the CPU: leave it out with --device")
    if plan.subject.path is None and None in plan.kinds:
        raise ConfigError("random weights have no type of their own: say which with --weights")


def _length(plan: Plan) -> int:
    return plan.prompt + (1 if plan.task == "prefill" else plan.tokens + 1)


def described(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    config = plan.subject.config
    return {
        "task": plan.task,
        "model": plan.subject.name,
        "random_weights": plan.subject.path is None,
        "parameters": parameters(config),
        "threads": plan.threads,
        "prompt": plan.prompt,
        "tokens": None if plan.task == "prefill" else plan.tokens,
        "batches": list(plan.batches),
        "runs": plan.runs,
        "tries": plan.tries,
        "peers": list(plan.peers),
        "device": plan.device,
    }


def _one_kind(plan: Plan, kind: str | None, report: dict[str, Any], say: Say) -> None:
    """All players with one type of weights."""
    files = files_of(plan, kind, say)
    setup: dict[str, Any] = {"threads": plan.threads, "sequences": max(plan.batches), "length": _length(plan)}
    setup["device"] = plan.device
    with ExitStack() as stack:
        limits = stack.enter_context(Process("limits", Setup("", plan.threads, 1, _bytes_to_read(plan), plan.device)))
        players = []
        for i, (player, label, path) in enumerate(files):
            say(f"{player} loads {label}", i, len(files))
            weights = label.lower() if label == "FP8" else None
            process = stack.enter_context(Process(player, Setup(str(path), **setup, weights=weights)))
            size = eighth_bytes(path) if label == "FP8" else step_bytes(path)
            players.append(_Contestant(process, player, label, size, weight_bytes(path)))
        if plan.device == "cpu":
            _note_cache(players[0], report)
        elif (why := players[0].process.facts["why_no_kernels"]) is not None:
            report["notes"].append(f"herd ran without its GPU kernels: {why}")
        if (why := players[0].process.facts["why_not_native"]) is not None and why not in report["notes"]:
            report["notes"].append(f"herd ran without its native kernels: {why}")
        report["agreement"] += _agreement(plan, players)
        readings, peaks, loads = [], [limits.ask("peaks")["value"]], [load_average()]
        for batch in plan.batches:
            readings += _rounds(plan, batch, players, limits, say)
            loads.append(load_average())
        peaks.append(limits.ask("peaks")["value"])
    best = max((statistics.median(r[way] for r in readings), way) for way in readings[0])
    peak = {name: max(p[name] for p in peaks) for name in peaks[0]}
    report["limits"][players[0].kind] = {
        "device": limits.facts.get("device"),
        "gb_per_s": round(best[0], 2),
        "read_with": best[1],
        "readings": readings,
        "gop_per_s": {name: round(rate, 1) for name, rate in peak.items()},
        "loads": loads,
    }
    for batch in plan.batches:
        own = _middle(players[0].samples[batch])
        rows = [_row(plan, batch, p, own, best[0], peak) for p in players]
        if plan.device != "cpu":
            rows[0]["goals"] = goals(rows, plan.prompt)
        report["rows"] += rows


def files_of(plan: Plan, kind: str | None, say: Say) -> list[tuple[str, str, Path]]:
    """(player, type of its weights, file) of everybody, herd first."""
    subject = plan.subject

    def gguf(kind: str) -> Path:
        return gguf_file(subject, kind, plan.folder, lambda done, total: say(f"writing {kind} weights", done, total))

    if kind is None:
        assert subject.path is not None
        own, label = subject.path, _stored(subject.path)
    else:
        own, label = gguf("BF16" if kind == "FP8" else kind), kind
    found = [("herd", label, own)]
    for peer in plan.peers:
        if peer == "transformers":
            folder = hf_folder(
                subject, plan.folder, lambda done, total: say("writing a Hugging Face folder", done, total)
            )
            found.append((peer, "BF16", folder))
        elif kind is None and own.suffix == ".gguf":
            found.append((peer, label, own))
        else:
            found += [(peer, form, gguf(form)) for form in FORMS.get(label, (label,))]
    return found


def _stored(path: Path) -> str:
    """The type of most weights of a checkpoint."""
    store = open_store(path)
    sizes: dict[str, int] = {}
    for name in store.names():
        info = store.info(name)
        sizes[info.stored] = sizes.get(info.stored, 0) + info.nbytes
    return max(sizes, key=sizes.__getitem__)


def weight_bytes(path: Path) -> int:
    """Bytes of all weights in a checkpoint."""
    store = open_store(path)
    return sum(store.info(name).nbytes for name in store.names())


def _bytes_to_read(plan: Plan) -> int:
    """For one reading of the bandwidth: far above any cache, except with models so small that nothing depends on it."""
    return 3 << 29 if parameters(plan.subject.config) > SMALL else 1 << 26


def _note_cache(own: _Contestant, report: dict[str, Any]) -> None:
    cache = last_level_cache()
    if cache is not None and own.step_bytes < 2 * cache:
        report["notes"].append(
            f"{own.kind}: the weights ({own.step_bytes / 1e6:.0f} MB) fit into the processor's last cache ({cache / 1e6:.0f} MB) "
            "or nearly so: GB/s are not those of the memory"
        )


def _agreement(plan: Plan, players: Sequence[_Contestant]) -> list[dict[str, Any]]:
    """How near the peers' logits are to herd's after the same prompt: nobody is fast by computing something else."""
    (prompt,) = prompts(plan.subject.config, min(plan.prompt, 32))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for player in players:
            file = str(Path(folder) / "logits")
            player.process.ask("logits", prompt=prompt, file=file)
            found.append(np.fromfile(file, "<f4").astype(np.float64))
    own = found[0]
    return [
        {
            "who": player.who,
            "weights": player.kind,
            "beside": f"herd {players[0].kind}",
            "cosine": round(float(own @ logits / np.sqrt((own @ own) * (logits @ logits))), 6),
            "same_first_token": bool(own.argmax() == logits.argmax()),
        }
        for player, logits in zip(players[1:], found[1:], strict=True)
    ]


def _rounds(
    plan: Plan, batch: int, players: Sequence[_Contestant], limits: Process, say: Say
) -> list[dict[str, float]]:
    """Fill the samples of `batch`; the machine's readings, one a round. Everybody has one turn before that does not count."""
    given = prompts(plan.subject.config, plan.prompt, batch)
    verb, words = ("prefill", {"prompt": given[0]}) if plan.task == "prefill" else ("decode", {"steps": plan.tokens})
    readings = []
    for player in players:
        if verb == "decode":
            player.process.ask("start", prompts=given)
        player.process.ask(verb, **words)
        player.samples[batch], player.set_aside[batch] = [], []
    for turn in range(plan.runs):
        readings.append(limits.ask("bandwidth")["value"])
        shift = turn % len(players)  # in a new order each round: nobody always comes after the same one
        for player in [*players[shift:], *players[:shift]]:
            work = f"{plan.task}{f' of {batch}' if batch > 1 else ''}"
            say(f"{work}, round {turn + 1} of {plan.runs}: {player.who} {player.kind}", turn, plan.runs)
            _sample(plan, batch, player, verb, words)
    return readings


def _sample(plan: Plan, batch: int, player: _Contestant, verb: str, words: dict[str, Any]) -> None:
    """One sample: the first quiet one of `tries`, or the quietest. The others are kept, apart."""
    taken = []
    for _ in range(plan.tries):
        answer = player.process.ask(verb, **words)
        taken.append(_figure(plan, batch, answer))
        player.resident = max(player.resident or 0, answer.get("resident") or 0) or None
        if (answer["others"] or 0.0) <= QUIET:
            break
    chosen = min(range(len(taken)), key=lambda i: taken[i]["others"] or 0.0)
    player.samples[batch].append(taken[chosen])
    player.set_aside[batch] += taken[:chosen] + taken[chosen + 1 :]


def _figure(plan: Plan, batch: int, answer: dict[str, Any]) -> dict[str, Any]:
    others = {"others": answer["others"], "load": (load_average() or [None])[0]}
    if plan.task == "prefill":
        rate = plan.prompt / answer["seconds"]
        return {"tokens_per_s": round(rate, 3), "cpu_seconds": round(answer["cpu_seconds"], 3), **others}
    steps = [clock for clock, _ in answer["value"]]
    return {
        "tokens_per_s": round(batch * len(steps) / sum(steps), 3),
        "step_median_ms": round(statistics.median(steps) * 1e3, 3),
        "step_min_ms": round(min(steps) * 1e3, 3),
        "cpu_seconds": round(sum(cpu for _, cpu in answer["value"]), 3),
        **others,
    }


def _middle(samples: Sequence[dict[str, Any]]) -> float:
    return statistics.median(sample["tokens_per_s"] for sample in samples)


def _by_cpu_time(plan: Plan, batch: int, samples: Sequence[dict[str, Any]]) -> float:
    """Tokens per second of one core's time: what is left to say on a machine that others use, best with one thread."""
    tokens = plan.prompt if plan.task == "prefill" else batch * plan.tokens
    return tokens / max(statistics.median(sample["cpu_seconds"] for sample in samples), 1e-9)


def _row(
    plan: Plan, batch: int, player: _Contestant, own: float, limit: float, peak: dict[str, float]
) -> dict[str, Any]:
    """The figures of one player. `share` is of the limit that binds: bytes for decoding, operations for prompts."""
    config, samples = plan.subject.config, player.samples[batch]
    rate = _middle(samples)
    values = [sample["tokens_per_s"] for sample in samples]
    context = plan.prompt + plan.tokens // 2
    row: dict[str, Any] = {
        "task": plan.task,
        "who": player.who,
        "weights": player.kind,
        "batch": batch,
        "tokens_per_s": round(rate, 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
        "others": max((sample["others"] for sample in samples if sample["others"] is not None), default=None),
        "tokens_per_cpu_s": round(_by_cpu_time(plan, batch, samples), 2),
        "resident_bytes": player.resident,
        "file_bytes": player.file_bytes,
        "times": None if player.who == "herd" else round(own / rate, 2),
        "facts": player.process.facts,
        "samples": samples,
        "set_aside": player.set_aside[batch],
    }
    # On a GPU quantized weights meet float activations.
    unit = "bfloat16" if plan.device != "cpu" or player.kind in ("BF16", "F16", "F32") else "int8"
    head = 2 * config.vocab_size * config.dim
    if plan.task == "prefill":
        flops = plan.prompt * (flops_per_token(config, max(plan.prompt // 2, 1)) - head) + head
        per_s = rate / plan.prompt * flops / 1e9
        return row | {"gop_per_s": round(per_s, 1), "limit": unit, "share": round(per_s / peak[unit], 3)}
    moved = player.step_bytes + batch * kv_bytes_per_token(config, KV_BYTES) * context
    read = rate / batch * moved / 1e9
    done = rate * flops_per_token(config, context) / 1e9
    return row | {
        "step_bytes": int(moved),
        "gb_per_s": round(read, 2),
        "gop_per_s": round(done, 1),
        "limit": "bandwidth",
        "share": round(read / limit, 3),
        "share_of_compute": round(done / peak[unit], 3),
    }
