"""From a Modelfile to a model with a name: everything it names is looked up and checked before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from herd.chat.formats import FORMATS, format_named
from herd.chat.params import SamplingParams
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.vocabulary import tokenizer_at
from herd.convert.driver import convert
from herd.convert.verify import Watch
from herd.errors import ConfigError, HerdError
from herd.files import short
from herd.hub.created import Created, find, manifest_of, save
from herd.hub.modelfile import Modelfile, parse

__all__ = ["create", "format_of"]

Note = Callable[[str], None]

_GO = re.compile(r"\{\{-?\s*(?:\.|range\b|if\b|end\b|else\b|\$)")
_MARKS = (
    ("<|header_start|>", "llama4"),
    ("<|start_header_id|>", "llama3.1"),
    ("<<SYS>>", "llama2"),
    ("[INST]", "llama2"),
)
"""What only one family's templates write, the newest first."""


def create(
    name: str,
    text: str,
    folder: Path,
    *,
    quant: str | None = None,
    overwrite: bool = False,
    note: Note = lambda line: None,
    watch: Watch | None = None,
) -> Created:
    """Make the model `name` of the Modelfile `text`, whose relative paths begin in `folder`.

    `quant` names a GGUF mix: `herd.convert` then writes the weights anew, with its proof (`watch` hears of it), and they belong
    to the model. What is decided and not said in the file is told to `note`.

    Raises ConfigError for a name that is taken and whatever the Modelfile gets wrong, PromptError for a prompt format that the
    model's vocabulary does not have, CheckpointError and UnknownModelError when the base is not here.
    """
    manifest = manifest_of(name)
    if manifest.exists() and not overwrite:
        raise ConfigError(f"{name} exists already: --overwrite replaces it, herd rm {name} deletes it")
    said = parse(text)
    made = _over(said, _base(said, folder), folder)
    made = replace(made, name=f"{manifest.parent.name}:{manifest.stem}", modelfile=text)
    if said.template:
        made = replace(made, format=format_of(said.template, note))
    if said.requires is not None:
        note(f"REQUIRES {said.requires} is Ollama's version, which herd is not: kept, not checked")
    _check(made)
    if quant is not None:
        made = replace(made, base=str(_quantized(resolve(made.base), manifest, quant, overwrite, watch)))
    save(made, overwrite=overwrite)
    return made


def format_of(template: str, note: Note = lambda line: None) -> str:
    """The prompt format that a TEMPLATE means: a name, a Jinja template that writes what herd writes, or a Go template.

    Go templates are not executed: the family is recognised by its tokens, and `note` says so. Raises ConfigError for a template
    of no Llama, and for a Jinja template that writes other prompts than herd (`herd lint-template` shows where).
    """
    text = template.strip()
    if text in FORMATS:
        return text
    if _GO.search(text) and "{%" not in text:
        family = next((family for mark, family in _MARKS if mark in text), None)
        if family is None:
            raise ConfigError(f"TEMPLATE is a Go template of no Llama: name a format, one of {', '.join(FORMATS)}")
        note(f"TEMPLATE is a Go template and is not executed: by its tokens the format is {family}")
        return family
    if "{" not in text:
        raise ConfigError(f"TEMPLATE is {short(text)}: name a format, one of {', '.join(FORMATS)}")
    from herd.chat.lint import lint
    from herd.chat.sandbox import Sandbox

    with Sandbox() as sandbox:
        report = lint(template, sandbox)
    if report.refused is not None:
        raise ConfigError(f"TEMPLATE cannot be used: {report.refused.explain()}")
    wrong = [finding.case for finding in report.findings if finding.status != "same"]
    if wrong:
        raise ConfigError(
            f"TEMPLATE writes other prompts than herd's {report.format} in {len(wrong)} of {len(report.findings)} conversations "
            f"(first: {wrong[0]}): herd lint-template shows them; to use herd's, write TEMPLATE {report.format}"
        )
    return report.format


def _base(said: Modelfile, folder: Path) -> Created:
    """What FROM names: another created model with all it says, or a path or name with nothing else."""
    place = folder / Path(said.base).expanduser()
    if place.exists():
        return Created("", str(place.resolve()))
    if (known := find(said.base)) is not None:
        return known
    try:
        resolve(said.base)
    except HerdError as error:
        raise type(error)(f"FROM {said.base}: {error}") from None
    return Created("", said.base)


def _over(said: Modelfile, below: Created, folder: Path) -> Created:
    """`said` over what the base says already."""
    adapter = below.adapter
    if said.adapter is not None:
        if adapter is not None:
            raise ConfigError(
                f"{said.base} has an adapter already ({adapter}), and a model has one: herd convert merges"
            )
        place = folder / Path(said.adapter).expanduser()
        if not place.exists():
            raise ConfigError(f"ADAPTER {said.adapter}: there is no such file or folder")
        adapter = str(place.resolve())
    return replace(
        below,
        params={**below.params, **said.params},
        context=said.context or below.context,
        system=said.system or below.system,
        adapter=adapter,
        messages=said.messages or below.messages,
        licenses=said.licenses or below.licenses,
        created=Created("", "").created,
    )


def _check(made: Created) -> None:
    SamplingParams(**made.params)
    path = resolve(made.base)
    if made.format is not None:
        format_named(made.format, tokenizer_at(path))
    longest = open_store(path).config.max_seq_len
    if made.context is not None and made.context > longest:
        raise ConfigError(f"num_ctx is {made.context:,}, and the model was made for {longest:,} tokens")


def _quantized(src: Path, manifest: Path, quant: str, overwrite: bool, watch: Watch | None) -> Path:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    dst = manifest.with_suffix(".gguf")
    report = convert(src, dst, to="gguf", quant=quant, overwrite=overwrite, watch=watch)
    if not report.passed:
        raise HerdError(f"quantizing {src} to {quant} did not pass its proof: herd convert shows the report")
    return dst
