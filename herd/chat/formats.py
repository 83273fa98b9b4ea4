"""Every prompt format by name, and which one a tokenizer belongs to. No torch.

A format is found from what the checkpoint says: the name its files carry, else the text of its chat template together with the
special tokens. File and folder names are never looked at. A checkpoint without either is a base model.

Llama 3.3 cannot be told from 3.1: its checkpoints carry the same chat template. A template of that text is taken for
`llama3.1`, whose tools are described and called as that template does it; conversations without tools are the same in both.
Name `llama3.3` to have its tools in Python calls, which Meta's document recommends for it.

The names that end in `-hf` write conversations as the chat templates of the Hugging Face checkpoints do, `llama3*` and
`llama4` as Meta's code does. `llama3.1-hf` is the template of 3.1 and 3.3, and of 3.2 with today's `date`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

from herd.chat.base import BaseFormat
from herd.chat.codellama70b import CodeLlama70BFormat
from herd.chat.format import ChatFormat
from herd.chat.guard import GuardFormat
from herd.chat.guard_categories import CATEGORIES
from herd.chat.llama2 import Llama2Format
from herd.chat.llama3 import Llama3Format
from herd.chat.llama4 import Llama4Format
from herd.chat.templates import named_in
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["FORMATS", "detect", "format_named"]

FORMATS: Mapping[str, Callable[..., ChatFormat]] = {
    "base": BaseFormat,
    "llama2": Llama2Format,
    "codellama": partial(Llama2Format, code=True),
    "codellama-70b": CodeLlama70BFormat,
    "llama3": partial(Llama3Format, dialect=None, name="llama3"),
    "llama3.1": partial(Llama3Format, dialect="json", name="llama3.1"),
    "llama3.2": partial(Llama3Format, dialect="pythonic", name="llama3.2"),
    "llama3.3": partial(Llama3Format, dialect="pythonic", name="llama3.3"),
    "llama4": Llama4Format,
    "llama3-hf": partial(Llama3Format, dialect=None, strip_content=True, name="llama3-hf"),
    "llama3.1-hf": Llama3Format.as_hf,
    "llama4-hf": Llama4Format.as_hf,
    **{name: partial(GuardFormat, name=name) for name in CATEGORIES},
}
"""Factories by name: what `--format` takes and what catalog entries and checkpoints name."""


def format_named(name: str, tokenizer: Tokenizer, **options: Any) -> ChatFormat:
    """The format called `name` over `tokenizer`.

    `options` are the keyword arguments of the format's class: `policy`, `exclude` and `categories` of the Guards, `dialect`,
    `date` and others of Llama 3 and 4.

    Raises PromptError for an unknown name (listing the known ones), an option that the format does not have, and a vocabulary
    without the format's tokens.
    """
    if name not in FORMATS:
        raise PromptError(f"there is no prompt format {name!r}; choose one of {', '.join(FORMATS)}")
    factory = FORMATS[name]
    if options:
        known = [option for option in signature(factory).parameters if option not in ("tokenizer", "name", "code")]
        if unknown := [option for option in options if option not in known]:
            raise PromptError(f"the {name} format has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return factory(tokenizer, **options)


def detect(tokenizer: Tokenizer) -> ChatFormat:
    """The format that a checkpoint was trained with; `BaseFormat` when nothing says that it is a chat model.

    Raises PromptError when it has a chat template of a format that herd does not know.
    """
    if tokenizer.chat_format is not None:
        return format_named(tokenizer.chat_format, tokenizer)
    if not tokenizer.template:
        return BaseFormat(tokenizer)
    name = _name_from_template(tokenizer.template, tokenizer)
    if name is None:
        raise PromptError(
            "the checkpoint's chat template is of no Llama format that herd knows: name the format with --format, "
            f"one of {', '.join(FORMATS)}"
        )
    return format_named(name, tokenizer)


def _name_from_template(template: str, tokenizer: Tokenizer) -> str | None:
    """Which format a template writes: the one it names when herd wrote it, else from tokens and words that only one has."""
    named = named_in(template)
    if named in FORMATS:
        return named
    guard = "UNSAFE CONTENT CATEGORIES" in template
    if "<|header_start|>" in template:
        return "llama-guard-4" if guard else "llama4"
    if guard and tokenizer.family == "llama3":
        if "Defamation" not in template:
            return "llama-guard-2"
        # The template of 3 8B has a fixed list; those of 3 1B and 11B Vision take other categories.
        return "llama-guard-3-1b" if "excluded_category_keys" in template else "llama-guard-3"
    if "<|start_header_id|>" in template:
        # The template of 3.2 asks for today's date, that of 3.1 and 3.3 has a fixed one, and Llama 3 knows no tools.
        if "strftime_now" in template:
            return "llama3.2"
        return "llama3.1" if "ipython" in template else "llama3"
    if "Source: " in template and tokenizer.special.get("<step>") is not None:
        return "codellama-70b"
    if "[INST]" in template and tokenizer.family in ("llama2", "codellama"):
        if guard:
            return "llama-guard-1"
        return "codellama" if tokenizer.family == "codellama" else "llama2"
    return None
