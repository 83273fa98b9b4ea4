"""Which files a model name means: a path, the embedded model, or a catalog name found on this machine. No torch.

Checkpoints that other tools downloaded are read where they are: the Hugging Face cache and Meta's ~/.llama/checkpoints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from herd.errors import CheckpointError, ConfigError, UnknownModelError
from herd.model.presets import wanted
from herd.model.release import Release

__all__ = ["resolve", "tuned_release"]

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
        asked = wanted(name)
    except UnknownModelError as unknown:
        cached = _snapshots(hub_cache() / _folder(name)) if _REPO.fullmatch(name) else iter(())
        for snapshot in cached:
            return snapshot
        raise UnknownModelError(f"{unknown}; there is no such file or folder either", near=unknown.near) from None
    release = asked.release
    if release.why_not is not None:
        raise ConfigError(f"{release.name} cannot be run yet: {release.why_not}")
    for place in (place for known in asked.names for place in _places(known, release)):
        found = place if asked.quant is None else _quantized(place, asked.quant)
        if found is not None:
            return found
    here = [held for known in release.repos + release.native if (held := _held(known, release))]
    if here:
        are = "is here: name it to use it" if len(here) == 1 else "are here: name one to use it"
        raise CheckpointError(f"{name!r} is not on this machine, only {', '.join(here)} {are}")
    raise CheckpointError(
        f"{release.name} is not on this machine, and herd cannot download yet. Looked for {len(asked.names)} names in "
        f"{hub_cache()} and {_meta_home()}. Give the path of a folder or file instead, or try the embedded model, 'nano'"
    )


def tuned_release(path: Path) -> Release | None:
    """The release whose tuned variant lies at `path`, by its folder's name: Meta's own, or that of the Hugging Face cache."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    if folder.name == "original":
        folder = folder.parent
    name = folder.name
    if folder.parent.name == "snapshots":
        name = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    try:
        asked = wanted(name)
    except UnknownModelError:
        return None
    return asked.release if asked.exact and asked.tuned else None


def _places(name: str, release: Release) -> Iterator[Path]:
    """Where the weights of the released `name` are on this machine."""
    if "/" in name:
        yield from _snapshots(hub_cache() / _folder(name))
    folder = _meta_home() / name.rpartition("/")[2].replace(":", "-")
    if name in release.native and (folder / "params.json").is_file():
        yield folder


def _held(name: str, release: Release) -> str | None:
    """The released `name`, with its GGUF files where it has such, when it is on this machine."""
    places = list(_places(name, release))
    files = [str(file) for place in places for file in sorted(place.glob("*.gguf"))[:4]]
    return (f"{name} ({', '.join(files)})" if files else name) if places else None


def _quantized(place: Path, quant: str) -> Path | None:
    """The GGUF file in `place` whose name says `quant`, such as "q4-k-m"; of a split one the first part."""
    spelled = "fp?16" if quant in ("f16", "fp16") else re.escape(quant)
    said = re.compile(rf"(?<![a-z0-9]){spelled}(?![a-z0-9]|-(?:[sml]|xx?[sl]|nl|\d)(?![a-z0-9]))")
    named = (file for file in sorted(place.glob("*.gguf")) if said.search(re.sub(r"[\s_]", "-", file.stem.lower())))
    return next(named, None)


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


def _meta_home() -> Path:
    """Where Meta's own tool puts what it downloads."""
    return Path(os.environ.get("LLAMA_MODELS_CONFIG_DIR") or "~/.llama").expanduser() / "checkpoints"
