"""`herd.config`: the one GGUF key of herd's own, for what llama.cpp's keys cannot say of a model.

A JSON object with any of `norm_eps`, `rope_theta` (numbers), `rope_scaling`, `temper` (objects of numbers, or null) and
`layers` (one [placement, chunk or null, experts] per layer); the words are those of `herd.model.config`. Other programs do
not read it: `herd.checkpoint.write.gguf_config` says when that makes a difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from herd.errors import ConfigError
from herd.files import parse_json, short
from herd.model.config import MAX_LAYERS, LayerSpec, ModelConfig, RopeScaling, Temper

__all__ = ["OWN_KEY", "own_facts", "own_text"]

OWN_KEY = "herd.config"

_T = TypeVar("_T", RopeScaling, Temper)


def own_text(config: ModelConfig, names: Iterable[str]) -> str:
    """The fields `names` of `config` as the value of OWN_KEY."""
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(config, name)
        if name == "layers":
            found[name] = [[spec.placement, spec.chunk, spec.moe] for spec in value]
        else:
            found[name] = asdict(value) if isinstance(value, RopeScaling | Temper) else value
    return json.dumps(found)


def own_facts(text: object, path: Path) -> dict[str, Any]:
    """The value of OWN_KEY in the file `path` -> fields of a ModelConfig.

    Raises CheckpointError for text that is no JSON object, ConfigError for anything else that `own_text` does not write.
    """
    if not isinstance(text, str):
        raise ConfigError(f"is {short(text)}: expected JSON text")
    data = parse_json(text.encode(), path)
    found: dict[str, Any] = {}
    for name, value in data.items():
        match name:
            case "norm_eps" | "rope_theta":
                found[name] = value
            case "rope_scaling":
                found[name] = _numbers(RopeScaling, name, value)
            case "temper":
                found[name] = _numbers(Temper, name, value)
            case "layers":
                found[name] = _layers(value)
            case _:
                raise ConfigError(f"has the unknown entry {short(name)}: a newer herd wrote this file")
    return found


def _numbers(kind: type[_T], name: str, value: object) -> _T | None:
    if value is None:
        return None
    known = {field.name for field in fields(kind)}
    if not isinstance(value, Mapping) or set(value) != known:
        raise ConfigError(f"{name} is {short(value)}: expected {', '.join(sorted(known))}")
    return kind(**value)


def _layers(value: object) -> tuple[LayerSpec, ...]:
    if not isinstance(value, list) or len(value) > MAX_LAYERS:
        raise ConfigError(f"layers is {short(value)}: expected a list of at most {MAX_LAYERS}")
    layers = []
    for layer in value:
        if not isinstance(layer, list) or len(layer) != 3 or not isinstance(layer[0], str):
            raise ConfigError(f"a layer is {short(layer)}: expected [placement, chunk, experts]")
        layers.append(LayerSpec(placement=layer[0], chunk=layer[1], moe=layer[2]))  # pyright: ignore[reportArgumentType]
    return tuple(layers)
