"""The files of the page as a browser gets them: types, policy, caching, nothing from elsewhere. No browser needed."""

from __future__ import annotations

import asyncio
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from herd.server.pages import HEADERS, TYPES, is_page
from tests.server.conftest import faked

WEB = Path(str(files("herd.server") / "web"))
FILES = sorted(path for path in WEB.rglob("*") if path.is_file())
NAMES = [path.relative_to(WEB).as_posix() for path in FILES]
ROOT = Path(__file__).parents[3]
LARGEST_PICTURE = 150_000
"""Bytes: pictures of pages travel with every clone."""
LONGEST = 500
"""Lines of one file: a second noun is in it before that."""
ADDRESS = re.compile(r"https?://[^\s\"'`)<>]+")
HARMLESS = ("http://www.w3.org/", "http://127.0.0.1", "http://localhost")
"""Names of XML languages, which nobody fetches, and the user's own machine."""


@pytest.fixture(scope="module")
def served() -> dict[str, httpx.Response]:
    """What a server answers for each file."""

    async def run() -> dict[str, httpx.Response]:
        async with faked() as fake:
            return {name: await fake.client.get(f"/web/{name}") for name in NAMES}

    return asyncio.run(run())


def asked(path: str, method: str = "GET", **more: Any) -> httpx.Response:
    """What a server answers."""

    async def run() -> httpx.Response:
        async with faked() as fake:
            return await fake.client.request(method, path, **more)

    return asyncio.run(run())


def test_there_are_pages() -> None:
    assert {"index.html", "engine.html", "icon.svg", "js/main.js", "style/base.css"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_served(served: dict[str, httpx.Response], name: str) -> None:
    got = served[name]
    assert got.status_code == 200
    assert got.headers["content-type"] == TYPES[Path(name).suffix]
    assert got.content == (WEB / name).read_bytes()
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(("path", "name"), [("/", "index.html"), ("/engine", "engine.html")])
def test_pages(path: str, name: str) -> None:
    got = asked(path)
    head = asked(path, "HEAD")
    again = asked(path, headers={"If-None-Match": got.headers["etag"]})
    weak = asked(path, headers={"If-None-Match": f'"other", W/{got.headers["etag"]}'})
    other = asked(path, headers={"If-None-Match": '"other"'})
    assert got.content == (WEB / name).read_bytes()
    assert head.status_code == 200
    assert head.content == b""
    assert (again.status_code, again.content) == (304, b"")
    assert weak.status_code == 304
    assert other.status_code == 200


def test_the_policy_is_strict() -> None:
    got = asked("/")
    policy = dict(part.strip().split(" ", 1) for part in got.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["trusted-types"] == "'none'"
    assert "unsafe" not in got.headers["content-security-policy"]
    assert "*" not in policy["img-src"]
    assert got.headers["referrer-policy"] == "no-referrer"
    assert got.headers["x-frame-options"] == "DENY"
    assert {name: got.headers.get(name) for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    "name",
    [
        "../pages.py",
        "..%2fpages.py",
        "%2e%2e/settings.py",
        "js/../../app.py",
        "js",
        "js/",
        "",
        "index.html%00",
        "nothing.js",
        "//etc/passwd",
        "web/index.html",
    ],
)
def test_only_those_files(name: str) -> None:
    got = asked(f"/web/{name}")
    assert got.status_code == 404
    assert got.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/engine", "/web/js/main.js"])
def test_pages_are_only_read(path: str) -> None:
    assert asked(path, "POST", json={}).status_code == 405


def test_what_is_open_without_a_key() -> None:
    assert all(map(is_page, ["/", "/engine", "/web/js/main.js", "/web/"]))
    assert not any(map(is_page, ["/v1/engine", "/v1/models", "/web", "/engine/", "//", "/webx/a"]))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [found for found in ADDRESS.findall(text) if not found.startswith(HARMLESS)] == []
    assert "//cdn" not in text


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_text_becomes_markup_or_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "createContextualFragment",
        "DOMParser",
        "srcdoc",
        "eval(",
        "new Function",
        "javascript:",
    ):
        assert way not in text, way
    if path.suffix == ".html":
        assert re.findall(r"<script(?![^>]*\ssrc=)", text) == []
        assert re.findall(r"\s(?:on\w+|style)=", text) == []
        assert "<style" not in text


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".js"], ids=[n for n in NAMES if n.endswith(".js")])
def test_what_is_imported_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for names, module in re.findall(r"import \{([^}]*)\} from \"([^\"]+)\"", text):
        other = (path.parent / module).read_text(encoding="utf-8")
        for name in (one.strip() for one in names.split(",")):
            assert re.search(rf"export (?:async )?(?:function\*?|class|const) {name}\b", other), (module, name)
            assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is imported and not used"


def test_the_page_names_files_that_are_there() -> None:
    for page in ("index.html", "engine.html"):
        for name in re.findall(r"(?:href|src)=\"(web/[^\"]+)\"", (WEB / page).read_text(encoding="utf-8")):
            assert (WEB.parent / name).is_file(), name


def test_pictures_in_the_documentation() -> None:
    text = (ROOT / "docs/server/web.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\.\./images/([\w-]+\.png)", text))
    assert shown == {path.name for path in (ROOT / "docs/images").glob("*.png") if path.name in shown}
    assert len(shown) == 5
    for name in shown:
        assert (ROOT / "docs/images" / name).stat().st_size < LARGEST_PICTURE
