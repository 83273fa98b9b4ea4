"""The `general.*` keys of a GGUF file: what the model is called, how large it is, how its tensors are stored, how to sample.

Names follow llama.cpp's convention, Name-8B-Instruct-Q4_K_M.gguf (ggml docs/gguf.md, "GGUF Naming Convention").
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from herd.checkpoint.names import shapes
from herd.checkpoint.store import GenerationDefaults, TensorStore
from herd.checkpoint.write.gguf import Typed
from herd.model.config import ModelConfig

__all__ = ["FILE_TYPES", "default_name", "file_type", "general_fields", "model_name", "sampling_fields", "size_label"]

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "BF16": 32,
}  # fmt: skip
"""llama.h's numbers for the word at the end of a file's name."""
GUESSED = 1024
"""llama.cpp's mark for a file whose mixture has no name."""

_NAME = re.compile(
    r"(?P<base>.+?)-(?P<size>(\d+x)?\d+(\.\d+)?[KMBT])(?P<experts>-\d+E)?(-(?P<tune>.+))?", re.IGNORECASE
)
_WORDS = "|".join(sorted(FILE_TYPES, key=len, reverse=True))
_TYPE = re.compile(rf"[-.]({_WORDS})(?=\.|$)", re.IGNORECASE)
_SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def general_fields(store: TensorStore, kinds: Iterable[str], word: str | None) -> dict[str, Any]:
    """`general.*` for a model that was not a GGUF file; `kinds` and `word` as in `file_type`."""
    name = model_name(store)
    found: dict[str, Any] = {"general.type": "model", "general.name": name.replace("-", " ")}
    label, match = size_label(store.config), _NAME.fullmatch(name)
    if match is not None:
        found["general.finetune"], found["general.basename"] = match["tune"], match["base"]
        if _near(match["size"], label):
            label = match["size"] + (match["experts"] or "")
    found["general.size_label"] = label
    found["general.file_type"] = file_type(kinds, word)
    return {key: value for key, value in found.items() if value is not None}


def file_type(kinds: Iterable[str], word: str | None) -> int:
    """llama.cpp's number for a file whose matrices are stored as `kinds`, and whose mixture is called `word` (if it is)."""
    named = word.upper() if word is not None else None
    if named not in FILE_TYPES:
        stored = set(kinds)
        named = stored.pop() if len(stored) == 1 else None
        named = {"Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "Q3_K": "Q3_K_S"}.get(str(named), named)
    return FILE_TYPES.get(str(named), GUESSED)


def model_name(store: TensorStore) -> str:
    """What the model at `store` is called: its own word for it, or the name of its file or folder."""
    given = store.metadata().get("general.name") if store.kind == "gguf" else None
    path = Path(store.path).absolute()
    if store.kind != "gguf" and path.suffix in (".safetensors", ".bin", ".json", ".pth"):  # a file named in its folder
        path = path.parent
    if isinstance(given, str) and given.strip():
        return given.strip().replace(" ", "-").replace("/", "-")
    if path.parent.name == "snapshots":  # Hugging Face's cache: models--owner--name/snapshots/revision
        return path.parents[1].name.split("--")[-1]
    name = path.stem if path.suffix == ".gguf" else path.name
    return _TYPE.sub("", re.sub(r"-\d{5}-of-\d{5}$", "", name)) or "model"


def default_name(store: TensorStore, word: str) -> str:
    """The file that `store` becomes when it is stored as `word` (a key of FILE_TYPES, in any case)."""
    return f"{model_name(store)}-{word.upper()}.gguf"


def size_label(config: ModelConfig) -> str:
    """Parameters in llama.cpp's short form: 8B; with experts their count and the size of one with what all share: 16x17B."""
    total = {name: math.prod(shape) for name, shape in shapes(config).items()}
    if config.moe is None:
        return _rounded(sum(total.values()))
    experts = sum(size for name, size in total.items() if ".experts." in name)
    one = sum(total.values()) - experts + experts // config.moe.n_experts
    return f"{config.moe.n_experts}x{_rounded(one)}"


def sampling_fields(generation: GenerationDefaults) -> dict[str, Any]:
    """`general.sampling.*`; stop ids are the tokenizer's. What has no key is named in a warning."""
    g = generation
    keys: dict[str, Any] = {
        "top_k": None if g.top_k is None else Typed("i32", g.top_k),
        "top_p": g.top_p,
        "min_p": g.min_p,
        "temp": g.temperature,
    }
    if g.repetition_penalty is not None:
        keys |= {"penalty_last_n": Typed("i32", -1), "penalty_repeat": g.repetition_penalty}  # -1: the whole context
    if g.max_tokens is not None:
        warnings.warn(f"GGUF has no key for max_new_tokens ({g.max_tokens}): it is left out", stacklevel=3)
    return {f"general.sampling.{key}": value for key, value in keys.items() if value is not None}


def _near(label: str, counted: str) -> bool:
    return 0.7 < _count(label) / _count(counted) < 1.4


def _count(label: str) -> float:
    number = label.lower().rpartition("x")[2]
    return float(number[:-1]) * _SCALES[number[-1].upper()]


def _rounded(count: int) -> str:
    """Two digits and a letter."""
    scale = next((letter for letter in "TBM" if count > _SCALES[letter]), "K")
    value = count / _SCALES[scale]
    digits = max(2 - len(str(round(value)).lstrip("0")), 0)
    return f"{value:.{digits}f}{scale}"
