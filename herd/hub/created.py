"""Models that people made with `herd create` and `herd cp`: small manifests in herd's own folder. No torch.

`HERD_HOME` (default ~/.herd) has `models/NAME/TAG.json`, and beside it `TAG.gguf` where `create -q` quantized the weights. A
manifest says where the weights are; it never holds them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from herd.chat.messages import Message
from herd.errors import CheckpointError, ConfigError, UnknownModelError
from herd.files import read_json, short
from herd.model.presets import wanted

__all__ = ["Created", "all_created", "copy", "find", "home", "manifest_of", "own_weights", "remove", "save"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}(?::[A-Za-z0-9][\w.-]{0,79})?", re.ASCII)
SCHEMA = "herd.model/1"
REPORT = ".gguf.report.json"
"""How the name of the proof ends that `herd convert` leaves beside quantized weights."""


@dataclass(frozen=True, slots=True)
class Created:
    """A model by a name of one's own. `base` is an absolute path or a name that other commands take.

    `params` are fields of SamplingParams, `context` tokens, `format` the name of a prompt format, `messages` (role, text) that
    conversations begin with, `modelfile` the text it was made from.
    """

    name: str
    base: str
    params: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None
    system: str = ""
    format: str | None = None
    adapter: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    licenses: tuple[str, ...] = ()
    modelfile: str = ""
    created: float = field(default_factory=time.time)

    def begun(self, conversation: Sequence[Message]) -> tuple[Message, ...]:
        """`conversation` with what comes before it: `system` where it brings no system message, then `messages`."""
        head = next((i for i, one in enumerate(conversation) if one.role != "system"), len(conversation))
        system = tuple(conversation[:head]) or ((Message("system", self.system),) if self.system else ())
        turns = (Message(role, text) for role, text in self.messages)  # pyright: ignore[reportArgumentType]
        return (*system, *turns, *conversation[head:])


def home() -> Path:
    """herd's own folder."""
    return Path(os.environ.get("HERD_HOME") or "~/.herd").expanduser()


def manifest_of(name: str) -> Path:
    """Where the manifest of `name` is or would be. Raises ConfigError for what cannot be a name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:80]!r} cannot be a name: letters, digits, dots, dashes, and one colon before a tag")
    model, _, tag = name.partition(":")
    return home() / "models" / model.lower() / f"{(tag or 'latest').lower()}.json"


def find(name: str) -> Created | None:
    """The created model `name`; None when there is none. Raises CheckpointError for a damaged manifest."""
    if not _NAME.fullmatch(name):
        return None
    manifest = manifest_of(name)
    return _read(manifest) if manifest.is_file() else None


def all_created() -> Iterator[Created | CheckpointError]:
    """Every created model, by name; an error in the place of each that is damaged."""
    for manifest in sorted((home() / "models").glob("*/*.json")):
        if manifest.name.endswith(REPORT):
            continue
        try:
            yield _read(manifest)
        except CheckpointError as error:
            yield error


def save(model: Created, *, overwrite: bool = False) -> Path:
    """Write the manifest, whole or not at all. Raises ConfigError when the name is taken."""
    manifest = manifest_of(model.name)
    _check_free(model.name)
    if manifest.exists() and not overwrite:
        raise ConfigError(f"{model.name} exists already: herd rm {model.name} deletes it, or choose another name")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    new = manifest.with_name(f".{manifest.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps({"schema": SCHEMA, **asdict(model)}, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(new, manifest)
    finally:
        new.unlink(missing_ok=True)
    return manifest


def copy(model: Created, name: str, *, overwrite: bool = False) -> Created:
    """The same model under another name. Weights are not copied, except those that belong to a manifest alone."""
    manifest = manifest_of(name)
    _check_free(name)
    base = model.base
    if (own := own_weights(model)) is not None:
        if manifest.exists() and not overwrite:
            raise ConfigError(f"{name} exists already: herd rm {name} deletes it, or choose another name")
        manifest.parent.mkdir(parents=True, exist_ok=True)
        _share(own, manifest.with_suffix(".gguf"))
        base = str(manifest.with_suffix(".gguf"))
    made = Created(**{**_plain(model), "name": _full(name), "base": base, "created": time.time()})
    save(made, overwrite=overwrite)
    return made


def remove(model: Created) -> int:
    """Delete the manifest and the weights that it owns; the bytes that were freed."""
    manifest = manifest_of(model.name)
    freed = 0
    for file in (manifest, manifest.with_suffix(".gguf")):
        if file.exists():
            freed += file.stat().st_size if file.stat().st_nlink == 1 else 0
            file.unlink()
    for report in manifest.parent.glob(f"{manifest.stem}.gguf.report.*"):
        report.unlink()
    if not any(manifest.parent.iterdir()):
        manifest.parent.rmdir()
    return freed


def own_weights(model: Created) -> Path | None:
    """The file that `create -q` wrote for it; None when its weights lie elsewhere."""
    if not _NAME.fullmatch(model.name):
        return None
    own = manifest_of(model.name).with_suffix(".gguf")
    return own if Path(model.base) == own else None


def _full(name: str) -> str:
    model, _, tag = name.partition(":")
    return f"{model.lower()}:{(tag or 'latest').lower()}"


def _check_free(name: str) -> None:
    """Raises ConfigError for a name that means another model already."""
    with contextlib.suppress(UnknownModelError):
        if name.partition(":")[0].lower() in ("nano", "herd-nano") or wanted(name):
            raise ConfigError(f"{name} is a model that herd knows by that name: choose another one")


def _share(file: Path, other: Path) -> None:
    """`other` is the same content: a second name for it, or where the disk has no such thing, a copy."""
    other.unlink(missing_ok=True)
    try:
        os.link(file, other)
    except OSError:
        import shutil

        shutil.copyfile(file, other)


def _plain(model: Created) -> dict[str, Any]:
    return {one.name: getattr(model, one.name) for one in fields(model)}


_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "base": (str,), "params": (dict,), "context": (int, type(None)), "system": (str,),
    "format": (str, type(None)), "adapter": (str, type(None)), "messages": (list,), "licenses": (list,), "modelfile": (str,),
    "created": (int, float),
}  # fmt: skip


def _read(manifest: Path) -> Created:
    data = read_json(manifest, 8 << 20)
    if data.get("schema") != SCHEMA:
        raise CheckpointError(
            f"schema is {short(data.get('schema'))}, not {SCHEMA}: create the model again", path=manifest
        )
    for key, kinds in _KINDS.items():
        if not isinstance(data.get(key), kinds) or isinstance(data.get(key), bool):
            raise CheckpointError(f"{key} is {short(data.get(key))}: create the model again", path=manifest)
    pairs = data["messages"]
    if not all(isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one) for one in pairs):
        raise CheckpointError("messages are not pairs of texts: create the model again", path=manifest)
    own = {key: data[key] for key in _KINDS}
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in data["params"].items()}
    messages = tuple((role, text) for role, text in pairs)
    return Created(**{**own, "params": params, "messages": messages, "licenses": tuple(map(str, data["licenses"]))})
