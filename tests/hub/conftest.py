"""Every test of downloads gets a home, a cache and an environment of its own, and retries without waiting."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from herd.hub import web
from tests.hub.mirror import Mirror, serving
from tests.hub.repos import REPOS

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
STORES = ("OLLAMA_MODELS", "LMSTUDIO_HOME", "LLAMA_MODELS_CONFIG_DIR", "XDG_CACHE_HOME")
CLEARED = (*PROXIES, *STORES, "HUGGINGFACE_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home; nothing of this machine's settings or stores is seen."""
    for name in (*CLEARED, *(name for name in os.environ if name.startswith("HF_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(web.Patience.__init__, "__defaults__", (web.TRIES, 0.001))
    return tmp_path


@pytest.fixture
def cache(home: Path) -> Path:
    return home / "cache"


@pytest.fixture
def mirror() -> Mirror:
    """A hub with the repositories of tests/hub/repos.py, without faults."""
    return Mirror({repo: dict(files) for repo, files in REPOS.items()})


@pytest.fixture
def hub(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address, which HF_ENDPOINT names, too."""
    with serving(mirror) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield address
