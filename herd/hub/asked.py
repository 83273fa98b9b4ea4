"""What a name asks to download: a repository, and in it a revision or a quantization."""

from __future__ import annotations

import re
from dataclasses import dataclass

from herd.errors import HubError, UnknownModelError
from herd.model.presets import wanted

__all__ = ["Asked", "asked", "is_repo"]

_REPO = re.compile(r"[A-Za-z0-9_](?:[\w.-]{0,94}\w)?/[A-Za-z0-9_](?:[\w.-]{0,94}\w)?", re.ASCII)
_REVISION = re.compile(r"[\w][\w./+-]{0,254}", re.ASCII)
_QUANT = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Asked:
    """`repo` is ORG/NAME. `revision` is a branch, tag or commit (None: main); `quant` a GGUF type such as Q4_K_M.

    `note` says what was chosen where the name left that open.
    """

    repo: str
    revision: str | None = None
    quant: str | None = None
    note: str | None = None


def is_repo(name: str) -> bool:
    """Whether `name` can be the name of a repository on the hub: two plain words with a slash between them."""
    return _REPO.fullmatch(name) is not None and "--" not in name and ".." not in name


def asked(name: str) -> Asked:
    """What `name` asks for: ORG/REPO[@REVISION][:QUANT], its address on the hub, or any name of the catalog.

    Raises UnknownModelError for names that are neither, HubError for a release without a repository.
    """
    if name in ("nano", "herd-nano"):
        raise HubError("nano comes with herd: there is nothing to download", cause="options")
    plain, _, revision = _ADDRESS.sub("", name.strip(), count=1).partition("@")
    repo, _, tree = plain.partition("/tree/")
    if tree:
        revision = revision or tree.rstrip("/")
    base, _, quant = repo.rstrip("/").partition(":")
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise HubError(f"{revision[:80]!r} cannot be a revision: it is a branch, a tag or a commit", cause="options")
    try:
        known = wanted(repo)
    except UnknownModelError as unknown:
        if not is_repo(base):
            raise UnknownModelError(
                f"{unknown}; for another model give its repository: ORG/NAME, ORG/NAME@REVISION, ORG/NAME:Q4_K_M",
                near=unknown.near,
            ) from None
        return Asked(base, revision or None, _checked(quant))
    repos = [released for released in known.names if "/" in released]
    if not repos:
        raise HubError(
            f"{known.release.name} is in no repository that herd knows, only on Meta's own servers: name a repository, "
            "or put Meta's folder into ~/.llama/checkpoints",
            cause="no_repo",
        )
    if known.quant is not None:
        raise HubError(
            f"Meta publishes no GGUF files of {known.release.name}: name a repository that has them, "
            f"herd pull ORG/NAME:{known.quant.upper().replace('-', '_')}",
            cause="no_file",
        )
    others = [repo for repo in repos[1:] if known.tuned is None]
    note = f"{name} means {repos[0]} here" + (f" (there are also {', '.join(others[:3])})" if others else "")
    return Asked(repos[0], revision or None, None, None if known.exact else note)


def _checked(quant: str) -> str | None:
    if quant and not _QUANT.fullmatch(quant):
        raise HubError(f"{quant[:80]!r} cannot be a quantization: an example is Q4_K_M", cause="options")
    return quant or None
