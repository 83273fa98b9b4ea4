"""What a download will do, before anything is written: which files, which of them are missing, how many bytes that is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from herd.errors import CheckpointError, HubError
from herd.files import safe_join
from herd.hub.asked import Asked, asked
from herd.hub.cache import RepoCache
from herd.hub.choose import Choice, choose
from herd.hub.endpoint import source_at
from herd.hub.fetch import Watch
from herd.hub.listing import Listing, RemoteFile, Source
from herd.hub.settings import Settings
from herd.hub.web import Interrupted, Patience

__all__ = ["Plan", "digest", "plan", "planned", "wish"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a download will do. `missing` are those of `choice.files` that are not in the cache; `bytes_left` what they lack."""

    listing: Listing
    choice: Choice
    missing: tuple[RemoteFile, ...]
    bytes_left: int
    where: str
    cache: RepoCache


def plan(
    name: str, where: Settings, revision: str | None, include: Sequence[str], quant: str | None, watch: Watch
) -> Plan:
    """What `pulled` would do. Writes nothing."""
    what = wish(name, revision, include, quant, watch)
    if where.offline and not where.endpoint.startswith("file:"):
        raise HubError(
            "what a hub holds cannot be known offline: leave --offline or HF_HUB_OFFLINE away", cause="offline"
        )
    with source_at(where, watch) as source:
        return planned(source, what, include, where, watch)


def wish(name: str, revision: str | None, include: Sequence[str], quant: str | None, watch: Watch) -> Asked:
    """What `name` and the options ask for together; its revision is never None. Raises HubError where they disagree."""
    what = asked(name)
    for ours, given, word in ((what.revision, revision, "revision"), (what.quant, quant, "quantization")):
        if ours is not None and given is not None and ours != given:
            raise HubError(f"the name asks for the {word} {ours}, the options for {given}: give one", cause="options")
    if include and (quant or what.quant):
        raise HubError("a quantization and --include are two ways to choose files: give one", cause="options")
    if what.note:
        watch.note(what.note)
    return replace(what, revision=what.revision or revision or "main", quant=what.quant or quant)


def planned(source: Source, what: Asked, include: Sequence[str], where: Settings, watch: Watch) -> Plan:
    """The plan for `what` from `source`. Raises HubError."""
    cache = RepoCache(where.cache, what.repo)
    assert what.revision is not None
    listing = _patiently(lambda: source.listing(what.repo, what.revision or "main"), what.repo, cache)
    choice = choose(listing.files, include, what.quant)
    try:
        for file in choice.files:
            safe_join(cache.snapshot(listing.commit), file.path)  # a name that leads elsewhere is not even asked for
        described = tuple(_patiently(lambda f=f: source.described(listing, f), f.path, cache) for f in choice.files)
        missing = tuple(f for f in described if not cache.holds(listing.commit, f.path, f.size, digest(f)))
    except CheckpointError as error:
        raise HubError(f"{source.where}: {error}", cause="server") from error
    choice = replace(choice, files=described)
    contents = {digest(f): f for f in missing if not cache.blob(digest(f)).is_file()}
    left = sum((f.size or 0) - _begun(cache, f) for f in contents.values())
    return Plan(listing, choice, missing, left, source.where, cache)


def _patiently(request: Callable[[], T], what: str, cache: RepoCache) -> T:
    """The result of a small request, tried again while that may help."""
    patience = Patience(threading.Event())
    while True:
        try:
            return request()
        except Interrupted as failure:
            try:
                patience.wait(failure, what)
            except HubError as error:
                here = cache.commits()
                kept = f"; an earlier download is here: --offline uses it ({cache.snapshot(here[0])})" if here else ""
                raise HubError(f"{what}: {failure}{kept}", cause=error.cause) from failure


def _begun(cache: RepoCache, file: RemoteFile) -> int:
    part = cache.blob(digest(file)).with_name(digest(file) + ".incomplete")
    try:
        length = part.stat().st_size
    except OSError:
        return 0
    return length if file.size is not None and length <= file.size else 0


def digest(file: RemoteFile) -> str:
    """The name of its content in the cache."""
    assert file.digest is not None  # it is described
    return file.digest.value
