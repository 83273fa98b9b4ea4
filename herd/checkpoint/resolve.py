"""Which files a model name means: a path, the embedded model, or a name that is found on this machine. No torch.

Checkpoints that other tools downloaded are read where they are. What is looked at, first hit wins: a path; `nano`; what
`herd create` made; the Hugging Face cache (which `herd pull` fills); Meta's ~/.llama/checkpoints; Ollama's store; LM Studio's
folders. The originals come first, so that a name means the same numbers whether or not some other tool has a quantized copy, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from herd.errors import CheckpointError, ConfigError, HerdError, HubError, UnknownModelError
from herd.hub import created, ollama
from herd.hub.asked import asked as asked_for
from herd.hub.cached import gguf_of, snapshots
from herd.hub.folders import lm_studio_models, meta_home, meta_model
from herd.hub.settings import hub_cache
from herd.model.presets import Wanted, wanted
from herd.model.release import Release

__all__ = ["resolve", "tuned_release"]

_FILES = (".gguf", ".safetensors", ".bin", ".pth", ".json", ".model")


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
    if (made := created.find(name)) is not None:
        return _base_of(made)
    if name.endswith(_FILES) or name.startswith((".", "~", "/", "\\")):
        raise CheckpointError("there is no such file or folder", path=name[:500])
    return _from_catalog(name)


def _existing(name: str) -> Path | None:
    try:
        place = Path(name).expanduser()
        return place if name and place.exists() else None
    except (OSError, RuntimeError, ValueError):  # names that no file can have
        return None


def _base_of(made: created.Created) -> Path:
    """Where the weights of a created model are."""
    try:
        return resolve(made.base)
    except HerdError as error:
        raise CheckpointError(f"{made.name} is made from {made.base}, which is gone: {error}") from None


def _embedded() -> Path:
    folder = Path(__file__).parents[1] / "embedded" / "nano"
    if not (folder / "config.json").is_file():
        raise CheckpointError("the embedded model is missing: install herd again", path=folder)
    return folder


def _from_catalog(name: str) -> Path:
    try:
        asked = wanted(name)
    except UnknownModelError as unknown:
        for place in _elsewhere(name):
            return place
        raise UnknownModelError(f"{unknown}; there is no such file or folder either", near=unknown.near) from None
    release = asked.release
    if release.why_not is not None:
        raise ConfigError(f"{release.name} cannot be run yet: {release.why_not}")
    for place in (place for known in asked.names for place in _places(known, release)):
        found = place if asked.quant is None else gguf_of(place, asked.quant)
        if found is not None:
            return found
    for place in _copies(name, asked):
        return place
    here = [held for known in release.repos + release.native if (held := _held(known, release))]
    if here:
        are = "is here: name it to use it" if len(here) == 1 else "are here: name one to use it"
        raise CheckpointError(f"{name!r} is not on this machine, only {', '.join(here)} {are}")
    raise CheckpointError(
        f"{release.name} is not on this machine: {_how_to_get(name)}. Looked for {len(asked.names)} names in {hub_cache()} and "
        f"{meta_home()}, and in Ollama's and LM Studio's folders. A path works, too, and so does the embedded model, 'nano'"
    )


def _how_to_get(name: str) -> str:
    """The command that downloads `name`, or why there is none."""
    try:
        asked_for(name)
    except HubError as error:
        return str(error)
    return f"download it with herd pull {name}"


def _elsewhere(name: str) -> Iterator[Path]:
    """Where a model outside of the catalog is: ORG/NAME[@REVISION][:QUANT] in the caches, or anything that Ollama has."""
    try:
        repo = asked_for(name)
    except (HubError, UnknownModelError):
        repo = None
    if repo is not None:
        for place in snapshots(hub_cache(), repo.repo, repo.revision):
            file = place if repo.quant is None else gguf_of(place, repo.quant)
            if file is not None:
                yield file
    if (found := ollama.find(name)) is not None:
        yield found
    if repo is not None and repo.revision is None:
        yield from lm_studio_models(repo.repo, repo.quant)


def _copies(name: str, asked: Wanted) -> Iterator[Path]:
    """What Ollama and LM Studio have of a release. Their quantized copies are used for names that ask for no certain files."""
    if asked.exact:
        for known in asked.exact:
            yield from lm_studio_models(known)
        return
    tags = (name,) if asked.quant is not None or asked.tuned is not None else (name, *asked.release.tags)
    for tag in tags:
        if (found := ollama.find(tag)) is not None:
            yield found
    for known in asked.names:
        yield from lm_studio_models(known, asked.quant)


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
    """Where the weights of the released `name` are on this machine, as they were released."""
    if "/" in name:
        yield from snapshots(hub_cache(), name)
    if name in release.native and (folder := meta_model(name)) is not None:
        yield folder


def _held(name: str, release: Release) -> str | None:
    """The released `name`, with its GGUF files where it has such, when it is on this machine."""
    places = list(_places(name, release))
    files = [str(file) for place in places for file in sorted(place.glob("*.gguf"))[:4]]
    return (f"{name} ({', '.join(files)})" if files else name) if places else None
