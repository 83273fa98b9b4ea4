"""Conversion of a Llama 3.2 1B-shaped bf16 checkpoint: seconds, GB/s and peak memory, herd beside llama.cpp and transformers.

    python benchmarks/convert.py [--runs 3] [--layers 16] [--llama-cpp CHECKOUT] [--keep FOLDER] [--only WORD]

Random weights of the exact 1B geometry (1.24 B parameters, 2.5 GB) with Llama 3's vocabulary are written to a temporary Hugging
Face folder; every run is a process of its own, and peers take turns. llama.cpp's converter is measured where a checkout of
llama.cpp is named, its quantizer where llama-cpp-python is installed. herd's figures are the writing alone (`write_gguf`,
`write_hf`), as the peers prove nothing; `herd convert` then reads both sides again to compare them. Peak memory is the largest
resident set of the process, pages of mapped files included. GB/s are bytes of the source by the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from herd.bench.machine import machine
from herd.bench.material import hf_folder
from herd.bench.subject import Subject
from herd.bench.table import headline
from herd.checkpoint.vocabulary import load_tokenizer
from herd.model.config import plain
from herd.model.shapes import LLAMA_32_1B
from herd.tokenizer.write import hf_files

HERD = """
import sys
from pathlib import Path
import torch
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.vocabulary import tokenizer_of
from herd.checkpoint.write.source import Source
store = open_store(sys.argv[1])
source = Source(store, tokenizer_of(store), GenerationDefaults(), None)
"""
HERD_GGUF = (
    HERD
    + """
from herd.checkpoint.write.gguf_model import write_gguf
how = {"dtype": torch.bfloat16} if sys.argv[3] == "bf16" else {"quant": sys.argv[3]}
write_gguf(source, Path(sys.argv[2]), **how)
"""
)
HERD_HF = (
    HERD
    + """
from herd.checkpoint.write.hf import write_hf
Path(sys.argv[2]).mkdir()
write_hf(source, Path(sys.argv[2]), tick=lambda n: None)
"""
)
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""
QUANTIZE = """
import sys, ctypes, os, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), os.cpu_count()
status = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params))
raise SystemExit(status)
"""

# A process counts the memory of the one it was forked from: the measured one is started by this small one.
LAUNCH = """
import os, sys, time
began = time.perf_counter()
child = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print("measured", time.perf_counter() - began, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Task:
    """A conversion: what it makes, who makes it, the command for (source, destination), and which source it reads."""

    makes: str
    who: str
    command: Callable[[Path, Path], list[str]]
    from_gguf: bool = False


def python(program: str, *more: str) -> Callable[[Path, Path], list[str]]:
    """`program` in a new interpreter."""
    return lambda src, dst: [sys.executable, "-c", program, str(src), str(dst), *more]


def tasks(checkout: Path | None) -> list[Task]:
    """Everything that can be measured here, peers side by side."""
    found = []
    quantizer = importlib.util.find_spec("llama_cpp") is not None
    for kind, number in (("bf16", None), ("q8_0", 7), ("q4_k_m", 15)):
        found.append(Task(f"GGUF {kind.upper()}", "herd", python(HERD_GGUF, kind)))
        if checkout is not None and kind != "q4_k_m":
            script = str(checkout / "convert_hf_to_gguf.py")

            def command(src: Path, dst: Path, kind: str = kind, script: str = script) -> list[str]:
                return [sys.executable, script, str(src), "--outfile", str(dst), "--outtype", kind]

            found.append(Task(f"GGUF {kind.upper()}", "llama.cpp convert_hf_to_gguf.py", command))
        if quantizer and number is not None:
            label = "llama.cpp llama_model_quantize, from its BF16 file"
            found.append(Task(f"GGUF {kind.upper()}", label, python(QUANTIZE, str(number)), from_gguf=True))
    found.append(Task("Hugging Face bf16", "herd", python(HERD_HF)))
    found.append(Task("Hugging Face bf16", "transformers load, save_pretrained", python(TRANSFORMERS)))
    return found


def run(task: Task, src: Path, dst: Path) -> tuple[float, float]:
    """(seconds, peak GB) of one conversion in a process of its own."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.run([sys.executable, "-S", "-c", LAUNCH, *task.command(src, dst)], stdout=log, stderr=log)
        log.seek(0)
        said = log.read().decode()
    if child.returncode:
        raise SystemExit(f"{task.who}, {task.makes}: status {child.returncode}\n{said[-2000:]}")
    seconds, kilobytes = said.rsplit("measured ", 1)[1].split()
    return float(seconds), int(kilobytes) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and peak memory of conversions of a 1B-shaped bf16 checkpoint.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=LLAMA_32_1B.n_layers, help="fewer for a quick try")
    parser.add_argument("--llama-cpp", type=Path, help="a checkout of llama.cpp, for its converter")
    parser.add_argument("--keep", type=Path, help="write the checkpoint here and leave it")
    parser.add_argument("--only", default="", help="only what makes something with this word in its name")
    chosen = parser.parse_args()
    config = replace(LLAMA_32_1B, layers=plain(chosen.layers))
    print(headline(machine(["python", *sys.argv])))
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folder = hf_folder(Subject(f"llama-3.2-1b-{chosen.layers}-layers", config), chosen.keep or place)
        if not (folder / "tokenizer.json").exists():
            tokenizer = load_tokenizer(str(files("llama_models") / "llama3" / "tokenizer.model"))
            for name, data in hf_files(tokenizer, None).items():
                (folder / name).write_bytes(data)
        size = (folder / "model.safetensors").stat().st_size
        print(
            f"checkpoint: Llama 3.2 1B geometry, {chosen.layers} layers, bf16 safetensors, {size / 1e9:.2f} GB, page cache warm"
        )
        wanted = [task for task in tasks(chosen.llama_cpp) if chosen.only.lower() in task.makes.lower()]
        gguf = place / "bf16.gguf"
        if any(task.from_gguf for task in wanted):
            run(tasks(None)[0], folder, gguf)
        (folder / "model.safetensors").read_bytes()
        seen: dict[Task, list[tuple[float, float]]] = {task: [] for task in wanted}
        for _ in range(chosen.runs):
            for task in wanted:
                dst = place / "result"
                seen[task].append(run(task, gguf if task.from_gguf else folder, dst))
                subprocess.run(["rm", "-rf", str(dst)], check=True)
        for task, runs in seen.items():
            seconds, peaks = zip(*runs, strict=True)
            middle = statistics.median(seconds)
            print(
                f"{task.makes:<18} {task.who:<50} {middle:6.1f} s (min {min(seconds):.1f}, max {max(seconds):.1f})  "
                f"{size / middle / 1e9:5.2f} GB/s  peak {statistics.median(peaks):.2f} GB"
            )


if __name__ == "__main__":
    main()
