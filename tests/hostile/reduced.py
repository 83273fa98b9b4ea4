"""Pickles that call something when they are unpickled, as picklescan's and fickling's makers write them; from a seed.

Three ways: Python's own pickler on objects with `__reduce__` (every protocol, every nesting), calls put into the pickle of a
real torch file (before it, in its middle, behind it, as fickling injects them), and torch's zip around them with the tricks
that blind scanners (another name in the local header, flags, checksums, a second pickle beside the first).
"""

from __future__ import annotations

import collections
import io
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.checkpoint.payloads import reduced as known_calls

__all__ = ["variants"]


class _Call:
    """Unpickles to the result of `function(*arguments)`; `form` is one of the shapes `__reduce__` may have."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], form: int) -> None:
        self.parts = function, arguments, form

    def __reduce_ex__(self, protocol: object) -> Any:
        function, arguments, form = self.parts
        if form == 0:
            return function, arguments
        if form == 1:
            return function, arguments, {"state": 1}
        if form == 2:
            return function, arguments, None, iter([1, 2]), None
        return function, arguments, None, None, iter([("a", 1)])


def _named(module: str, name: str) -> Any:
    """Something that Python's pickler writes as the global `module.name`, without importing it."""

    def function(*args: object) -> None: ...

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


class _Pickler(pickle._Pickler):  # the one in Python lets a name through that it cannot import
    def save_global(self, obj: Any, name: str | None = None) -> None:
        module, name = obj.__module__, name or obj.__qualname__
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch, type(_named): save_global}


_CALLS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("posix", "system", ("touch {canary}",)), ("os", "system", ("touch {canary}",)), ("nt", "system", ("touch {canary}",)),
    ("os", "popen", ("touch {canary}",)), ("os", "mkdir", ("{canary}",)), ("os", "link", ("/etc/hostname", "{canary}")),
    ("subprocess", "Popen", ("touch {canary}", -1, None, None, None, None, None, True, True)),
    ("subprocess", "call", (["touch", "{canary}"],)), ("subprocess", "getoutput", ("touch {canary}",)),
    ("builtins", "eval", ("open('{canary}', 'w')",)), ("__builtin__", "eval", ("open('{canary}', 'w')",)),
    ("builtins", "exec", ("open('{canary}', 'w')",)), ("builtins", "open", ("{canary}", "w")),
    ("_io", "FileIO", ("{canary}", "w")),
    ("builtins", "breakpoint", ()), ("builtins", "input", ("?",)), ("builtins", "setattr", ("x", "y", 1)),
    ("sys", "exit", (0,)),
    ("pathlib", "Path.touch", ("{canary}",)), ("tempfile", "mkstemp", ("canary",)),
    ("shutil", "copy", ("/etc/hostname", "{canary}")),
    ("bdb", "Bdb.run", ("open('{canary}', 'w')",)), ("doctest", "debug_script", ("open('{canary}', 'w')",)),
    ("cProfile", "runctx", ("open('{canary}', 'w')", {}, {})), ("profile", "Profile.run", ("open('{canary}', 'w')",)),
    ("trace", "Trace.run", ("open('{canary}', 'w')",)), ("timeit", "main", (["open('{canary}', 'w')"],)),
    ("ensurepip", "_run_pip", (["install", "x"],)), ("pip._internal", "main", (["install", "x"],)),
    ("uuid", "_get_command_stdout", ("touch", "{canary}")), ("logging.config", "listen", (9,)),
    ("venv", "create", ("{canary}",)),
    ("lib2to3.pgen2.grammar", "Grammar.loadPickle", ("{canary}",)), ("pkgutil", "resolve_name", ("os:system",)),
    ("operator", "methodcaller", ("system", "touch {canary}")), ("functools", "reduce", ("x", ["touch {canary}"])),
    ("requests.api", "get", ("http://127.0.0.1:9/",)), ("httplib", "HTTPSConnection", ("127.0.0.1",)),
    ("http.client", "HTTPSConnection", ("127.0.0.1",)), ("aiohttp.client", "ClientSession", ()),
    ("ssl", "get_server_certificate", ()),
    ("numpy", "load", ("{canary}",)), ("numpy.f2py.crackfortran", "getlincoef", ("open('{canary}', 'w')", [])),
    ("torch.utils.bottleneck.__main__", "run_cprofile", ("open('{canary}', 'w')", {})),
    ("torch.utils._config_module", "load_config", (b"",)),
    ("torch.jit.unsupported_tensor_ops", "execWrapper", ("x", {}, {})),
    ("torch.storage", "_load_from_bytes", (b"\x80\x02cos\nsystem\n.",)), ("torch", "load", ("{canary}",)),
    ("torch._C", "_jit_pass_x", ()), ("torch.nn.modules.module", "Module", ()),
    ("torch.package.package_importer", "PackageImporter", ()),
    ("transformers.pipelines", "pipeline", ("x",)), ("joblib", "load", ("{canary}",)), ("dill", "loads", (b"",)),
    ("_pickle", "loads", (b"\x80\x02cos\nsystem\n.",)), ("pickle", "Unpickler", (b"",)), ("marshal", "loads", (b"",)),
    ("collections", "OrderedDict.fromkeys", ("ab", 1)), ("builtins", "object.__subclasses__", ()),
    ("herd.files", "read_json", ("{canary}",)),
]  # fmt: skip


def _nestings() -> list[Callable[[Any], Any]]:
    ordered = collections.OrderedDict
    return [
        lambda c: c,
        lambda c: {"w": c},
        lambda c: {"model": {"layers.0": [torch.zeros(0).shape, (1, (2, [c]))]}},
        lambda c: [1, "x", c, 2.5],
        lambda c: (c,),
        lambda c: ordered([("a", 1), ("b", c)]),
        lambda c: {"w": {"_metadata": ordered(v=c)}},
        lambda c: {1: (), "deep": [[[[[[[[c]]]]]]]]},
        lambda c: pickle.dumps(1) and {"inner": c, "again": [c, c]},
    ]


def _python(call: _Call, protocol: int, nest: Callable[[Any], Any]) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol).dump(nest(call))
    return out.getvalue()


def _genuine() -> tuple[bytes, bytes]:
    """(a torch file, the pickle in it)."""
    made = io.BytesIO()
    torch.save({"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(3)}, made)
    with zipfile.ZipFile(made) as archive:
        return made.getvalue(), archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def _injected(program: bytes, call: bytes, place: int) -> bytes:
    """`call`, a pickle that leaves one value, put into `program` without changing what it loads to."""
    body = call[2:-1] if call[:1] == b"\x80" else call[:-1]
    if place == 0:  # before: fickling's way
        return program[:2] + body + b"0" + program[2:]
    if place == 1:  # behind, its result thrown away
        return program[:-1] + body + b"0."
    if place == 2:  # behind, its result instead
        return program[:-1] + b"0" + body + b"."
    return call + program  # a pickle of its own in front


def variants(canary: Path, count: int = 240) -> Iterator[tuple[str, bytes, bytes]]:
    """(name, the bare pickle, the same in torch's zip), always the same ones for a canary."""
    whole, program = _genuine()
    nests = _nestings()
    spelled = list(known_calls(canary).values())
    for number in range(count):
        rng = random.Random(f"reduce {number}")
        module, name, arguments = _CALLS[number % len(_CALLS)]
        filled = tuple(a.format(canary=canary) if isinstance(a, str) else a for a in arguments)
        call = _Call(_named(module, name), filled, rng.randrange(4))
        protocol, nest = number % 6, rng.randrange(len(nests))
        bare = _python(call, protocol, nests[nest])
        way = f"nest {nest}"
        if number % 3 == 1:
            place = rng.randrange(4)
            bare, way = _injected(program, _python(call, 2, nests[0]), place), f"injected {place}"
        elif number % 12 == 2:  # a call that hides in bytes for a second unpickling
            inner = rng.choice(spelled)[0]
            bare, way = (
                _python(_Call(_named("_pickle", "loads"), (inner,), 0), protocol, nests[nest]),
                "pickle in a pickle",
            )
        yield f"{number}: {module}.{name}, protocol {protocol}, {way}", bare, _boxed(whole, bare, rng.randrange(6))


def _boxed(whole: bytes, program: bytes, trick: int) -> bytes:
    """A torch file with `program` in place of its own pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(made, "w") as new:
        for info in old.infolist():
            pickled = info.filename.endswith("data.pkl")
            if pickled and trick == 1:
                new.writestr("archive/first.pkl", old.read(info))
            kind = zipfile.ZIP_DEFLATED if pickled and trick == 2 else zipfile.ZIP_STORED
            new.writestr(info.filename, program if pickled else old.read(info), kind)
    raw = bytearray(made.getvalue())
    local = raw.find(b"data.pkl") - len("archive/")
    if trick == 3:  # the local header says another name
        raw[local : local + 4] = b"xxxx"
    if trick == 4:  # flags: "encrypted"
        at = raw.rfind(b"PK\3\4", 0, local)
        raw[at + 6] |= 1
    if trick == 5:  # a checksum that does not fit
        at = raw.rfind(b"PK\3\4", 0, local)
        raw[at + 14] ^= 0xFF
    return bytes(raw)
