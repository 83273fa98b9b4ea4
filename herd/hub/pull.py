"""`herd.pull`: a model from a hub, a mirror or the cache itself, whole and checked."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from herd.errors import HubError
from herd.files import safe_join
from herd.hub.asked import Asked
from herd.hub.cache import RepoCache
from herd.hub.cached import complete, model_path
from herd.hub.choose import choose
from herd.hub.endpoint import source_at
from herd.hub.fetch import Quiet, Watch, fetch
from herd.hub.listing import RemoteFile, Source
from herd.hub.plan import Plan, digest, planned, wish
from herd.hub.settings import Settings, settings
from herd.hub.threads import in_threads
from herd.hub.web import Patience

__all__ = ["JOBS", "Pulled", "pull", "pulled"]

JOBS = 4
"""Files at once. More connections rarely bring more bytes, and less of a big file is there when the line breaks."""
SPARE = 64 << 20
"""Bytes that a disk keeps free: links, locks and what others write meanwhile."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What is there now: `path` is what `herd.load` takes, `snapshot` the folder of all files, `downloaded` bytes that came."""

    path: Path
    snapshot: Path
    repo: str
    commit: str
    files: tuple[str, ...]
    skipped: tuple[str, ...]
    downloaded: int
    quant: str | None


def pull(
    name: str,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    quant: str | None = None,
    endpoint: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    token_file: str | os.PathLike[str] | None = None,
    jobs: int = JOBS,
    offline: bool | None = None,
    watch: Watch | None = None,
) -> Path:
    """Download a model and return where it is: a folder, or the GGUF file.

    `name` is any name of the catalog or ORG/NAME[@REVISION][:QUANT]. `include` takes the files that match its patterns instead of
    one copy of the model; `quant` chooses among GGUF files (default Q4_K_M). Everything else comes from the environment, as for
    the Hugging Face tools: HF_ENDPOINT, HF_HUB_CACHE, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE. `endpoint` may be a mirror:
    https://..., http://... or file:///folder. What is in the cache is not downloaded again; what was begun goes on from there.

    Raises HubError, UnknownModelError.
    """
    where = settings(endpoint=endpoint, cache=cache, token_file=token_file, offline=offline)
    return pulled(name, where, revision, include, quant, jobs, watch or Quiet()).path


def pulled(
    name: str,
    where: Settings,
    revision: str | None,
    include: Sequence[str],
    quant: str | None,
    jobs: int,
    watch: Watch,
) -> Pulled:
    """As `pull`, with everything that is known afterwards."""
    what = wish(name, revision, include, quant, watch)
    if where.offline and not where.endpoint.startswith("file:"):
        return _from_cache(what, where, include)
    with source_at(where, watch) as source:
        doing = planned(source, what, include, where, watch)
        return _carry_out(source, doing, jobs, watch)


def _carry_out(source: Source, plan: Plan, jobs: int, watch: Watch) -> Pulled:
    cache, listing = plan.cache, plan.listing
    _check_space(plan)
    if plan.missing:
        watch.begin([(f.path, f.size or 0) for f in plan.missing])
        try:
            largest = sorted(plan.missing, key=lambda f: -(f.size or 0))
            in_threads(largest, jobs, lambda file, stop: _one(source, plan, file, stop, watch))
        except OSError as error:
            raise HubError(f"{error.filename or cache.folder}: {error.strerror or error}", cause="disk") from error
    with contextlib.suppress(PermissionError) if not plan.missing else contextlib.nullcontext():
        cache.write_ref(listing.revision, listing.commit)
    snapshot = cache.snapshot(listing.commit)
    names = tuple(f.path for f in plan.choice.files)
    return Pulled(
        model_path(snapshot, names),
        snapshot,
        listing.repo,
        listing.commit,
        names,
        plan.choice.skipped,
        plan.bytes_left,
        plan.choice.quant,
    )


def _one(source: Source, plan: Plan, file: RemoteFile, stop: threading.Event, watch: Watch) -> None:
    for rest in reversed(range(JOBS)):
        fetch(source, plan.listing, file, plan.cache, Patience(stop), watch)
        with _linking:
            if plan.cache.holds(plan.listing.commit, file.path, file.size, digest(file)):
                return
            try:
                plan.cache.link(plan.listing.commit, file.path, digest(file))
                return
            except FileNotFoundError:  # without links the content has moved to another name since it was fetched
                if not rest or plan.cache.blob(digest(file)).exists():
                    raise


_linking = threading.Lock()
"""Without symbolic links a content moves to its first name, and only then can it be copied to a second."""


def _check_space(plan: Plan) -> None:
    place = plan.cache.cache
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if plan.missing and free < plan.bytes_left + SPARE:
        raise HubError(
            f"{plan.listing.repo} needs {plan.bytes_left / 1e9:.1f} GB more and {plan.cache.cache} has "
            f"{free / 1e9:.1f} GB free: make room (herd list, herd rm), or choose another disk with --cache or HF_HUB_CACHE",
            cause="space",
        )


def _from_cache(what: Asked, where: Settings, include: Sequence[str]) -> Pulled:
    """What an earlier download left, if it is whole. Touches no network."""
    cache = RepoCache(where.cache, what.repo)
    revision = what.revision or "main"
    commit = cache.commit_of(revision)
    if commit is None or not cache.snapshot(commit).is_dir():
        there = f" (it has {', '.join(cache.commits()[:3])})" if cache.commits() else ""
        raise HubError(
            f"{what.repo} at {revision} is not in {where.cache}{there}, and herd is offline: run this once without --offline and "
            "HF_HUB_OFFLINE",
            cause="offline",
        )
    files = []
    for name, path in cache.files(commit):
        if not path.is_file():
            raise HubError(f"{path} leads to a content that is not there: pull it again online", cause="offline")
        files.append(RemoteFile(name, safe_join(cache.snapshot(commit), name).stat().st_size, None))
    choice = choose(files, include, what.quant)
    if not include:
        complete(cache.snapshot(commit))
    names = tuple(f.path for f in choice.files)
    snapshot = cache.snapshot(commit)
    return Pulled(model_path(snapshot, names), snapshot, what.repo, commit, names, (), 0, choice.quant)
