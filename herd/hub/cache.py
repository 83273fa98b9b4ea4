"""The download cache that herd shares with the Hugging Face tools.

models--ORG--NAME/
    blobs/<digest>             contents: sha256 of large files, git's sha1 of small ones
    blobs/<digest>.incomplete  what has arrived so far
    refs/<revision>            the commit that a branch or tag pointed to
    snapshots/<commit>/<path>  links into blobs, relative; copies where the system has no links
.locks/models--ORG--NAME/<digest>.lock
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from herd.errors import CheckpointError
from herd.files import safe_join, short

__all__ = ["COMMIT", "RepoCache", "repositories"]

COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOB = re.compile(r"[0-9A-Za-z]{1,128}", re.ASCII)
_MODELS = "models--"


class RepoCache:
    """The folder of the repository `repo` (ORG/NAME) in `cache`. Nothing is made before something is written."""

    def __init__(self, cache: Path, repo: str) -> None:
        self.cache, self.repo = cache, repo
        self.folder = cache / (_MODELS + repo.replace("/", "--"))
        self.blobs, self.snapshots, self.refs = (self.folder / name for name in ("blobs", "snapshots", "refs"))

    def commit_of(self, revision: str | None) -> str | None:
        """The commit that `revision` (also the first seven letters or more) meant at its last download; None: it had none."""
        wanted = revision or "main"
        if self.snapshots.is_dir() and wanted != "main":
            names = [entry.name for entry in self.snapshots.iterdir() if entry.is_dir() and not entry.is_symlink()]
            begin = [name for name in names if name == wanted or (len(wanted) >= 7 and name.startswith(wanted))]
            if wanted in names or len(begin) == 1:
                return wanted if wanted in names else begin[0]
        try:
            ref = safe_join(self.refs, wanted)
            commit = ref.read_text(errors="replace").strip()
        except (OSError, CheckpointError):
            return None
        return commit if re.fullmatch(r"[0-9A-Za-z]{1,64}", commit, re.ASCII) else None

    def snapshot(self, commit: str) -> Path:
        """Where the files of `commit` (plain letters and digits) are or will be."""
        if not re.fullmatch(r"[0-9A-Za-z]{1,64}", commit, re.ASCII):
            raise CheckpointError(f"{short(commit)} is no commit", path=self.folder)
        return self.snapshots / commit

    def commits(self) -> list[str]:
        """The downloaded commits: that of `main` first, then by name."""
        if not self.snapshots.is_dir():
            return []
        main = self.commit_of("main")
        names = (entry.name for entry in self.snapshots.iterdir() if entry.is_dir() and not entry.is_symlink())
        return sorted(names, key=lambda name: (name != main, name))

    def branches(self) -> dict[str, str]:
        """Revision -> commit, of everything under refs."""
        if not self.refs.is_dir():
            return {}
        files = [file for file in sorted(self.refs.rglob("*")) if file.is_file()]
        found = {file.relative_to(self.refs).as_posix(): file.read_text(errors="replace").strip() for file in files}
        return {name: commit for name, commit in found.items() if not name.endswith(".tmp")}

    def blob(self, digest: str) -> Path:
        """Where the content with this digest is kept. Raises CheckpointError for what no digest looks like."""
        if not _BLOB.fullmatch(digest):
            raise CheckpointError(f"{short(digest)} is no digest", path=self.folder)
        return self.blobs / digest

    def lock(self, digest: str) -> Path:
        """The file whose lock the writer of that content holds."""
        return self.cache / ".locks" / self.folder.name / f"{self.blob(digest).name}.lock"

    def holds(self, commit: str, name: str, size: int | None, digest: str) -> bool:
        """Whether the snapshot already has the file: a link to that content, or a copy of the right size."""
        place = safe_join(self.snapshot(commit), name)
        try:
            target = os.path.basename(os.readlink(place)) if place.is_symlink() else digest
            there = place.stat().st_size
        except OSError:
            return False
        return target == digest and size in (None, there)

    def write_ref(self, revision: str, commit: str) -> None:
        """Remember what `revision` means; a reader sees the old or the new commit, never half of one."""
        if revision == commit or self.branches().get(revision) == commit:
            return
        ref = safe_join(self.refs, revision)
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh = ref.with_name(f"{ref.name}.{secrets.token_hex(4)}.tmp")
        fresh.write_text(commit)
        os.replace(fresh, ref)

    def link(self, commit: str, name: str, digest: str) -> Path:
        """Give the content `digest` the name `name` in the snapshot of `commit`."""
        place, blob = safe_join(self.snapshot(commit), name), self.blob(digest)
        if place.is_symlink() and not place.exists():
            place.unlink()  # it led to a content that has gone
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{secrets.token_hex(4)}.link")
        try:
            if _says_no_links():
                raise OSError("links are switched off")
            os.symlink(os.path.relpath(blob, place.parent), fresh)
        except (OSError, NotImplementedError):
            if self._is_used(blob):
                shutil.copyfile(blob, fresh)
            else:  # as huggingface_hub does: gigabytes are not kept twice
                os.replace(blob, fresh)
        try:
            os.replace(fresh, place)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        return place

    def files(self, commit: str) -> Iterator[tuple[str, Path]]:
        """(name, path) of everything in a snapshot, links to nothing included."""
        root = self.snapshot(commit)
        for folder, _, names in os.walk(root):
            for name in sorted(names):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path

    def _is_used(self, blob: Path) -> bool:
        """Whether a snapshot links to `blob`."""
        for commit in self.commits():
            for _, path in self.files(commit):
                if path.is_symlink() and os.path.basename(os.readlink(path)) == blob.name:
                    return True
        return False


def repositories(cache: Path) -> Iterator[RepoCache]:
    """Every model repository in `cache`, by name. Folders whose names are no repository's are left alone."""
    if not cache.is_dir():
        return
    for entry in sorted(cache.iterdir()):
        repo = entry.name.removeprefix(_MODELS).replace("--", "/")
        if entry.name.startswith(_MODELS) and repo and entry.is_dir():
            found = RepoCache(cache, repo)
            if found.folder == entry:
                yield found


def _says_no_links() -> bool:
    return os.environ.get("HF_HUB_DISABLE_SYMLINKS", "").upper() in ("1", "ON", "YES", "TRUE")
