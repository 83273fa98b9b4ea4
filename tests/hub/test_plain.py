"""Plain mirrors: folders on disk and on the web, with manifests and without, and copied caches."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd.errors import HubError
from herd.hub import endpoint
from herd.hub.fetch import Quiet
from herd.hub.pull import pull
from tests.hub.mirror import COMMIT, listening, sha256
from tests.hub.repos import BIG, REPOS, SHARDS, TAKEN, TINY


@pytest.fixture
def tree(home: Path) -> Path:
    """A mirror: ORG/NAME with the files of TINY."""
    root = home / "mirror"
    for name, data in REPOS[TINY].items():
        file = root / TINY / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root


@contextlib.contextmanager
def static(folder: Path) -> Iterator[str]:
    """Python's own file server: no listing that we read, no ranges, no hub headers."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with listening(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as address:
        yield address


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def taken() -> dict[str, bytes]:
    return {name: REPOS[TINY][name] for name in TAKEN}


def sums(tree: Path, names: set[str]) -> None:
    lines = [f"{sha256(REPOS[TINY][name])}  ./{name}\n" for name in sorted(names)]
    (tree / TINY / "SHA256SUMS").write_text("".join(lines))


def test_a_folder(tree: Path) -> None:
    folder = pull(TINY, endpoint=tree.as_uri())
    assert contents(folder) == taken()
    assert pull(TINY, endpoint=tree.as_uri(), offline=True) == folder, "a folder is no network"
    (tree / TINY / "config.json").write_text("{}")
    assert pull(TINY, endpoint=tree.as_uri()) != folder, "another content is another commit"


def test_reading_a_large_mirror_is_said(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LARGE", 500_000)
    watch = Quiet()
    pull(TINY, endpoint=tree.as_uri(), watch=watch)
    assert watch.notes == [
        f"reading {name} for its digest (a SHA256SUMS file in the mirror saves that)" for name in sorted(SHARDS)
    ]


def test_a_folder_with_a_manifest_that_lies(tree: Path) -> None:
    sums(tree, {BIG})
    (tree / TINY / BIG).write_bytes(b"damaged")
    with pytest.raises(HubError, match=f"expected sha256 {sha256(REPOS[TINY][BIG])}, got {sha256(b'damaged')}"):
        pull(TINY, endpoint=tree.as_uri())


def test_a_copied_cache_is_a_mirror(hub: str, home: Path, tmp_path: Path) -> None:
    first = pull(TINY)
    shutil.copytree(home / "cache", home / "stick", symlinks=True)
    again = pull(TINY, endpoint=(home / "stick").as_uri(), cache=home / "other")
    assert again.name == COMMIT
    assert contents(again) == contents(first)
    with pytest.raises(HubError, match="has no revisions such as v9"):
        pull(TINY, revision="v9", endpoint=(home / "stick").as_uri(), cache=home / "other")


def test_folders_that_are_not_there(home: Path, tree: Path) -> None:
    with pytest.raises(HubError, match="there is no such folder"):
        pull(TINY, endpoint=(home / "nowhere").as_uri())
    with pytest.raises(HubError, match=r"holds no someone/Else \(and no models--someone--Else\)"):
        pull("someone/Else", endpoint=tree.as_uri())


def test_a_link_out_of_the_mirror(tree: Path, home: Path) -> None:
    (home / "secret.json").write_text("{}")
    (tree / TINY / "more.json").symlink_to(home / "secret.json")
    with pytest.raises(Exception, match="link that leads outside"):
        pull(TINY, endpoint=tree.as_uri())


def test_any_web_server(tree: Path) -> None:
    sums(tree, TAKEN)
    with static(tree) as address:
        assert contents(pull(TINY, endpoint=address)) == taken()


def test_metas_checklist(tree: Path) -> None:
    names = ["original/params.json", "original/tokenizer.model", "original/consolidated.00.pth"]
    folder = tree / "meta/Llama"
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(tree / TINY / name, folder)
    lines = [f"{hashlib.md5(REPOS[TINY][n]).hexdigest()}  {n.removeprefix('original/')}\n" for n in names]
    (folder / "checklist.chk").write_text("".join(lines))
    with static(tree) as address:
        pulled = pull("meta/Llama", endpoint=address)
        assert contents(pulled) == {n.removeprefix("original/"): REPOS[TINY][n] for n in names}
    (folder / "consolidated.00.pth").write_bytes(b"x" * 1000)
    with pytest.raises(HubError, match="expected md5"):
        pull("meta/Llama", endpoint=tree.as_uri(), cache=tree / "cache")


def test_a_web_server_without_a_manifest(tree: Path) -> None:
    with (
        static(tree) as address,
        pytest.raises(HubError, match=r"no SHA256SUMS or checklist\.chk in someone/Tiny-Llama/.*sha256sum"),
    ):
        pull(TINY, endpoint=address)


@pytest.mark.parametrize("text", ["", "hello", f"{'0' * 63}  x", f"{'g' * 64}  x", "<html></html>"])
def test_a_manifest_that_is_none(tree: Path, text: str) -> None:
    (tree / TINY / "SHA256SUMS").write_text(text)
    with static(tree) as address, pytest.raises(HubError, match=r"names no files|is not a digest and a file name"):
        pull(TINY, endpoint=address)


@pytest.mark.parametrize("name", ["../../evil.json", "/evil.json"])
def test_a_manifest_with_hostile_names(tree: Path, home: Path, name: str) -> None:
    (tree / TINY / "SHA256SUMS").write_text(f"{sha256(b'{}')}  {name}\n")
    (tree / "evil.json").write_text("{}")
    with static(tree) as address, pytest.raises(HubError, match="leads outside"):
        pull(TINY, endpoint=address, include=["*"])
    assert list(home.rglob("evil.json")) == [tree / "evil.json"]


@pytest.mark.parametrize("address", ["ftp://x", "huggingface.co", "file://relative", "/folder"])
def test_endpoints_that_are_none(address: str) -> None:
    with pytest.raises(HubError, match=r"is no hub: an endpoint is https://host"):
        pull(TINY, endpoint=address)
