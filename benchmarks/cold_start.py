"""Cold start: from process start to the first token of a Llama 3.2 1B-shaped bf16 checkpoint, page cache warm.

    python benchmarks/cold_start.py [--runs 7] [--layers 16] [--keep FOLDER]

Random weights of the exact 1B geometry (1.24 B parameters, 2.5 GB) are written to a temporary Hugging Face folder; each
run is a new process that loads it with herd, reads a prompt of 32 tokens and samples one. Where the `gguf` and
`llama-cpp-python` packages are installed, the same weights as a BF16 GGUF file go through llama.cpp, measured alike. Medians
and spreads are of wall-clock time, taken outside of the process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from herd.checkpoint.names import Column, join, shapes, sources
from herd.model.config import ModelConfig, plain
from herd.model.shapes import LLAMA_32_1B

PROMPT = 32

HERD = """
import sys, time
started = time.perf_counter()
import torch
imported = time.perf_counter()
from herd.chat.params import SamplingParams
from herd.checkpoint.load import load_model
from herd.engine.session import Session
model = load_model(sys.argv[1])
loaded = time.perf_counter()
session = Session(model, max_len=256)
token = next(session.generate(list(range(1000, 1000 + int(sys.argv[2]))), SamplingParams(temperature=0.0, max_tokens=1)))
done = time.perf_counter()
print("first token", token, imported - started, loaded - imported, done - loaded, flush=True)
"""

LLAMA_CPP = """
import sys, time
started = time.perf_counter()
import llama_cpp
imported = time.perf_counter()
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_batch=64, verbose=False, logits_all=False)
loaded = time.perf_counter()
token = next(model.generate(list(range(1000, 1000 + int(sys.argv[2]))), temp=0.0))
done = time.perf_counter()
print("first token", token, imported - started, loaded - imported, done - loaded, flush=True)
"""


def weights(config: ModelConfig) -> Callable[[str], torch.Tensor]:
    """Random bf16 tensors by canonical name, the same whenever asked; order one in the logits."""
    table = shapes(config)

    def make(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name) * 1009 + sum(map(ord, name)))
        shape = table[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    return make


def foreign(
    config: ModelConfig, column: Column, make: Callable[[str], torch.Tensor]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Foreign name -> a function that makes the tensor, so that one is in memory at a time."""
    return {
        name: lambda group=group: join(group, [make(home.canonical) for home in group], config).contiguous()
        for name, group in sources(config, column).items()
    }


def write_hf(folder: Path, config: ModelConfig, make: Callable[[str], torch.Tensor]) -> None:
    """config.json and model.safetensors."""
    scaling = config.rope_scaling
    assert scaling is not None
    described = {
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "tie_word_embeddings": config.tie_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(described))
    made, header, at = foreign(config, "hf", make), {}, 0
    outlines = foreign(config, "hf", lambda name: torch.empty(shapes(config)[name], device="meta"))
    for name, outline in outlines.items():
        shape = tuple(outline().shape)
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in made.values():
            file.write(tensor().view(torch.uint8).numpy().tobytes())


def write_gguf(file: Path, config: ModelConfig, make: Callable[[str], torch.Tensor]) -> None:
    """The same weights for llama.cpp, with a vocabulary of placeholders; norms in fp32 as llama.cpp wants them."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    tokens = [f"t{i}" for i in range(config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([f"{a} {b}" for a, b in zip(tokens[:8:2], tokens[1:8:2], strict=True)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in foreign(config, "gguf", make).items():
        value = tensor()
        if value.ndim == 1:
            writer.add_tensor(name, value.float().numpy())
        else:
            raw = value.view(torch.uint16).numpy().view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(program: str, path: Path, runs: int) -> list[tuple[float, float, float, float]]:
    """(whole, import, load, first token) in seconds of each run, after one that warms the page cache."""
    found = []
    for run in range(runs + 1):
        began = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(PROMPT)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            whole = time.perf_counter() - began
            child.wait()
        if not line.startswith("first token"):
            raise SystemExit(f"the measured process failed with status {child.returncode}")
        token, *times = line.split()[2:]
        if run:
            imports, load, first = map(float, times)
            found.append((whole, imports, load, first))
    print(f"                   greedy first token: {token}")
    return found


def report(label: str, runs: list[tuple[float, float, float, float]]) -> None:
    """Median and spread of the whole, medians of the parts."""
    whole, imports, load, first = zip(*runs, strict=True)
    start = statistics.median(w - i - n - f for w, i, n, f in runs)
    print(
        f"{label:<18} {statistics.median(whole):6.2f} s  (min {min(whole):.2f}, max {max(whole):.2f}, {len(runs)} runs)   "
        f"interpreter {start:.2f}, imports {statistics.median(imports):.2f}, load {statistics.median(load):.2f}, "
        f"{PROMPT} prompt tokens and the first new one {statistics.median(first):.2f}"
    )


def hardware() -> str:
    """Processor, cores, memory, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    busy = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB{busy}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Process start to first token of a 1B-shaped bf16 checkpoint.")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LLAMA_32_1B.n_layers, help="fewer for a quick try")
    parser.add_argument(
        "--keep", type=Path, help="write the checkpoint here and leave it, instead of a temporary folder"
    )
    chosen = parser.parse_args()
    config = replace(LLAMA_32_1B, layers=plain(chosen.layers))
    make = weights(config)
    print(f"command: python benchmarks/cold_start.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"machine: {hardware()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model.safetensors").exists():
            write_hf(folder, config, make)
        size = (folder / "model.safetensors").stat().st_size
        print(
            f"checkpoint: Llama 3.2 1B geometry, {chosen.layers} layers, bf16 safetensors, {size / 1e9:.2f} GB, page cache warm"
        )
        report("herd", measure(HERD, folder, chosen.runs))
        if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
            print(
                "llama-cpp-python   not measured: llama_cpp or gguf is not installed (pip install llama-cpp-python gguf)"
            )
            return
        file = folder / "model-bf16.gguf"
        if not file.exists():
            write_gguf(file, config, make)
        report("llama-cpp-python", measure(LLAMA_CPP, file, chosen.runs))


if __name__ == "__main__":
    main()
