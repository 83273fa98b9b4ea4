"""The chat template of a checkpoint, or of one of the small files that hold one. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from herd.checkpoint.resolve import resolve
from herd.checkpoint.vocabulary import FILES, tokenizer_at
from herd.errors import CheckpointError
from herd.tokenizer.settings import decode_text, parse_json, read_file, read_settings, template_in
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["FoundTemplate", "template_at"]

MAX_TEMPLATE = 16 * 2**20
"""Bytes of a file that holds a template."""

_SMALL = (".jinja", ".jinja2", ".j2", ".json")


@dataclass(frozen=True, slots=True)
class FoundTemplate:
    """A template (Jinja source), the path it was asked for under, and the tokenizer beside it when it came with a checkpoint."""

    source: str
    path: Path
    tokenizer: Tokenizer | None


def template_at(path_or_name: str | os.PathLike[str]) -> FoundTemplate:
    """The chat template of a model (name, folder or GGUF file), a `.jinja` file, a tokenizer_config.json or a
    chat_template.json. Raises CheckpointError when there is none, and what opening the model raises.
    """
    given = Path(path_or_name).expanduser()
    if given.suffix.lower() in _SMALL and given.is_file():
        return FoundTemplate(_in_file(given), given, None)
    path = resolve(path_or_name)
    if path.is_dir() and not any((path / name).exists() for name in FILES) and not any(path.glob("*.gguf")):
        template, tokenizer = read_settings(path).template, None
    else:
        tokenizer = tokenizer_at(path)
        template = tokenizer.template
    if not template:
        raise CheckpointError(
            "it has no chat template: base models and Meta's own files have none; herd renders their prompts itself",
            path=path,
        )
    return FoundTemplate(template, path, tokenizer)


def _in_file(path: Path) -> str:
    data = read_file(path, MAX_TEMPLATE)
    if path.suffix.lower() != ".json":
        return decode_text(data, path)
    template = template_in(parse_json(data, path))
    if template is None:
        raise CheckpointError("has no chat_template (of several, the one named default counts)", path=path)
    return template
