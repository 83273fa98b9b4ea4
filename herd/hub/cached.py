"""Snapshots as models: which file or folder of one is the model, and whether all of it is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from herd.errors import CheckpointError, HubError
from herd.files import read_json, safe_join, short
from herd.hub.cache import RepoCache
from herd.hub.choose import says_quant

__all__ = ["complete", "gguf_of", "has_weights", "model_path", "snapshots"]

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "consolidated.*.pth")
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(?:gguf|safetensors|bin)")


def snapshots(cache: Path, repo: str, revision: str | None = None) -> Iterator[Path]:
    """The downloaded folders of `repo` with weights in them: that of `revision`, or all, the one of `main` first."""
    held = RepoCache(cache, repo)
    commit = held.commit_of(revision) if revision is not None else None
    for name in held.commits() if revision is None else [commit] if commit else []:
        snapshot = held.snapshot(name)
        for place in (snapshot, snapshot / "original"):
            if has_weights(place):
                yield place
                break


def has_weights(folder: Path) -> bool:
    """Whether `folder` itself holds weights of a kind that herd reads."""
    return any(next(folder.glob(pattern), None) for pattern in WEIGHTS)


def gguf_of(folder: Path, quant: str) -> Path | None:
    """The GGUF file in `folder` whose name says `quant`, such as "q4-k-m"; of a split one the first part."""
    return next((file for file in sorted(folder.glob("*.gguf")) if says_quant(file.name, quant)), None)


def model_path(snapshot: Path, names: Sequence[str]) -> Path:
    """What `herd.load` takes, when `names` were chosen of `snapshot`: a GGUF file (the first part), or a folder."""
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name)
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".pth"))]
    if ggufs and not others:
        return safe_join(snapshot, ggufs[0])
    if others and all(name.startswith("original/") for name in others):
        return snapshot / "original"
    return snapshot


def complete(folder: Path) -> None:
    """Raises HubError (cause "offline") unless all parts of the weights in `folder` are there, by their index and numbers."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    needed: set[str] = set()
    for index in (name for name in names if name.endswith(".index.json")):
        try:
            table = read_json(folder / index).get("weight_map")
        except CheckpointError as error:
            raise HubError(f"{error}: pull it again online", cause="offline") from error
        if isinstance(table, dict):
            needed |= {name for name in table.values() if isinstance(name, str)}
    for name in names:
        if found := _PART.fullmatch(name):
            ending = name.rpartition(".")[2]
            needed |= {f"{found[1]}-{part:05}-of-{found[3]}.{ending}" for part in range(1, int(found[3]) + 1)}
    missing = sorted(needed - names)
    if missing:
        raise HubError(
            f"{folder}: {short(missing)} are missing from an unfinished download: pull it online", cause="offline"
        )
