"""Which files of a repository are worth downloading, and why the others are not.

One copy of the weights, the best one that herd reads: safetensors, else pytorch_model*.bin, else Meta's consolidated.*.pth; in a
GGUF repository one quantization; and the small files that say what the weights are.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from herd.errors import HubError
from herd.hub.listing import RemoteFile

__all__ = ["Choice", "choose", "quants", "says_quant"]

DEFAULT_QUANT = "Q4_K_M"
"""What Ollama and llama.cpp take when nobody says anything."""
_SIDE = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.md",
    "*.tiktoken",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
    "*.pdf",
    "*.chk",
)
_DRAWING = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.pdf")
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])(i?q\d[a-z0-9]*(?:[_-][a-z0-9]{1,2})*|tq\d_\d|fp?16|bf16|f32|fp32|mxfp4)(?![A-Za-z0-9])", re.I
)


@dataclass(frozen=True, slots=True)
class Choice:
    """`files` to download; `skipped` says what is left out and how to get it; `quant` is the GGUF type that was taken."""

    files: tuple[RemoteFile, ...]
    skipped: tuple[str, ...]
    quant: str | None = None


def choose(files: Sequence[RemoteFile], include: Sequence[str] = (), quant: str | None = None) -> Choice:
    """What to download of `files`: all that match a pattern of `include`, if there are any; otherwise one copy of the model.

    Patterns are those of the Hugging Face tools: `*` also matches `/`. Raises HubError when nothing is left.
    """
    if include:
        patterns = [pattern + "*" if pattern.endswith("/") else pattern for pattern in include]
        taken = tuple(file for file in files if any(fnmatch.fnmatchcase(file.path, p) for p in patterns))
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(file.path, pattern) for file in files):
                raise HubError(f"no file matches {pattern!r}; there are {_names(files)}", cause="no_file")
        rest = len(files) - len(taken)
        return Choice(taken, (f"{rest} other files: --include was given",) if rest else ())
    ggufs = [file for file in files if file.path.lower().endswith(".gguf")]
    plain = [file for file in files if "/" not in file.path]
    safetensors = [file for file in plain if file.path.endswith(".safetensors")]
    if quant is not None or (ggufs and not safetensors):
        return _gguf(files, ggufs, quant)
    return _weights(files, plain, safetensors)


def quants(files: Sequence[RemoteFile]) -> list[str]:
    """The GGUF types that the names of `files` say, in their spelling."""
    found = (
        match for file in files if file.path.lower().endswith(".gguf") for match in _QUANT.findall(_stem(file.path))
    )
    return list(dict.fromkeys(found))


def says_quant(name: str, quant: str) -> bool:
    """Whether the file name `name` says the GGUF type `quant`, however it is spelled: Q4_K_M is not Q4_K, F16 is not BF16."""
    plain = re.sub(r"[\s_]", "-", quant.lower())
    spelled = "fp?16" if plain in ("f16", "fp16") else re.escape(plain)
    longer = r"(?![a-z0-9]|-(?:[sml]|xx?[sl]|nl|\d)(?![a-z0-9]))"
    return re.search(rf"(?<![a-z0-9]){spelled}{longer}", re.sub(r"[\s_]", "-", _stem(name).lower())) is not None


def _gguf(files: Sequence[RemoteFile], ggufs: Sequence[RemoteFile], quant: str | None) -> Choice:
    """One quantization, with all its parts, and the small files beside it."""
    models = [file for file in ggufs if not _stem(file.path).lower().startswith("mmproj")]
    there = quants(models)
    wanted = quant
    if wanted is None:
        stems = {_stem(file.path) for file in models}
        wanted = None if len(stems) == 1 else DEFAULT_QUANT
    taken = [file for file in models if wanted is None or says_quant(file.path, wanted)]
    if not models:
        raise HubError(f"there are no GGUF files in it, only {_names(files)}", cause="no_file")
    if not taken:
        asked = f"no GGUF file is {wanted}" if quant else f"there are several quantizations and no {DEFAULT_QUANT}"
        raise HubError(f"{asked}: choose one with --quant, of {', '.join(there) or _names(models)}", cause="no_file")
    stems = sorted({_stem(file.path) for file in taken})
    if len(stems) > 1:
        raise HubError(f"several files are {wanted}: choose one with --include, of {', '.join(stems)}", cause="no_file")
    side = [
        file
        for file in files
        if "/" not in file.path and _matches(file.path, _SIDE) and not _matches(file.path, _DRAWING)
    ]
    others = [name for name in there if not says_quant(taken[0].path, name)]
    skipped = [f"other quantizations ({', '.join(others)}): --quant {others[0]}"] if others else []
    if len(models) < len(ggufs):
        skipped.append("the image encoder (mmproj): herd does not read it; --include 'mmproj*'")
    skipped += _others(files, [*taken, *side, *ggufs])
    return Choice((*side, *taken), tuple(skipped), wanted or (there[0] if there else None))


def _weights(files: Sequence[RemoteFile], plain: Sequence[RemoteFile], safetensors: Sequence[RemoteFile]) -> Choice:
    """One copy of the weights and the small files."""
    kinds = {
        "safetensors": [f for f in safetensors if not f.path.startswith("consolidated")] or list(safetensors),
        "bin": [f for f in plain if _matches(f.path, ("pytorch_model*.bin",))],
        "pth": [f for f in files if _matches(f.path, ("consolidated.*.pth", "original/consolidated.*.pth"))],
    }
    kind = next((kind for kind, found in kinds.items() if found), None)
    side = [f for f in plain if _matches(f.path, _SIDE) and not _matches(f.path, _DRAWING)]
    unused = {"safetensors": "pytorch_model*.bin.index.json", "bin": "model.safetensors.index.json"}.get(kind or "", "")
    side = [f for f in side if not fnmatch.fnmatchcase(f.path, unused)]
    side += [f for f in files if f.path.startswith("additional_chat_templates/")]
    if kind == "pth":
        side += [
            f for f in files if f.path.startswith("original/") and _matches(f.path.removeprefix("original/"), _SIDE)
        ]
    taken = [] if kind is None else kinds[kind]
    if kind is None and not side:
        raise HubError(f"there is nothing in it that herd reads, only {_names(files)}", cause="no_file")
    chosen = [*side, *taken]
    skipped = [] if kind is not None else ["it has no weights that herd reads"]
    kept = {f.path for f in chosen}
    for paths, what in (
        ([f.path for f in kinds["safetensors"]], "safetensors"),
        (
            [f.path for f in safetensors if f.path.startswith("consolidated")],
            "consolidated*.safetensors, the same weights again",
        ),
        ([f.path for f in kinds["bin"]], "pytorch_model*.bin, the same weights again"),
        (
            [f.path for f in files if f.path.startswith("original/")],
            "original/*, the same weights as Meta released them",
        ),
        ([f.path for f in files if f.path.lower().endswith(".gguf")], "GGUF files"),
    ):
        left = [path for path in paths if path not in kept]
        if left and not all(path in kept for path in paths):
            how = (
                f"--quant {(quants([RemoteFile(p, None, None) for p in left]) or ['TYPE'])[0]}"
                if what == "GGUF files"
                else ""
            )
            skipped.append(f"{what}: {how or '--include ' + repr(what.partition(',')[0])}")
            kept.update(left)
    skipped += _others(files, [f for f in files if f.path in kept])
    return Choice(tuple(chosen), tuple(skipped))


def _others(files: Sequence[RemoteFile], known: Sequence[RemoteFile]) -> list[str]:
    names = {file.path for file in known}
    rest = [file for file in files if file.path not in names and not file.path.rpartition("/")[2].startswith(".git")]
    return [f"what herd does not read ({_names(rest)}): --include PATTERN"] if rest else []


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _stem(path: str) -> str:
    """The name of a GGUF file without its ending and its part number."""
    return _PART.sub("", path.rpartition("/")[2].removesuffix(".gguf").removesuffix(".GGUF"))


def _names(files: Sequence[RemoteFile]) -> str:
    shown = [file.path for file in files[:6]]
    return ", ".join(shown) + (f" and {len(files) - 6} more" if len(files) > 6 else "") if shown else "nothing"
