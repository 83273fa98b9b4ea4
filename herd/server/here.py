"""The models of this machine by the names that clients say: what `herd create` made, and what lies in the stores. No torch.

A client says names, never paths: what exists under a name as a file is not opened for it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from herd.checkpoint.resolve import resolve
from herd.errors import HerdError
from herd.hub.created import Created, find
from herd.hub.found import Found, found
from herd.hub.settings import hub_cache
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings

__all__ = ["created_spec", "digest", "here", "pathless", "spec_of"]

EMBEDDED = ("nano", "herd-nano")


def here() -> Iterator[Found]:
    """Every model that can be asked for, the embedded one first."""
    try:
        folder = resolve("nano")
        files = [path.stat() for path in folder.iterdir() if path.is_file()]
        size, newest = sum(one.st_size for one in files), max(one.st_mtime for one in files)
        yield Found("nano", folder, "herd", "safetensors", "F16", size, newest)
    except (HerdError, OSError):
        pass
    yield from (model for model in found(hub_cache()) if model.problem is None)


def spec_of(name: str, settings: ServerSettings, models: Iterable[Found] | None = None) -> ModelSpec | None:
    """The model that a client calls `name`; None when there is none on this machine. `models` are those of `here`, if they are
    known. It reads the disk."""
    if not 0 < len(name) <= 256 or not name.isprintable() or "@" in name:
        return None
    plain = ModelSpec(source=name, name=name, options=settings.engine, keep_alive=settings.keep_alive)
    if name.removesuffix(":latest") in EMBEDDED:
        return replace(plain, source="nano", name="nano")
    try:
        if (made := find(name)) is not None:
            return created_spec(made, replace(plain, name=made.name))
        for model in here() if models is None else models:
            if name in (model.name, f"{model.name}:latest"):
                return replace(plain, source=str(model.path), name=model.name)
        return None if _is_path(name) else replace(plain, source=str(resolve(name)))
    except HerdError:
        return None


def pathless(text: str, spec: ModelSpec | None = None) -> str:
    """`text` without the folders of this machine, for clients: of a path only its last part is left.

    Of `spec`, all is known that it may name; other absolute paths are found by their form (a folder with a space in its name
    can leave what is behind the space).
    """
    places = [] if spec is None else [spec.source, *(path for _, path in spec.loras)]
    for place in sorted({str(Path(one).absolute()) for one in places if os.sep in one} | {str(Path.home())}, key=len):
        parent = str(Path(place).parent)
        if len(parent) > 1:
            text = text.replace(parent + os.sep, "")
    return _FOLDERS.sub("", text)


_FOLDERS = re.compile(r"(?<![\w.:/\\~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'\",;()]+[/\\])+")


def created_spec(made: Created, plain: ModelSpec) -> ModelSpec:
    """A model that `herd create` made: `plain`, with what was said of it. Options of the server come first."""
    options: EngineOptions = plain.options
    options = replace(
        options,
        max_len=options.max_len or made.context,
        format=options.format or made.format,
    )
    return replace(
        plain, source=made.name, options=options, lora=made.adapter, system=made.system, beginning=made.messages
    )


def digest(model: Found) -> str:
    """64 hex digits that change when the files do: a hash of their place, size and time, not of their content."""
    told = f"{model.where} {model.path} {model.size} {model.modified} {model.revision}"
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()


def _is_path(name: str) -> bool:
    """Whether `name` could mean a file: one of the current folder, a home folder, or anything absolute."""
    if name.startswith(("/", "~", ".", "\\")) or os.sep + ".." in name:
        return True
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return True
