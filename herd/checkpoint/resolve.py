"""Which files a model name means: a path, the embedded model, or a catalog name found on this machine. No torch.

Checkpoints that other tools downloaded are read where they are: the Hugging Face cache and Meta's ~/.llama/checkpoints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from herd.errors import CheckpointError, ConfigError, UnknownModelError
from herd.model.presets import find

__all__ = ["resolve"]

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = (".gguf", ".safetensors", ".bin", ".pth", ".json", ".model")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "consolidated.*.pth")


def resolve(path_or_name: str | os.PathLike[str]) -> Path:
    """The checkpoint folder or file that `path_or_name` means; something that exists under that path comes first.

    Raises CheckpointError when it is known but not on this machine, ConfigError when herd cannot run it yet, and
    UnknownModelError, with the nearest names, when nothing has that name.
    """
    name = os.fspath(path_or_name)
    place = _existing(name)
    if place is not None:
        return place
    if name in ("nano", "herd-nano"):
        return _embedded()
    if name.endswith(_FILES) or name.startswith((".", "~", "/", "\\")):
        raise CheckpointError("there is no such file or folder", path=name[:500])
    return _from_catalog(name)


def _existing(name: str) -> Path | None:
    try:
        place = Path(name).expanduser()
        return place if name and place.exists() else None
    except (OSError, RuntimeError, ValueError):  # names that no file can have
        return None


def _embedded() -> Path:
    folder = Path(__file__).parents[1] / "embedded" / "nano"
    if not (folder / "config.json").is_file():
        raise CheckpointError("the embedded model is missing: install herd again", path=folder)
    return folder


def _from_catalog(name: str) -> Path:
    try:
        release = find(name)
    except UnknownModelError as unknown:
        cached = _snapshots(hub_cache() / _folder(name)) if _REPO.fullmatch(name) else iter(())
        for snapshot in cached:
            return snapshot
        raise UnknownModelError(f"{unknown}; there is no such file or folder either", near=unknown.near) from None
    if release.why_not is not None:
        raise ConfigError(f"{release.name} cannot be run yet: {release.why_not}")
    repos, natives = _wanted(name, release.repos), _wanted(name, release.native)
    for place in _present(repos, natives):
        return place
    raise CheckpointError(
        f"{release.name} is not on this machine, and herd cannot download yet. Looked for {len(repos)} folders in "
        f"{hub_cache()} and {len(natives)} in {_meta_home()}. "
        "Give the path of a folder or file instead, or try the embedded model, 'nano'"
    )


def _wanted(name: str, names: Sequence[str]) -> list[str]:
    """The names to look for: exactly the one asked for when it is one of them, else all, tuned variants first.

    Without the organisation, capitals tell Hugging Face's base model `Llama-3.2-1B` from the catalog's `llama-3.2-1b`.
    """
    exact = [n for n in names if n.lower() == name.lower() or n.rpartition("/")[2] == name]
    return exact or sorted(names, key=lambda n: not re.search(r"instruct|chat|guard", n, re.IGNORECASE))


def _present(repos: Sequence[str], natives: Sequence[str]) -> Iterator[Path]:
    for repo in repos:
        yield from _snapshots(hub_cache() / _folder(repo))
    for folder in _meta_folders(natives):
        if (folder / "params.json").is_file():
            yield folder


def hub_cache() -> Path:
    """The Hugging Face cache, as huggingface_hub finds it."""
    if direct := os.environ.get("HF_HUB_CACHE"):
        return Path(direct).expanduser()
    home = os.environ.get("HF_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return base.expanduser() / "hub"


def _folder(repo: str) -> str:
    return "models--" + repo.replace("/", "--")


def _snapshots(folder: Path) -> Iterator[Path]:
    """Snapshots with weights in them, the one that `main` points to first."""
    main = folder / "refs" / "main"
    commit = main.read_text(errors="replace").strip()[:64] if main.is_file() else ""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return
    for snapshot in sorted(snapshots.iterdir(), key=lambda s: (s.name != commit, s.name)):
        for place in (snapshot, snapshot / "original"):
            if any(next(place.glob(pattern), None) for pattern in _WEIGHTS):
                yield place
                break


def _meta_folders(natives: Sequence[str]) -> list[Path]:
    return [_meta_home() / native.split("/")[-1].replace(":", "-") for native in natives]


def _meta_home() -> Path:
    """Where Meta's own tool puts what it downloads."""
    return Path(os.environ.get("LLAMA_MODELS_CONFIG_DIR") or "~/.llama").expanduser() / "checkpoints"
