"""What the environment says about downloads: the cache, the hub, the token, and whether the network may be used at all.

The variables are those of the Hugging Face tools, so that what works for them works here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from herd.errors import HubError

__all__ = ["HUB", "Settings", "hub_cache", "settings"]

HUB = "https://huggingface.co"
_TOKEN = re.compile(r"[!-~]{1,1000}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Settings:
    """`endpoint` is the hub's address, without a slash at the end; `token_from` says in words where `token` was found."""

    endpoint: str
    cache: Path
    token: str | None = field(repr=False)
    token_from: str | None
    offline: bool


def settings(
    *,
    endpoint: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    token_file: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> Settings:
    """Arguments first, then the environment. Raises HubError for a token file that holds no token and an unusable address."""
    address = (endpoint or os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if not address.startswith(("https://", "http://", "file:///")):
        raise HubError(
            f"{address[:200]!r} is no hub: an endpoint is https://host, http://host or file:///folder", cause="options"
        )
    token, token_from = _token(token_file)
    return Settings(
        address,
        Path(cache).expanduser() if cache is not None else hub_cache(),
        token,
        token_from,
        _says_yes("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if offline is None else offline,
    )


def hub_cache() -> Path:
    """The cache that the Hugging Face tools share: HF_HUB_CACHE, else `hub` in HF_HOME, else in ~/.cache/huggingface."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if direct := os.environ.get(variable):
            return _path(direct)
    return _home() / "hub"


def _home() -> Path:
    if home := os.environ.get("HF_HOME"):
        return _path(home)
    return _path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def _token(token_file: str | os.PathLike[str] | None) -> tuple[str | None, str | None]:
    """The token and where it comes from: the file that was named, HF_TOKEN, or the file that `hf auth login` writes."""
    if token_file is not None:
        return _from_file(Path(token_file).expanduser(), must=True)
    if _says_yes("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None, None
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(variable, "").strip():
            return _checked(token, variable), variable
    saved = os.environ.get("HF_TOKEN_PATH")
    return _from_file(_path(saved) if saved else _home() / "token", must=False)


def _from_file(file: Path, must: bool) -> tuple[str | None, str | None]:
    try:
        with open(file, encoding="utf-8") as opened:
            token = opened.read(2000).strip()
    except (OSError, UnicodeDecodeError) as error:
        if must or not isinstance(error, FileNotFoundError):
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise HubError(f"{file}: the token cannot be read: {why}", cause="bad_token") from error
        return None, None
    if not token and must:
        raise HubError(f"{file}: holds no token", cause="bad_token")
    return (_checked(token, str(file)), str(file)) if token else (None, None)


def _checked(token: str, where: str) -> str:
    if not _TOKEN.fullmatch(token):  # never shown: it may be a secret with a typing mistake
        raise HubError(f"{where} holds no token: a token is one word of plain characters", cause="bad_token")
    return token


def _says_yes(*variables: str) -> bool:
    said = next((value for variable in variables if (value := os.environ.get(variable))), "")
    return said.upper() in ("1", "ON", "YES", "TRUE")
