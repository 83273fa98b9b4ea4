"""herd never unpickles, evaluates or imports by name what a file says: the source is searched for every way to do so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import herd
from herd.train import overrides

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
LOOKED_AT = (ast.Import, ast.ImportFrom, ast.Call, ast.Attribute, ast.keyword)
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
    ("yaml", "Loader"),
    ("yaml", "FullLoader"),
    ("yaml", "UnsafeLoader"),
    ("yaml", "full_load"),
    ("yaml", "unsafe_load"),
}
IMPORTERS = {
    "herd/__init__.py",
    "herd/bench/first.py",
    "herd/bench/players/llama_cpp.py",
    "herd/bench/players/transformers.py",
    "herd/bench/worker.py",
    "herd/cli/lazy.py",
    "herd/cli/main.py",
    "herd/cli/plan.py",
    "herd/train/run.py",
}
"""The only files that import by name, each from a table of its own."""

READERS = {
    ("herd/data/tokenworker.py", "pickle"),  # pipes between a program and its own worker processes, no files
    (
        "herd/parallel/checkpoint.py",
        "pickle",
    ),  # an Unpickler that knows ten classes (tests/parallel/test_checkpoint.py)
    ("herd/train/overrides.py", "yaml"),
    ("herd/train/typed.py", "yaml"),
}
"""Modules that may be imported there; what runs code in them is still refused."""

PIPES = {"herd/data/tokenworker.py"}


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
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, LOOKED_AT)]
    allowed = {id(part) for node in nodes if reads_own_state(node, name) for part in ast.iter_child_nodes(node)}
    for node in nodes:
        if id(node) in allowed:
            continue
        match node:
            case ast.Import(names=names) if any(
                alias.name.split(".")[0] in MODULES and (name, alias.name) not in READERS for alias in names
            ):
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
            case ast.Attribute(value=ast.Name(id="pickle"), attr="load" | "loads") if name not in PIPES:
                yield f"{name}:{node.lineno} unpickles"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr="load"), keywords=given) if not any(
                k.arg == "Loader" and isinstance(k.value, ast.Name) and k.value.id == "_Loader" for k in given
            ):
                yield f"{name}:{node.lineno} reads YAML with any loader"
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


def test_what_known_readers_may_do() -> None:
    """A configuration is read by a safe loader, and no file is unpickled by pickle's own unpickler."""
    assert issubclass(overrides._Loader, yaml.SafeLoader)
    assert not list(
        findings("import yaml\nyaml.safe_load(text)\nyaml.load(text, Loader=_Loader)", "herd/train/typed.py")
    )
    for line in ("yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "yaml.unsafe_load(text)"):
        assert list(findings(line, "herd/train/typed.py"))
    assert not list(findings("import pickle\npickle.Unpickler(file)", "herd/parallel/checkpoint.py"))
    assert list(findings("pickle.load(file)", "herd/parallel/checkpoint.py"))
    assert list(findings("import pickle", "herd/train/typed.py"))
