"""huggingface_hub and herd use one cache: each reads what the other downloaded, and the trees are the same byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from herd.hub.found import found
from herd.hub.pull import pull
from herd.hub.settings import hub_cache, settings
from tests.hub.mirror import COMMIT, Mirror
from tests.hub.repos import REPOS, TAKEN, TINY

pytest.importorskip("huggingface_hub")

# In a process of its own: huggingface_hub reads the environment once, when it is imported.
DOWNLOAD = """\
import sys, warnings
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:]))
"""
READ = """\
import sys
from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache
print(snapshot_download(sys.argv[1], local_files_only=True))
print(try_to_load_from_cache(sys.argv[1], "config.json"))
info = scan_cache_dir()
(repo,) = info.repos
print(repo.repo_id, repo.size_on_disk, repo.nb_files, [sorted(r.refs) for r in repo.revisions], len(info.warnings))
"""


def theirs(code: str, *args: str, **environment: str) -> list[str]:
    env = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=env | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def tree(cache: Path) -> dict[str, str | bytes]:
    """Path -> what a link says, or what a file holds; without locks and their index of the repository."""
    there = {}
    for path in cache.rglob("*"):
        name = path.relative_to(cache).as_posix()
        if not name.startswith(".locks") and "/trees" not in name and name != "CACHEDIR.TAG" and not path.is_dir():
            there[name] = os.readlink(path) if path.is_symlink() else path.read_bytes()
    return there


def test_the_same_tree(hub: str, home: Path, mirror: Mirror) -> None:
    ours = pull(TINY, cache=home / "ours")
    (said,) = theirs(DOWNLOAD, TINY, *TAKEN, HF_HUB_CACHE=str(home / "theirs"))
    assert Path(said).name == ours.name == COMMIT
    assert tree(home / "ours") == tree(home / "theirs")
    assert {p.name for p in (home / "ours/.locks").rglob("*.lock")} == {
        p.name for p in (home / "theirs/.locks").rglob("*.lock")
    }


def test_they_read_what_we_pulled(hub: str) -> None:
    folder = pull(TINY)
    snapshot, config, scanned = theirs(READ, TINY)
    size = sum(len(REPOS[TINY][name]) for name in TAKEN)
    assert Path(snapshot) == folder
    assert Path(config) == folder / "config.json"
    assert scanned == f"{TINY} {size} {len(TAKEN)} [['main']] 0"


def test_we_read_what_they_downloaded(hub: str, mirror: Mirror) -> None:
    (said,) = theirs(DOWNLOAD, TINY, *TAKEN)
    before = mirror.sent(".safetensors")
    assert pull(TINY, offline=True) == Path(said)
    assert pull(TINY) == Path(said)
    assert mirror.sent(".safetensors") == before, "nothing was downloaded again"
    (model,) = found(hub_cache())
    assert (model.name, model.size) == (TINY, sum(len(REPOS[TINY][name]) for name in TAKEN))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HF_HOME": "/h"},
        {"HF_HUB_CACHE": "/c", "HF_HOME": "/h"},
        {"HUGGINGFACE_HUB_CACHE": "/old"},
        {"XDG_CACHE_HOME": "/x"},
        {"HF_HOME": "~/h"},
        {"HF_HUB_CACHE": "$HOME/c"},
        {"HF_ENDPOINT": "https://mirror.example/"},
        {"HF_HUB_OFFLINE": "yes"},
        {"HF_HUB_OFFLINE": "0"},
        {"TRANSFORMERS_OFFLINE": "1"},
    ],
    ids=str,
)
def test_the_same_settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    theirs_are = _constants(tuple(environment.items()))
    ours = settings()
    assert [str(ours.cache), ours.endpoint, str(ours.offline)] == theirs_are


def _constants(environment: tuple[tuple[str, str], ...]) -> list[str]:
    """What the constants module of huggingface_hub makes of this environment: run on its own, which takes milliseconds."""
    import runpy
    from importlib.util import find_spec

    spec = find_spec("huggingface_hub")
    assert spec is not None
    assert spec.origin is not None
    names = runpy.run_path(str(Path(spec.origin).parent / "constants.py"))
    return [names["HF_HUB_CACHE"], names["ENDPOINT"], str(names["HF_HUB_OFFLINE"])]
