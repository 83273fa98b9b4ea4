"""Folders that other programs keep models in, read where they are: LM Studio's, and that of Meta's own tool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from herd.errors import CheckpointError
from herd.files import safe_join
from herd.hub.asked import is_repo
from herd.hub.cached import gguf_of, has_weights

__all__ = ["lm_studio", "lm_studio_models", "meta_home", "meta_model", "meta_models"]


def lm_studio() -> list[Path]:
    """LM Studio's model folders: today's and that of its versions before 0.3.7."""
    home = os.environ.get("LMSTUDIO_HOME")
    today = Path(home).expanduser() if home else Path("~/.lmstudio").expanduser()
    return [today / "models", Path("~/.cache/lm-studio/models").expanduser()]


def lm_studio_models(repo: str, quant: str | None = None) -> Iterator[Path]:
    """Where LM Studio has ORG/NAME: its folder of safetensors, or its GGUF file (that with `quant` in its name)."""
    if not is_repo(repo):
        return
    for root in lm_studio():
        try:
            folder = safe_join(root, repo)
        except CheckpointError:
            continue
        if not folder.is_dir():
            continue
        ggufs = [file for file in sorted(folder.glob("*.gguf")) if not file.name.lower().startswith("mmproj")]
        if quant is not None:
            named = gguf_of(folder, quant)
            yield from [named] if named is not None else []
        elif len(ggufs) == 1:
            yield ggufs[0]
        elif has_weights(folder):
            yield folder


def meta_home() -> Path:
    """Where Meta's own tool puts what it downloads."""
    return Path(os.environ.get("LLAMA_MODELS_CONFIG_DIR") or "~/.llama").expanduser() / "checkpoints"


def meta_model(name: str) -> Path | None:
    """The folder of the model that Meta calls `name`, such as Llama3.2-1B-Instruct."""
    try:
        folder = safe_join(meta_home(), name.rpartition("/")[2].replace(":", "-"))
    except CheckpointError:
        return None
    return folder if (folder / "params.json").is_file() else None


def meta_models() -> Iterator[Path]:
    """Every model folder of Meta's tool, by name."""
    home = meta_home()
    if home.is_dir():
        yield from (folder for folder in sorted(home.iterdir()) if (folder / "params.json").is_file())
