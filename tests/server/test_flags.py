"""Flags of `herd serve` for embeddings, moderations, files and adapters."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from herd.cli.serve import command, settings_from
from herd.errors import HerdError
from herd.server.settings import ServerSettings


def settings(*args: str) -> ServerSettings:
    context = command.make_context("serve", list(args))
    return settings_from(context.params.pop("models"), context.params)


def test_flags_become_settings(tmp_path: Path) -> None:
    plain = settings("nano")
    assert (plain.guard, plain.pooling, plain.state_dir, plain.adapter_dir) == (None, "mean", None, None)
    given = settings("nano", "--pooling", "last", "--state-dir", str(tmp_path / "new"), "--adapter-dir", str(tmp_path))
    assert (given.pooling, given.state_dir, given.adapter_dir) == ("last", str(tmp_path / "new"), str(tmp_path))


def test_a_guard_is_a_model_with_its_own_prompts() -> None:
    given = settings("nano", "--guard", "judge=nano", "--chat-template", "llama3.1", "--served-model-name", "x")
    assert given.guard == "judge"
    assert [(one.name, one.options.format) for one in given.models] == [("x", "llama3.1"), ("judge", None)]
    assert len(settings("nano", "--guard", "nano").models) == 1, "a model that is served may be the guard, too"
    alone = settings("--guard", "nano")
    assert alone.any_model
    assert alone.guard == "nano"


def test_what_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(HerdError):
        settings("nano", "--guard", str(tmp_path / "missing"))
    with pytest.raises(click.BadParameter):
        settings("nano", "--adapter-dir", str(tmp_path / "missing"))
    with pytest.raises(click.BadParameter):
        settings("nano", "--pooling", "cls")
