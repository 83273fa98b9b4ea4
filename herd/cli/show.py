"""`herd show`: where a model lies, its files, and in short what it is. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from herd.cli.columns import columns
from herd.cli.completion import models
from herd.cli.console import note, safe
from herd.cli.list import PLACES
from herd.cli.sizes import size

if TYPE_CHECKING:
    from herd.hub.created import Created

__all__ = ["command", "described"]

EPILOG = """\
Examples:

\b
  herd show llama3.2:1b
  herd show ./Llama-3.2-1B-Instruct --json
"""


@click.command(epilog=EPILOG)
@click.argument("model", shell_complete=models)
@click.option("--modelfile", "part", flag_value="modelfile", help="Only the Modelfile it was made from (herd create).")
@click.option("--system", "part", flag_value="system", help="Only its system prompt (herd create).")
@click.option("--parameters", "part", flag_value="parameters", help="Only its sampling defaults.")
@click.option("--template", "part", flag_value="template", help="Only its chat template.")
@click.option("--license", "part", flag_value="license", help="Only its licence.")
@click.option("--json", "as_json", is_flag=True, help="The same as a JSON object.")
def command(model: str, part: str | None, as_json: bool) -> None:
    """Show where MODEL lies, what files it is made of, and in short what it is (herd inspect says more).

    MODEL is a path or any name that the other commands take.
    """
    from herd.checkpoint.resolve import resolve
    from herd.hub.created import find

    path, made = resolve(model), find(model)
    if part is not None:
        text = _part(part, path, made)
        click.echo(json.dumps({part: text}) if as_json else text.rstrip("\n"))
        return
    said = described(path)
    if made is not None:
        said |= {"name": made.name, "system": made.system or None, "adapter": made.adapter}
        said |= {"parameters_set": _set(made) or None, "prompt_format": made.format}
    if as_json:
        click.echo(json.dumps(said, indent=1))
        return
    facts = {
        key: value for key, value in said.items() if key not in ("files", "problem", "bytes") and value is not None
    }
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        click.echo(f"{key.replace('_', ' '):<{width}}  {safe(_plain(key, value))}")
    rows = [("FILE", "SIZE"), *((safe(file["name"]), _size(file)) for file in said["files"])]
    click.echo("\n" + columns(rows, right={1}))
    click.echo(f"\n{size(said['bytes'])} in {len(said['files'])} files")
    if said["problem"]:
        note(safe(f"problem: {said['problem']}"))


def _part(part: str, path: Path, made: Created | None) -> str:
    """One part as text. Raises HerdError when the model has no such part."""
    from herd.errors import CheckpointError

    text = ""
    if part == "modelfile":
        text = made.modelfile if made is not None and made.modelfile else f"FROM {path}"
    elif part == "system":
        text = "" if made is None else made.system
    elif part == "parameters":
        text = _parameters(path, made)
    elif part == "template":
        from herd.checkpoint.chat_template import template_at

        text = made.format if made is not None and made.format else template_at(path).source
    else:
        files = [] if not path.is_dir() else sorted(path.glob("LICENSE*"))
        own = () if made is None else made.licenses
        text = "\n\n".join([*own, *(file.read_text(encoding="utf-8", errors="replace") for file in files)])
    if not text:
        raise CheckpointError(f"it has no {part}", path=path)
    return text


def _parameters(path: Path, made: Created | None) -> str:
    """A line for each sampling field that the checkpoint or `herd create` sets."""
    from dataclasses import asdict

    from herd.checkpoint.open import open_store
    from herd.checkpoint.store import GenerationDefaults

    own = asdict(getattr(open_store(path), "generation", GenerationDefaults()))
    told = {key: value for key, value in own.items() if value not in (None, frozenset(), {})}
    told |= {} if made is None else _set(made)
    shown = {key: sorted(value) if isinstance(value, frozenset) else value for key, value in told.items()}
    return "\n".join(f"{key:<20} {value}" for key, value in shown.items())


def _set(made: Created) -> dict[str, Any]:
    return dict(made.params) | ({} if made.context is None else {"context": made.context})


def described(path: Path) -> dict[str, Any]:
    """All that is known of the model at `path` without its tensors. A damaged model is a `problem`, not an error."""
    where, repo, revision, folder = _place(path)
    files = [_file(name, file) for name, file in _files(path, folder)]
    said: dict[str, Any] = {"path": str(path), "where": where, "repository": repo, "revision": revision}
    said |= _model(path)
    return said | {"bytes": sum(file["bytes"] or 0 for file in files), "files": files}


def _place(path: Path) -> tuple[str, str | None, str | None, Path]:
    """Whose store `path` is in, the repository and revision there, and the folder of its files."""
    from herd.hub.folders import lm_studio, meta_home
    from herd.hub.ollama import stores

    absolute = path.absolute()
    for folder in (absolute, *absolute.parents):
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
            return "hub", folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name, folder
    folder = absolute if absolute.is_dir() else absolute.parent
    for name, roots in (("ollama", stores()), ("lmstudio", lm_studio()), ("meta", [meta_home()])):
        if any(absolute.is_relative_to(root.absolute()) for root in roots):
            return name, None, None, absolute if name == "ollama" else folder
    return "herd" if folder.parent.name == "embedded" else "path", None, None, absolute


def _files(path: Path, folder: Path) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        return [(path.name, path)]
    walked = ((Path(place, name)) for place, _, names in os.walk(folder) for name in names)
    return sorted((file.relative_to(folder).as_posix(), file) for file in walked)


def _file(name: str, file: Path) -> dict[str, Any]:
    return {"name": name, "bytes": file.stat().st_size if file.exists() else None}


def _model(path: Path) -> dict[str, Any]:
    """What `herd inspect` finds, in a few words, or why there is nothing to say."""
    from herd.checkpoint.inspect import inspect
    from herd.errors import HerdError

    try:
        found = inspect(path)
    except HerdError as error:
        absent = dict.fromkeys(("model", "format", "parameters", "context", "numbers"))
        return {**absent, "problem": str(error)}
    data, config = found.as_dict(), found.config
    return {
        "model": found.what,
        "format": {"hf": "Hugging Face", "meta": "Meta", "gguf": "GGUF"}.get(found.kind, found.kind),
        "parameters": data["parameters"],
        "context": None if config is None else config.max_seq_len,
        "numbers": {name: nbytes for name, (_, _, nbytes) in found.types.items()},
        "problem": found.problem,
    }


def _plain(key: str, value: Any) -> str:
    if key == "where":
        return PLACES.get(value, "a path of your own")
    if key == "numbers":
        return ", ".join(f"{name} {size(count)}" for name, count in value.items())
    if key == "parameters_set":
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).split())


def _size(file: dict[str, Any]) -> str:
    return "missing" if file["bytes"] is None else size(file["bytes"])
