"""Deleting: exactly what was named, never what something else uses, never anything outside of the repository's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd.errors import HubError
from herd.hub.cache import RepoCache
from herd.hub.lock import locked
from herd.hub.pull import pull
from herd.hub.remove import removal, remove
from tests.hub.mirror import COMMIT, Mirror
from tests.hub.repos import BIG, GGUF, REPOS, TAKEN, TINY

NEXT = "f" * 40


@pytest.fixture
def two(hub: str, mirror: Mirror, cache: Path) -> RepoCache:
    """TINY in two commits, which differ in config.json."""
    pull(TINY)
    mirror.commit = NEXT
    mirror.repos[TINY]["config.json"] = b"{}"
    pull(TINY)
    return RepoCache(cache, TINY)


def everything(cache: Path) -> set[str]:
    return {p.relative_to(cache).as_posix() for p in cache.rglob("*") if ".locks" not in p.parts}


def test_a_whole_repository(two: RepoCache, cache: Path) -> None:
    pull(GGUF)
    others = {path for path in everything(cache) if "Tiny-GGUF" in path}
    what = removal(two)
    assert what.freed == sum(len(REPOS[TINY][name]) for name in TAKEN) + 2
    assert two.folder.is_dir(), "a plan deletes nothing"
    remove(what)
    assert everything(cache) == others


def test_one_revision_keeps_what_the_other_uses(two: RepoCache) -> None:
    what = removal(two, COMMIT[:8])
    assert [blob.read_bytes() for blob in what.blobs] == [REPOS[TINY]["config.json"]]
    assert what.freed == len(REPOS[TINY]["config.json"])
    remove(what)
    assert two.commits() == [NEXT]
    assert two.branches() == {"main": NEXT}
    assert (two.snapshot(NEXT) / BIG).read_bytes() == REPOS[TINY][BIG]
    remove(removal(two, "main"))
    assert two.commits() == []
    assert two.branches() == {}
    assert list(two.blobs.iterdir()) == []


def test_one_quantization(hub: str, cache: Path) -> None:
    folder = pull(GGUF).parent
    pull(GGUF, quant="Q8_0")
    repo = RepoCache(cache, GGUF)
    what = removal(repo, quant="q8_0")
    assert what.freed == 6001
    remove(what)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "Tiny-Q4_K_M.gguf"]
    assert repo.branches()
    with pytest.raises(HubError, match="has no Q5_0 GGUF file"):
        removal(repo, quant="Q5_0")


def test_copies_instead_of_links(hub: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    pull(TINY)
    what = removal(RepoCache(cache, TINY))
    assert what.freed == sum(len(REPOS[TINY][name]) for name in TAKEN)
    remove(what)
    assert everything(cache) == set()


@pytest.mark.parametrize("inner", ["", "snapshots", "blobs", "refs"])
def test_links_to_elsewhere_are_refused(two: RepoCache, home: Path, inner: str) -> None:
    place = two.folder / inner
    place.rename(home / "moved")
    place.symlink_to(home / "moved")
    before = everything(home / "moved")
    with pytest.raises(HubError, match="is a link to somewhere else"):
        remove(removal(two))
    assert everything(home / "moved") == before


def test_a_snapshot_that_is_a_link_is_not_entered(two: RepoCache, home: Path) -> None:
    (home / "precious").mkdir()
    (home / "precious/file").write_text("x")
    (two.snapshots / "evil").symlink_to(home / "precious")
    remove(removal(two))
    assert (home / "precious/file").read_text() == "x"


def test_what_is_not_there(two: RepoCache, cache: Path) -> None:
    with pytest.raises(HubError, match=r"has no v9 in .*; it has main, "):
        removal(two, "v9")
    for repo in ("someone/Else", "../x", "."):
        with pytest.raises(HubError):
            removal(RepoCache(cache, repo))


def test_a_running_download_is_not_disturbed(two: RepoCache) -> None:
    what = removal(two)
    with (
        locked(two.lock(what.blobs[0].name), lambda s: None, lambda: None),
        pytest.raises(HubError, match="is being downloaded"),
    ):
        remove(what)
    assert two.folder.is_dir()
