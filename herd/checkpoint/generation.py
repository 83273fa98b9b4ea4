"""generation_config.json -> GenerationDefaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herd.checkpoint.files import read_json, short
from herd.checkpoint.store import GenerationDefaults
from herd.errors import CheckpointError

__all__ = ["read_generation"]

# Bookkeeping and token ids that the tokenizer knows better.
_SILENT = {"_from_model_config", "transformers_version", "bos_token_id", "pad_token_id", "use_cache"}


def read_generation(folder: Path, config: Mapping[str, Any]) -> GenerationDefaults:
    """Defaults of the checkpoint in `folder`; stop ids fall back to config.json's `eos_token_id`. Raises CheckpointError."""
    path = folder / "generation_config.json"
    data = read_json(path) if path.is_file() else {}
    eos = data.get("eos_token_id", config.get("eos_token_id"))
    stop = _ids(eos, path if "eos_token_id" in data else folder / "config.json")
    known = {"eos_token_id", "temperature", "top_p", "top_k", "do_sample"}
    greedy = data.get("do_sample") is False
    return GenerationDefaults(
        stop_ids=stop,
        temperature=0.0 if greedy else _number(data, "temperature", path, low=0.0),
        top_p=None if greedy else _number(data, "top_p", path, low=0.0, high=1.0),
        top_k=None if greedy else _top_k(data, path),
        extra={key: value for key, value in data.items() if key not in known | _SILENT},
    )


def _ids(value: Any, path: Path) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(v) is int and 0 <= v < 1 << 31 for v in ids):
        raise CheckpointError(f"eos_token_id is {short(value)}: expected a token id or a list of them", path=path)
    return frozenset(ids)


def _number(data: Mapping[str, Any], key: str, path: Path, *, low: float, high: float = 1e6) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high:
        raise CheckpointError(f"{key} is {short(value)}: expected a number from {low:g} to {high:g}", path=path)
    return float(value)


def _top_k(data: Mapping[str, Any], path: Path) -> int | None:
    value = data.get("top_k")
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
        raise CheckpointError(f"top_k is {short(value)}: expected an integer of at least 0", path=path)
    return value
