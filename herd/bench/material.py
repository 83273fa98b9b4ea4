"""The files that are measured: random weights of a shape, or a checkpoint in another number type, written once and kept.

They lie in `$XDG_CACHE_HOME/herd/bench` (usually ~/.cache) unless another folder is named, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from herd.bench.subject import Subject
from herd.checkpoint.gguf_config import ROPE_TABLE
from herd.checkpoint.names import shapes
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults, TensorInfo, TensorStore
from herd.checkpoint.write.atomic import new_file, new_folder
from herd.checkpoint.write.gguf import write_gguf_file
from herd.checkpoint.write.gguf_config import architecture, config_fields, rope_table
from herd.checkpoint.write.gguf_general import file_type
from herd.checkpoint.write.gguf_model import gguf_form
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.inventory import planned
from herd.checkpoint.write.planned import Planned
from herd.checkpoint.write.source import Source
from herd.tokenizer.bytelevel import to_alphabet

__all__ = ["RandomStore", "cache_folder", "gguf_file", "hf_folder", "step_bytes"]

RECIPE = 2
"""Counts up when the weights or the files change, so that old files are not taken for new ones."""

CONTROL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)

Tell = Callable[[int, int], None]
"""(bytes written, bytes in all)."""


class RandomStore:
    """A TensorStore of bf16 weights from normal distributions, seeded by name: logits have order one at any depth."""

    kind = "random"

    def __init__(self, subject: Subject) -> None:
        self.path = f"random weights of {subject.name}"
        self.config = subject.config
        self._shapes = dict(shapes(subject.config))
        if subject.config.tie_embeddings:
            self._shapes.pop("output.weight", None)

    def names(self) -> Iterable[str]:
        return self._shapes

    def info(self, name: str) -> TensorInfo:
        shape = self._shapes[name]
        return TensorInfo(shape, "bfloat16", "BF16", 2 * torch.Size(shape).numel())

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        generator = torch.Generator().manual_seed(seed)
        made = torch.empty(shape, dtype=torch.bfloat16)
        for row in made.view(-1, made.shape[-2], made.shape[-1]):
            for part in row.split(max(1, (1 << 24) // row.shape[-1])):
                part.copy_(torch.randn(part.shape, generator=generator).mul_(row.shape[-1] ** -0.5))
        return made

    def metadata(self) -> Mapping[str, Any]:
        return {}


def cache_folder() -> Path:
    """Where the files lie when nobody says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "herd" / "bench"


def gguf_file(subject: Subject, kind: str, folder: Path, tell: Tell = lambda done, total: None) -> Path:
    """A GGUF file of `subject` with the mix `kind`, written unless it is there. Its vocabulary is of placeholders.

    Raises CheckpointError and ConfigError for what cannot be written.
    """
    file = folder / f"{_stem(subject)}-{kind.lower()}.gguf"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    store = _store(subject)
    form = gguf_form(Source(store, None, GenerationDefaults(), None), quant=kind)
    plans = planned(store, "gguf", form)
    table = rope_table(subject.config)
    if table is not None:
        plans.insert(0, Planned(ROPE_TABLE, table.shape, "F32", lambda: torch.from_numpy(table)))
    keys = {
        "general.architecture": architecture(subject.config),
        "general.name": f"{subject.name}, for measuring",
        **config_fields(subject.config, path=file),
        "general.file_type": file_type((), kind),
        "general.quantization_version": 2,
        **_placeholders(subject.config.vocab_size),
    }
    total, done = sum(plan.nbytes for plan in plans), 0

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(done, total)

    with new_file(file, size=total) as path:
        write_gguf_file(path, keys, plans, tick)
    return file


def hf_folder(subject: Subject, folder: Path, tell: Tell = lambda done, total: None) -> Path:
    """A Hugging Face folder of `subject` in bfloat16, written unless it is there. It has no tokenizer."""
    place = folder / f"{_stem(subject)}-hf"
    if place.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    store = _store(subject)
    total, done = 2 * sum(torch.Size(store.info(name).shape).numel() for name in store.names()), 0

    def tick(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(done, total)

    with new_folder(place, size=total) as path:
        write_hf(Source(store, None, GenerationDefaults(), None), path, dtype=torch.bfloat16, tick=tick)
    return place


def step_bytes(path: Path) -> int:
    """Bytes of the weights in the checkpoint at `path` that one token needs: all but an embedding that is only looked up in,
    and of routed experts the share that it goes to."""
    store = open_store(path)
    config, total = store.config, 0.0
    for name in store.names():
        size = store.info(name).nbytes
        if name == "tok_embeddings.weight" and not config.tie_embeddings:
            continue
        if ".experts." in name and config.moe is not None:
            size *= config.moe.top_k / config.moe.n_experts
        total += size
    return int(total)


def _store(subject: Subject) -> TensorStore:
    return RandomStore(subject) if subject.path is None else open_store(subject.path)


def _stem(subject: Subject) -> str:
    if subject.path is None:
        return f"{subject.name}-random-{RECIPE}"
    found = subject.path.stat()
    mark = f"{subject.path.resolve()} {found.st_mtime_ns} {RECIPE}"
    return f"{subject.name.removesuffix('.gguf')}-{hashlib.blake2b(mark.encode(), digest_size=6).hexdigest()}"


def _placeholders(rows: int) -> dict[str, Any]:
    """A vocabulary that programs open, servers too: bytes, pairs and triples of letters, and control tokens in the last rows."""
    plain, control = (rows - 256, 256) if rows >= 1024 else (rows, 0)
    letters = to_alphabet([bytes([i]) for i in range(256)])
    ascii = to_alphabet([bytes([i]) for i in range(33, 127)])  # so that replies are text at every token
    pairs = [(a, b) for a in ascii for b in ascii]
    # A triple is its first pair and a byte: with bytes in rising order, the first pair is also the one that merges first.
    rising = (a + b for i, a in enumerate(ascii) for b in ascii[i + 1 :])
    merges = list(islice(chain(pairs, ((pair, c) for pair in rising for c in ascii)), max(0, plain - 256)))
    tokens = [*letters[:plain], *(left + right for left, right in merges), *CONTROL[:control]]
    tokens += [f"<|reserved_special_token_{i}|>" for i in range(rows - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * plain + [3] * control,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges] or ["t 0"],
        "tokenizer.ggml.bos_token_id": plain if control else 0,
        "tokenizer.ggml.eos_token_id": plain + 1 if control else 1,
    }
