"""open_store(path): look at a file or folder and return the store that reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from herd.checkpoint.store import TensorStore
from herd.errors import CheckpointError
from herd.files import short

__all__ = ["open_store", "run_folder"]

EXPECTED = (
    "expected a Hugging Face folder (config.json with *.safetensors or pytorch_model*.bin), "
    "a Meta folder (params.json with consolidated.*.pth) or a .gguf file"
)

SHOWN = 8
"""Names of a folder that a message gives."""

_PART = re.compile(r"-\d{5}(?=-of-\d{5}\.gguf$)")
"""The number of a GGUF file that is one of several parts."""


def open_store(path: str | os.PathLike[str], *, headers_only: bool = False) -> TensorStore:
    """The checkpoint at `path`, a folder or a file in it. Raises CheckpointError when it is none of the known kinds.

    A folder with several formats opens as Hugging Face first, then Meta, then GGUF; name a file to choose. `headers_only`
    looks at samples where a tied output that is stored twice would be compared with the embedding.
    """
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            return _open_folder(place, headers_only)
        if place.is_file():
            return _open_file(place, headers_only)
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror or error}", path=path) from error
    raise CheckpointError("is not a file or folder" if place.exists() else "there is no such file or folder", path=path)


def _open_folder(folder: Path, headers_only: bool) -> TensorStore:
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" in names:
        return _hf(folder, headers_only)
    if "params.json" in names or any(name.startswith("consolidated.") and name.endswith(".pth") for name in names):
        return _meta(folder, headers_only)
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if len(ggufs) == 1 or (ggufs and len({_PART.sub("", name) for name in ggufs}) == 1):
        return _gguf(folder / ggufs[0])
    if ggufs:
        raise CheckpointError(f"several GGUF files: name one of {_some(ggufs)}", path=folder)
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return _hf(folder, headers_only)  # says that config.json is missing
    if (run := run_folder(folder)) is not None:
        raise CheckpointError(run, path=folder)
    held = f"it holds {_some(sorted(names))}" if names else "it is empty"
    raise CheckpointError(f"no checkpoint in this folder: {held}; {EXPECTED}", path=folder)


def run_folder(folder: Path) -> str | None:
    """Where the result lies when `folder` is one that `herd train` writes to; None when it is not."""
    if not (folder / "config.yaml").is_file() or not (folder / "log.jsonl").is_file():
        return None
    if (folder / "model").is_dir():
        return f"this is the folder of a run: its model is {folder / 'model'}"
    if (folder / "adapter").is_dir():
        return f"this is the folder of a run: its adapter is {folder / 'adapter'} (--adapter, beside the base model)"
    return "this is the folder of a run that has not written its model yet: the same command goes on with it"


def _some(names: Sequence[str]) -> str:
    return ", ".join(short(name) for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _open_file(file: Path, headers_only: bool) -> TensorStore:
    with open(file, "rb") as opened:
        head = opened.read(4)
    if head == b"GGUF" or file.suffix == ".gguf":
        return _gguf(file)
    if file.name == "params.json" or file.suffix == ".pth":
        return _meta(file.parent, headers_only)
    if file.name == "config.json":
        return _hf(file.parent, headers_only)
    if file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json"):
        return _hf(file, headers_only)
    raise CheckpointError(f"not a checkpoint file; {EXPECTED}", path=file)


# Imported where used: opening one format should not pay for the others.


def _hf(path: Path, headers_only: bool) -> TensorStore:
    from herd.checkpoint.hf import HFStore

    return HFStore(path, headers_only=headers_only)


def _meta(folder: Path, headers_only: bool) -> TensorStore:
    from herd.checkpoint.meta import MetaStore

    return MetaStore(folder, headers_only=headers_only)


def _gguf(file: Path) -> TensorStore:
    from herd.checkpoint.gguf_store import GGUFStore

    return GGUFStore(file)
