"""The models on this machine, whoever downloaded them: the shared cache, Ollama, LM Studio, Meta's tool. Nothing is opened
but small JSON files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from herd.errors import CheckpointError
from herd.files import read_json, safe_join
from herd.hub import created, ollama
from herd.hub.cache import RepoCache, repositories
from herd.hub.cached import has_weights, model_path
from herd.hub.choose import quants
from herd.hub.folders import lm_studio, meta_models
from herd.hub.listing import RemoteFile

__all__ = ["Found", "found", "of_snapshot"]


@dataclass(frozen=True, slots=True)
class Found:
    """A model here. `name` is what the other commands take; `where` is created, hub, ollama, lmstudio or meta.

    `format` is safetensors, pytorch, meta or gguf (several with a plus); `quant` the number type, where small files say it;
    `size` bytes on the disk; `modified` seconds since 1970; `revision` the commit; `problem` what is wrong with it.
    """

    name: str
    path: Path
    where: str
    format: str | None
    quant: str | None
    size: int
    modified: float
    revision: str | None = None
    problem: str | None = None


def found(cache: Path) -> Iterator[Found]:
    """Everything, place by place and by name."""
    yield from _created()
    for repo in repositories(cache):
        yield from _in_cache(repo)
    yield from _in_ollama()
    yield from _in_lm_studio()
    for folder in meta_models():
        yield _of_folder(folder.name, folder, "meta")


def of_snapshot(repo: RepoCache, commit: str) -> Found:
    """One downloaded commit."""
    files, problem = [], None
    for name, path in repo.files(commit):
        if path.is_file():
            files.append((name, path))
        else:
            problem = f"{name} leads to a content that is not there"
    snapshot = repo.snapshot(commit)
    names = [name for name, _ in files]
    sizes = {os.path.realpath(path): path.stat().st_size for _, path in files}
    is_main = repo.commit_of("main") in (commit, None)
    return Found(
        repo.repo if is_main else f"{repo.repo}@{commit[:12]}",
        model_path(snapshot, names) if names else snapshot,
        "hub",
        _format(names),
        _numbers(snapshot, names),
        sum(sizes.values()),
        max((path.lstat().st_mtime for _, path in files), default=0.0),
        commit,
        problem,
    )


def _in_cache(repo: RepoCache) -> Iterator[Found]:
    commits = repo.commits()
    for commit in commits:
        with contextlib.suppress(CheckpointError):  # a folder that is no snapshot
            yield of_snapshot(repo, commit)
    parts = list(repo.blobs.glob("*.incomplete")) if repo.blobs.is_dir() else []
    if not commits and parts:
        size = sum(part.stat().st_size for part in parts)
        newest = max(part.stat().st_mtime for part in parts)
        yield Found(
            repo.repo, repo.folder, "hub", None, None, size, newest, None, "unfinished: herd pull goes on with it"
        )


def _created() -> Iterator[Found]:
    for model in created.all_created():
        if isinstance(model, CheckpointError):
            path = Path(model.path or "")
            yield Found("/".join(path.parts[-2:]), path, "created", None, None, 0, 0.0, None, str(model))
            continue
        own = created.own_weights(model)
        size = own.stat().st_size if own is not None and own.is_file() else 0
        manifest = created.manifest_of(model.name)
        problem = None
        if Path(model.base).is_absolute() and not Path(model.base).exists():
            problem = f"it is made from {model.base}, which is gone"
        yield Found(
            model.name, manifest, "created", f"from {Path(model.base).name}", None, size, model.created, None, problem
        )


def _in_ollama() -> Iterator[Found]:
    for model in ollama.models():
        if isinstance(model, CheckpointError):
            path = Path(model.path or "")
            yield Found("/".join(path.parts[-2:]), path, "ollama", None, None, 0, 0.0, None, str(model))
        else:
            quant = ollama.file_type(model)
            modified = model.manifest.stat().st_mtime
            yield Found(model.name, model.path, "ollama", "gguf", quant, model.size, modified)


def _in_lm_studio() -> Iterator[Found]:
    for root in lm_studio():
        if not root.is_dir():
            continue
        for folder in sorted(root.glob("*/*")):
            if folder.is_dir() and has_weights(folder):
                yield _of_folder(folder.relative_to(root).as_posix(), folder, "lmstudio")


def _of_folder(name: str, folder: Path, where: str) -> Found:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    names = [path.name for path in files]
    size = sum(path.stat().st_size for path in files)
    modified = max((path.stat().st_mtime for path in files), default=0.0)
    models = [name for name in names if not name.lower().startswith("mmproj")]
    path = model_path(folder, models) if sum(name.endswith(".gguf") for name in models) == 1 else folder
    return Found(name, path, where, _format(models), _numbers(folder, models), size, modified)


def _format(names: Sequence[str]) -> str | None:
    kinds = {
        "safetensors": any(name.endswith(".safetensors") for name in names),
        "pytorch": any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names),
        "meta": any(name.endswith(".pth") for name in names),
        "gguf": any(name.lower().endswith(".gguf") for name in names),
    }
    return "+".join(kind for kind, there in kinds.items() if there) or None


def _numbers(folder: Path, names: Sequence[str]) -> str | None:
    """GGUF types from file names; the dtype, or the quantization, that config.json says."""
    if types := quants([RemoteFile(name, None, None) for name in names]):
        return ", ".join(types)
    if "config.json" not in names:
        return None
    try:
        config = read_json(safe_join(folder, "config.json"), 1 << 20)
    except CheckpointError:
        return None
    packed = config.get("quantization_config")
    said = packed.get("quant_method") if isinstance(packed, dict) else config.get("dtype", config.get("torch_dtype"))
    return said if isinstance(said, str) and said.isascii() and said.isprintable() and len(said) < 40 else None
