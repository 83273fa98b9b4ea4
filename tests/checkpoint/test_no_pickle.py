"""herd never unpickles, evaluates or imports by name what a file says: the source is searched for every way to do so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import herd

PACKAGE = Path(herd.__file__).parent
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "yaml",
    "runpy",
}
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}
ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "hub"),
    ("torch", "jit"),
    ("np", "load"),
    ("numpy", "load"),
    ("os", "system"),
    ("os", "popen"),
    ("os", "exec"),
}
IMPORTERS = {
    "herd/__init__.py",
    "herd/bench/first.py",
    "herd/bench/players/llama_cpp.py",
    "herd/bench/players/transformers.py",
    "herd/bench/worker.py",
    "herd/cli/main.py",
}
"""The only files that import by name, each from a table of its own."""


TRAINING = "herd/train/"
"""Training reads back its own state with torch's weights-only unpickler: the literal `weights_only=True` is allowed there."""


def reads_own_state(node: ast.AST, name: str) -> bool:
    """Whether this is torch.load(..., weights_only=True) in the training floor."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=given):
            safe = any(
                k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in given
            )
            return safe and name.startswith(TRAINING)
    return False


def findings(source: str, name: str) -> Iterator[str]:
    tree = ast.parse(source)
    allowed = {
        id(part) for node in ast.walk(tree) if reads_own_state(node, name) for part in ast.iter_child_nodes(node)
    }
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        match node:
            case ast.Import(names=names) if any(alias.name.split(".")[0] in MODULES for alias in names):
                yield f"{name}:{node.lineno} imports {', '.join(alias.name for alias in names)}"
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                yield f"{name}:{node.lineno} imports from {module}"
            case ast.ImportFrom(module="torch", names=names) if any(
                alias.name in ("load", "hub", "jit") for alias in names
            ):
                yield f"{name}:{node.lineno} imports torch.load"
            case ast.Call(func=ast.Name(id=called)) if called in BUILTINS:
                yield f"{name}:{node.lineno} calls {called}"
            case ast.Call(func=ast.Name(id="import_module")) if name not in IMPORTERS:
                yield f"{name}:{node.lineno} imports by name"
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if (owner, attribute) in ATTRIBUTES:
                yield f"{name}:{node.lineno} uses {owner}.{attribute}"
            case ast.keyword(arg="weights_only" | "allow_pickle" | "shell" | "trust_remote_code"):
                yield f"{name}:{node.value.lineno} passes {node.arg}"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_nothing_is_executed_from_files() -> None:
    assert len(sources()) > 30
    found = [
        line
        for path in sources()
        for line in findings(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE.parent).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import _pickle as p",
        "torch.load('x')",
        "from torch import load",
        "eval('1')",
        "exec(code)",
        "__import__('os')",
        "import_module(name)",
        "np.load('x', allow_pickle=True)",
        "os.system('x')",
        "f(weights_only=False)",
        "import shelve",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert list(findings(line, "herd/checkpoint/x.py"))


def test_what_training_may_do() -> None:
    assert not list(findings("torch.load(path, weights_only=True)", "herd/train/x.py"))
    for line in ("torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)"):
        assert list(findings(line, "herd/train/x.py"))
    assert list(findings("torch.load(path, weights_only=True)", "herd/checkpoint/x.py"))
