"""Tiny models in folders, and a standard input that holds what a test says."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from tests.cli.tiny import write_folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a chat model of 256 positions."""
    return str(write_folder(tmp_path_factory.mktemp("models") / "tiny-chat"))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a base model of 256 positions."""
    return str(write_folder(tmp_path_factory.mktemp("models") / "tiny-base", chat=False))


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], None]:
    """`piped(data)`: standard input is a pipe with these contents."""

    def put(data: str | bytes) -> None:
        raw = data.encode() if isinstance(data, str) else data
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))

    return put


@pytest.fixture
def no_input_on_a_cpu(piped: Callable[[str | bytes], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is piped in unless a test says so, and every machine computes on its CPU, so that replies can be compared."""
    piped("")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
