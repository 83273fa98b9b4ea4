"""The public names: the list is true, every name loads, and importing herd loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import herd

TORCH_FREE = sorted(set(herd.__all__) - {"LLM", "Llama", "generate", "load", "merge", "quantize", "verify"})


def test_the_list_is_what_it_was_meant_to_be() -> None:
    """A name is added or removed here on purpose: others build on it."""
    assert sorted(herd.__all__) == [
        "CheckpointError",
        "ConfigError",
        "ContextFullError",
        "HerdError",
        "HubError",
        "LLM",
        "Llama",
        "Message",
        "ModelConfig",
        "PromptError",
        "Rendered",
        "Reply",
        "SamplingParams",
        "TokenizerError",
        "ToolSpec",
        "UnknownModelError",
        "__version__",
        "convert",
        "generate",
        "load",
        "load_tokenizer",
        "merge",
        "plan",
        "pull",
        "quantize",
        "render",
        "verify",
    ]
    assert dir(herd) == sorted(herd.__all__)


@pytest.mark.parametrize("name", sorted(set(herd.__all__) - {"__version__", "convert"}))
def test_every_public_name_is_the_one_of_its_home(name: str) -> None:
    home = import_module(herd._HOME[name])
    assert getattr(herd, name) is getattr(home, name)
    assert name in home.__all__
    assert getattr(herd, name).__doc__


CALLED = """\
import importlib, os, torch
for first in ("herd.convert.driver", "herd"):
    if os.fork() == 0:
        import herd
        importlib.import_module(first)
        try:
            herd.convert("no such model", "x", to="hf")
        except herd.UnknownModelError:
            print("called after", first)
        break
    os.wait()
"""


def test_convert_is_a_floor_that_can_be_called_whatever_was_imported_first() -> None:
    done = subprocess.run([sys.executable, "-c", CALLED], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["called after herd.convert.driver", "called after herd"], done.stderr
    assert done.returncode == 0


def test_homes_and_list_agree() -> None:
    assert {*herd._HOME, "__version__"} == set(herd.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'herd' has no attribute 'lama'"):
        _ = herd.lama  # type: ignore[attr-defined]


@pytest.mark.parametrize("names", [[], TORCH_FREE], ids=["import herd", "data types"])
def test_what_needs_no_torch_imports_none(names: list[str]) -> None:
    code = "import sys, herd\n" + "".join(f"herd.{name}\n" for name in names) + "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
