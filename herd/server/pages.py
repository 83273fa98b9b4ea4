"""The web page: `/` is a chat, `/engine` shows the engine at work. Static files, read once, from this package only. No torch.

The files in `herd/server/web/` are what a browser gets: no build step, nothing from elsewhere, no inline scripts. The policy
makes the browser hold to that; trusted types, allowed to nobody, keep any text from becoming markup or a script.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from herd.server.errors import ApiError

__all__ = ["HEADERS", "TYPES", "is_page", "router"]

router = APIRouter(tags=["web"], include_in_schema=False)

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGES = {"/": "index.html", "/engine": "engine.html"}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    # what the user attaches; pictures that a reply links to are never fetched, they would tell others what was said
    "img-src": "'self' data: blob:",
    # the second and third: a tool endpoint on the user's own machine, called when the user says so
    "connect-src": "'self' http://127.0.0.1:* http://localhost:*",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cache-Control": "no-cache",  # asked for again each time, and answered with 304 while it is the same
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    type: str
    tag: str


def is_page(path: str) -> bool:
    """Whether `path` is part of the page, which anybody may read: it holds no secrets, and asks for the key."""
    return path in PAGES or path.startswith("/web/")


@router.api_route("/", methods=["GET", "HEAD"])
async def chat_page(request: Request) -> Response:
    """The chat."""
    return _answer(request, PAGES["/"])


@router.api_route("/engine", methods=["GET", "HEAD"])
async def engine_page(request: Request) -> Response:
    """The engine at work."""
    return _answer(request, PAGES["/engine"])


@router.api_route("/web/{name:path}", methods=["GET", "HEAD"])
async def web_file(request: Request, name: str) -> Response:
    """A file that the pages are made of. Only names that are there when the server first looks are ever opened."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    file = _all().get(name)
    if file is None:
        raise ApiError(404, f"there is no file {name[:200]!a} here")
    headers = HEADERS | {"ETag": file.tag}
    if file.tag in (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.type)


@cache
def _all() -> dict[str, _File]:
    """Every file by its path below `web/`."""
    return dict(_walk(files("herd.server") / "web", ""))


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, _File]]:
    found: list[tuple[str, _File]] = []
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            found += _walk(entry, name + "/")
        elif (type := TYPES.get(name[name.rfind(".") :])) is not None:
            body = entry.read_bytes()
            found.append((name, _File(body, type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')))
    return found
