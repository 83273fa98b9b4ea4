"""Modelfiles, as Ollama has them: a base model and what is said on top of it. Text in, `Modelfile` out. No torch.

    FROM llama3.2:1b
    PARAMETER temperature 0.2
    PARAMETER num_ctx 8192
    SYSTEM You are a careful librarian.

Instructions are not case-sensitive, `#` begins a comment at the start of a line, and a value in triple quotes may have several
lines. Nothing is skipped: an instruction or parameter that herd does not have is refused with its line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from herd.errors import ConfigError

__all__ = ["PARAMETERS", "Modelfile", "parse"]

INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES")
ROLES = ("system", "user", "assistant")

_SAMPLING: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "typical_p": ("typical_p", float),
    "repeat_penalty": ("repetition_penalty", float),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "seed": ("seed", int),
    "num_predict": ("max_tokens", int),
    "stop": ("stop", str),
}
"""Parameter -> field of SamplingParams, and how its text is read."""

PARAMETERS = (*_SAMPLING, "num_ctx", "repeat_last_n")

_ABSENT = {
    "mirostat": "use top_p or min_p", "mirostat_eta": "use top_p or min_p", "mirostat_tau": "use top_p or min_p",
    "tfs_z": "use min_p", "num_gpu": "choose a device with --device", "num_thread": "set OMP_NUM_THREADS",
    "draft_num_predict": "choose what guesses with --draft",
}  # fmt: skip
"""Parameters of Ollama that herd has no equal of, and what does something alike."""

WHOLE_TEXT = -1
"""`repeat_last_n`: herd's penalties see the whole text, which is what this value means."""


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What a Modelfile says. `base` is a name or path; `params` fields of SamplingParams; `context` tokens (num_ctx).

    `messages` are (role, text) that every conversation begins with; `licenses` and `requires` are kept as they are.
    """

    base: str
    params: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None
    system: str = ""
    template: str = ""
    adapter: str | None = None
    licenses: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    requires: str | None = None


def parse(text: str) -> Modelfile:
    """The Modelfile in `text`. Raises ConfigError with the line for everything that is not understood."""
    found = Modelfile("")
    for line, name, value in _instructions(text):
        found = _with(found, line, name, value)
    if not found.base:
        raise ConfigError("the Modelfile has no FROM: its first line names a model, a folder or a .gguf file")
    return found


def _with(found: Modelfile, line: int, name: str, value: str) -> Modelfile:
    if not value.strip():
        raise _wrong(line, f"{name} has no value")
    if name == "PARAMETER":
        return _parameter(found, line, value)
    if name == "LICENSE":
        return replace(found, licenses=(*found.licenses, value))
    if name == "MESSAGE":
        role, _, said = value.partition(" ")
        if role.lower() not in ROLES or not said.strip():
            raise _wrong(line, f"MESSAGE needs one of {', '.join(ROLES)} and a text")
        return replace(found, messages=(*found.messages, (role.lower(), _unquoted(said.strip(), line))))
    key = {"FROM": "base"}.get(name, name.lower())
    if getattr(found, key):
        raise _wrong(line, f"a second {name}: there can be one")
    return replace(found, **{key: value})


def _parameter(found: Modelfile, line: int, value: str) -> Modelfile:
    name, _, text = value.partition(" ")
    name, text = name.lower(), _unquoted(text.strip(), line)
    if not text:
        raise _wrong(line, f"PARAMETER {name} has no value")
    if name == "repeat_last_n":
        if _read(int, name, text, line) != WHOLE_TEXT:
            raise _wrong(line, f"repeat_last_n {text}: herd's penalties see the whole text, which is repeat_last_n -1")
        return found
    if name == "num_ctx":
        context = _read(int, name, text, line)
        if context < 1:
            raise _wrong(line, f"num_ctx is {context}: expected a positive number of tokens")
        return replace(found, context=context)
    if name in _ABSENT:
        raise _wrong(line, f"herd has no parameter {name}: leave the line out and {_ABSENT[name]}")
    if name not in _SAMPLING:
        near = difflib.get_close_matches(name, PARAMETERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PARAMETERS)}"
        raise _wrong(line, f"no parameter is called {name!r}: {hint}")
    field_name, kind = _SAMPLING[name]
    read = _read(kind, name, text, line)
    params = dict(found.params)
    if name == "stop":
        read = (*params.get("stop", ()), read)
    elif name == "num_predict" and read < 0:  # -1 and -2: until the context is full
        read = None
    params[field_name] = read
    return replace(found, params=params)


def _read(kind: Callable[[str], Any], name: str, text: str, line: int) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise _wrong(line, f"{name} is {text[:40]!r}: expected {'an integer' if kind is int else 'a number'}") from None


def _instructions(text: str) -> list[tuple[int, str, str]]:
    """(line, instruction, value) in order."""
    found = []
    lines = text.removeprefix("\ufeff").splitlines()
    at = 0
    while at < len(lines):
        start, line = at + 1, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        name = word.upper()
        if name not in INSTRUCTIONS:
            near = difflib.get_close_matches(name, INSTRUCTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(INSTRUCTIONS)}"
            raise _wrong(start, f"{word[:40]!r} is no instruction: {hint}")
        before, opened, inside = rest.partition('"""')
        if not opened:
            value = rest.strip()
            # PARAMETER and MESSAGE begin with a word of their own; what follows it is unquoted there.
            found.append((start, name, value if name in ("PARAMETER", "MESSAGE") else _unquoted(value, start)))
            continue
        parts = [inside]
        while '"""' not in parts[-1]:
            if at == len(lines):
                raise _wrong(start, 'the text in """ never ends')
            parts.append(lines[at])
            at += 1
        parts[-1], _, behind = parts[-1].partition('"""')
        if behind.strip():
            raise _wrong(at, f'there is more behind the closing """: {behind.strip()[:40]!r}')
        found.append((start, name, before + "\n".join(parts)))
    return found


def _unquoted(text: str, line: int) -> str:
    r"""A value without its quotes; \n, \t, \" and \\ stand for themselves inside them."""
    if len(text) < 2 or text[0] != '"':
        return text
    if text[-1] != '"':
        raise _wrong(line, "a quote is opened and not closed")
    escapes = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}
    out, rest = [], iter(text[1:-1])
    for char in rest:
        if char != "\\":
            out.append(char)
            continue
        after = next(rest, "")
        out.append(escapes.get(after, "\\" + after))
    return "".join(out)


def _wrong(line: int, what: str) -> ConfigError:
    return ConfigError(f"Modelfile, line {line}: {what}")
