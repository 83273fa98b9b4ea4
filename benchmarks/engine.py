"""The standard set of speed measurements, and the section "Engine" of results.md made of them.

    python benchmarks/engine.py [--runs 5] [--quiet 6] [--only decode] [--large] [--cache FOLDER] [--json FILE] [--dry]

Llama 3.2 1B's shape in int4, int8 and bf16, one token at a time and prompts of 512; many replies at once; cold start; herd-nano.
Peers that are installed are measured beside herd. `--large` adds int4 decoding of the 3B and the 8B shape. `--dry` prints the
section and leaves results.md alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from herd.bench.cold import cold_start
from herd.bench.contest import Plan, contest
from herd.bench.markdown import replaced, section
from herd.bench.material import cache_folder
from herd.bench.process import NEEDS
from herd.bench.subject import kind_of, subject

RESULTS = Path(__file__).with_name("results.md")
WEIGHTS = ("int4", "int8", "bf16")


def plans(args: argparse.Namespace) -> Iterator[Plan]:
    """What is measured, in order."""
    peers = [name for name, (module, _) in NEEDS.items() if importlib.util.find_spec(module) is not None]
    native = [name for name in peers if name == "llama.cpp"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    common: dict[str, Any] = {"threads": cores, "folder": args.cache, "runs": args.runs, "tries": args.quiet}
    one, kinds = subject("llama3.2:1b"), [kind_of(word) for word in WEIGHTS]
    int4 = kinds[:1]
    yield Plan(task="decode", subject=one, kinds=kinds, peers=peers, **common)
    yield Plan(task="prefill", subject=one, kinds=kinds, prompt=512, peers=peers, **common)
    yield Plan(task="batch", subject=one, kinds=int4, batches=(1, 2, 4, 8, 16), tokens=32, peers=native, **common)
    yield Plan(task="cold-start", subject=one, kinds=int4, prompt=32, peers=native, **common)
    yield Plan(task="decode", subject=subject("nano"), kinds=[None], peers=native, **common)
    for name in ("llama3.2:3b", "llama3.1:8b") if args.large else ():
        yield Plan(task="decode", subject=subject(name), kinds=int4, tokens=32, peers=native, **common)


def say(what: str, done: int, total: int) -> None:
    """Progress."""
    if "writing" not in what:
        print(f"{what} ({done + 1} of {total})", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--quiet", type=int, default=6, help="times a sample is taken at most, until other programs are quiet"
    )
    parser.add_argument("--only", default="", help="decode, prefill, batch, cold-start or the name of a model")
    parser.add_argument("--large", action="store_true", help="3B and 8B, too")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where the measured files lie")
    parser.add_argument("--json", type=Path, help="write every sample here")
    parser.add_argument("--dry", action="store_true", help="leave results.md as it is")
    args = parser.parse_args()
    reports = []
    for plan in plans(args):
        if args.only in (plan.task, plan.subject.name, ""):
            report = (cold_start if plan.task == "cold-start" else contest)(plan, say)
            report["machine"]["command"] = " ".join(["python", *sys.argv])
            reports.append(report)
    if not reports:
        raise SystemExit(f"nothing of the standard set is called {args.only!r}")
    if args.json is not None:
        args.json.write_text(json.dumps(reports, indent=1))
    text = section(reports)
    print(text)
    if not args.dry:
        RESULTS.write_text(replaced(RESULTS.read_text(), "Engine", text))


if __name__ == "__main__":
    main()
