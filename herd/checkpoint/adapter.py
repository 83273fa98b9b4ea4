"""An adapter from wherever it lies: PEFT's folder or llama.cpp's file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from herd.adapters.lora import LoraAdapter
from herd.adapters.prefix import Virtual
from herd.checkpoint.gguf import GGUFFile
from herd.checkpoint.gguf_lora import read_gguf_lora
from herd.checkpoint.open import run_folder
from herd.checkpoint.peft import CONFIG, read_peft
from herd.checkpoint.peft_virtual import KINDS, read_virtual
from herd.errors import CheckpointError
from herd.files import read_json
from herd.model.config import ModelConfig

__all__ = ["AdapterKind", "adapter_kind", "read_adapter"]

AdapterKind = Literal["peft", "gguf"]


def adapter_kind(path: Path) -> AdapterKind | None:
    """Which kind of adapter lies at `path`; None when it is none. Reads a header at most."""
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name.startswith("adapter_")) and (folder / CONFIG).is_file():
        return "peft"
    if path.is_file() and path.suffix == ".gguf" and GGUFFile(path).metadata.get("general.type") == "adapter":
        return "gguf"
    return None


def read_adapter(path: str | os.PathLike[str], base: ModelConfig) -> LoraAdapter | Virtual:
    """The adapter at `path` (LoRA, DoRA, a prefix or a prompt) for a base of config `base`, held against its parameters; a LoRA's
    tensors are views of the file.

    Raises CheckpointError or ConfigError: nothing there, damage, another base, what herd does not do.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise CheckpointError(
            "there is no such adapter: expected a folder with adapter_config.json or a GGUF file", path=place
        )
    kind = adapter_kind(place)
    if kind is None:
        why = run_folder(place) or "is no adapter: expected a folder with adapter_config.json or a GGUF adapter"
        raise CheckpointError(why, path=place)
    if kind == "gguf":
        return read_gguf_lora(place, base)
    folder = place if place.is_dir() else place.parent
    virtual = read_json(folder / CONFIG).get("peft_type") in KINDS
    return read_virtual(place, base) if virtual else read_peft(place, base)
