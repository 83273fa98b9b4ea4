"""Deleting from the shared cache: only what nothing else uses, and nothing outside of the repository's folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from herd.errors import CheckpointError, HubError
from herd.hub.cache import RepoCache
from herd.hub.choose import says_quant
from herd.hub.lock import locked

__all__ = ["Removal", "removal", "remove"]


@dataclass(frozen=True, slots=True)
class Removal:
    """What will go: `links` in snapshots, `blobs` that nothing else uses, `refs`; `freed` bytes. `whole`: the repository."""

    repo: RepoCache
    commits: tuple[str, ...]
    links: tuple[Path, ...]
    blobs: tuple[Path, ...]
    refs: tuple[Path, ...]
    freed: int
    whole: bool


def removal(repo: RepoCache, revision: str | None = None, quant: str | None = None) -> Removal:
    """What deleting `repo` means: all of it, one revision (a branch or commit), or the GGUF files of one quantization.

    Raises HubError when there is no such thing in the cache, or its folder is not where it should be.
    """
    folder = repo.folder
    if not folder.is_dir():
        raise HubError(f"{repo.repo} is not in {repo.cache}", cause="no_repo")
    for place in (folder, repo.snapshots, repo.blobs, repo.refs):
        if place.is_symlink():
            raise HubError(f"{place} is a link to somewhere else: delete what it leads to yourself", cause="disk")
    commits = repo.commits() if revision is None else [_commit(repo, revision)]
    links = [
        path
        for commit in commits
        for name, path in repo.files(commit)
        if quant is None or (name.lower().endswith(".gguf") and says_quant(name, quant))
    ]
    if quant is not None and not links:
        raise HubError(f"{repo.repo} has no {quant} GGUF file in {repo.cache}", cause="no_file")
    whole = revision is None and quant is None
    going = set(links)
    kept = {_blob_name(path) for commit in repo.commits() for _, path in repo.files(commit) if path not in going}
    blobs = [] if not repo.blobs.is_dir() else sorted(repo.blobs.iterdir())
    named = {_blob_name(path) for path in links}
    gone = [blob for blob in blobs if whole or (blob.name in named and blob.name not in kept)]
    refs = (
        [] if quant is not None else [repo.refs / name for name, commit in repo.branches().items() if commit in commits]
    )
    # A blob that is itself a link leads into a store that several repositories share: the link frees nothing.
    freed = sum(
        path.lstat().st_size for path in {*gone, *(p for p in links if not p.is_symlink())} if not path.is_symlink()
    )
    return Removal(repo, tuple(commits), tuple(links), tuple(gone), tuple(refs), freed, whole)


def remove(what: Removal) -> None:
    """Delete it. Raises HubError when a download of one of the files is going on, or the system refuses."""
    repo = what.repo
    with contextlib.ExitStack() as held:
        for blob in what.blobs:
            name = blob.name.removesuffix(".incomplete")
            with contextlib.suppress(CheckpointError):  # no digest, so nobody's download
                held.enter_context(locked(repo.lock(name), _busy(repo), lambda: None))
        try:
            if what.whole:
                shutil.rmtree(repo.folder)
                return
            for path in (*what.links, *what.refs, *what.blobs):
                path.unlink(missing_ok=True)
            for commit in what.commits:
                _clear(repo.snapshot(commit))
        except OSError as error:
            raise HubError(
                f"{error.filename or repo.folder}: cannot be deleted: {error.strerror or error}", cause="disk"
            ) from error


def _busy(repo: RepoCache):  # the pause of a lock that is not waited for
    def pause(seconds: float) -> None:
        raise HubError(f"{repo.repo} is being downloaded: stop that first", cause="disk")

    return pause


def _commit(repo: RepoCache, revision: str) -> str:
    commit = repo.commit_of(revision)
    if commit is None or commit not in repo.commits():
        there = ", ".join([*repo.branches(), *repo.commits()][:6])
        raise HubError(
            f"{repo.repo} has no {revision} in {repo.cache}; it has {there or 'nothing'}", cause="no_revision"
        )
    return commit


def _blob_name(path: Path) -> str | None:
    return os.path.basename(os.readlink(path)) if path.is_symlink() else None


def _clear(folder: Path) -> None:
    """Remove the folders in `folder` that are empty now, and it."""
    for place, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(place)
