"""Malicious pickles: what scanners' test suites and exploit generators produce, each touching a canary when executed.

`payloads(canary)` gives name -> (pickle bytes, the global the refusal must name, or None when it is about an opcode).
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["as_torch_zip", "payloads"]


class Call:
    """Pickles as `function(*arguments)`, optionally with state, list or dict items."""

    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced


def named(module: str, name: str) -> Callable[..., object]:
    """A stand-in that pickles as the global module.name without importing it."""

    def function(*args: object) -> None: ...

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def payloads(canary: Path) -> dict[str, tuple[bytes, str | None]]:
    """All variants."""
    return reduced(canary) | assembled(canary) | nested(canary)


def reduced(canary: Path) -> dict[str, tuple[bytes, str | None]]:
    """One call each, in the ways pickle can spell it."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    calls: dict[str, tuple[str, str, tuple[object, ...]]] = {
        "os.system": ("os", "system", (touch,)),
        "posix.system": ("posix", "system", (touch,)),
        "nt.system": ("nt", "system", (touch,)),
        "os.popen": ("os", "popen", (touch,)),
        "os.execv": ("os", "execv", ("/bin/sh", ["sh", "-c", touch])),
        "os.spawnlp": ("os", "spawnlp", (0, "sh", "sh", "-c", touch)),
        "subprocess.Popen": ("subprocess", "Popen", (["sh", "-c", touch],)),
        "subprocess.run": ("subprocess", "run", (["sh", "-c", touch],)),
        "subprocess.check_output": ("subprocess", "check_output", (["sh", "-c", touch],)),
        "builtins.eval": ("builtins", "eval", (code,)),
        "builtins.exec": ("builtins", "exec", (code,)),
        "builtins.compile": ("builtins", "compile", (code, "x", "exec")),
        "builtins.open": ("builtins", "open", (str(canary), "w")),
        "builtins.getattr": ("builtins", "getattr", ("os", "system")),
        "builtins.__import__": ("builtins", "__import__", ("os",)),
        "builtins.apply": ("__builtin__", "apply", (touch,)),
        "io.open": ("io", "open", (str(canary), "w")),
        "runpy.run_path": ("runpy", "run_path", (str(canary),)),
        "runpy._run_code": ("runpy", "_run_code", (code, {})),
        "timeit.timeit": ("timeit", "timeit", (code,)),
        "code.interact": ("code", "InteractiveInterpreter", ()),
        "pdb.run": ("pdb", "run", (code,)),
        "pty.spawn": ("pty", "spawn", (["sh", "-c", touch],)),
        "asyncio": ("asyncio.unix_events", "_UnixSubprocessTransport._start", ()),
        "multiprocessing": ("multiprocessing.util", "spawnv_passfds", (b"/bin/sh", [b"sh", b"-c", touch.encode()], ())),
        "importlib": ("importlib", "import_module", ("os",)),
        "operator.attrgetter": ("operator", "attrgetter", ("system",)),
        "functools.partial": ("functools", "partial", (touch,)),
        "shutil.rmtree": ("shutil", "rmtree", (str(canary),)),
        "socket": ("socket", "create_connection", (("127.0.0.1", 9),)),
        "urllib": ("urllib.request", "urlretrieve", ("file:///etc/hostname", str(canary))),
        "webbrowser": ("webbrowser", "open", ("file:///",)),
        "ctypes": ("ctypes", "CDLL", ("libc.so.6",)),
        "pip": ("pip", "main", (["install", "x"],)),
        "pydoc.pipepager": ("pydoc", "pipepager", ("x", touch)),
        "bdb": ("bdb", "Bdb.run", (code,)),
        "numpy runstring": ("numpy.testing._private.utils", "runstring", (code, {})),
        "torch.load": ("torch.serialization", "load", (str(canary),)),
        "torch.hub.load": ("torch.hub", "load", ("x/y", "z")),
        "torch._inductor exec": ("torch._inductor.codecache", "compile_file", (str(canary),)),
        "torch dynamo guard": ("torch._dynamo.guards", "GuardBuilder.get", (code,)),
        "torch dtype lookup": ("torch", "float8_unknown", ()),
        "torch.utils": ("torch.utils.collect_env", "run", (touch,)),
        "pickle.loads": ("pickle", "loads", (b"",)),
        "marshal": ("marshal", "loads", (b"",)),
        "types.CodeType": ("types", "CodeType", (0,)),
        "cProfile": ("cProfile", "run", (code,)),
        "idlelib": ("idlelib.pyshell", "ModifiedInterpreter.runcode", (code,)),
        "transformers": ("transformers.dynamic_module_utils", "get_class_from_dynamic_module", ("x",)),
        "herd itself": ("herd.checkpoint.open", "open_store", (str(canary),)),
        "collections.namedtuple": ("collections", "namedtuple", ("x; import os", "y")),
        "_codecs.encode": ("_codecs", "encode", ("x", "latin1")),
        "copyreg": ("copyreg", "_reconstructor", (object, object, None)),
    }
    found: dict[str, tuple[bytes, str | None]] = {}
    for label, (module, name, arguments) in calls.items():
        packed = pickle.dumps(arguments if label != "copyreg" else (), 2)[2:-1]
        found[label] = (b"\x80\x02" + glob(module, name) + packed + b"R.", f"{module}.{name}")
        stack = b"\x80\x04" + short(module) + short(name) + b"\x93" + packed + b"R."
        found[label + ", STACK_GLOBAL"] = (stack, f"{module}.{name}")
    return found


def assembled(canary: Path) -> dict[str, tuple[bytes, str | None]]:
    """Opcodes that build objects without REDUCE, and forms that confuse scanners."""
    touch = f"touch {canary}"
    system = glob("os", "system")
    argument = text(touch) + b"\x85"
    return {
        "INST": (b"\x80\x02(" + text(touch) + b"ios\nsystem\n.", "os.system"),
        "INST, protocol 0": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", None),
        "OBJ": (b"\x80\x02(" + system + text(touch) + b"o.", "os.system"),
        "NEWOBJ": (b"\x80\x02" + system + argument + b"\x81.", "os.system"),
        "NEWOBJ of an allowed class": (b"\x80\x02" + glob("collections", "OrderedDict") + b")\x81.", None),
        "NEWOBJ_EX": (b"\x80\x04" + system + argument + b"}\x92.", "os.system"),
        "BUILD with __setstate__": (
            b"\x80\x02" + glob("os", "environ") + b"}" + text("x") + text("y") + b"sb.",
            "os.environ",
        ),
        "BUILD on a number": (b"\x80\x02K\x01}b.", None),
        "EXT1": (b"\x80\x02\x82\x01.", None),
        "EXT4": (b"\x80\x02\x84\x01\0\0\0.", None),
        "PERSID, text": (b"Pos.system\n.", None),
        "BINPERSID of a string": (b"\x80\x02" + text("os.system") + b"Q.", None),
        "BINPERSID with a callable": (
            b"\x80\x02(" + text("storage") + system + text("0") + text("cpu") + b"K\x01tQ.",
            "os.system",
        ),
        "global through the memo": (b"\x80\x02" + system + b"q\x00" + b"0h\x00" + argument + b"R.", "os.system"),
        "names built from parts": (
            b"\x80\x04" + short("os") + b"\x94" + short("system") + b"\x94h\x00h\x01\x93.",
            "os.system",
        ),
        "name is not text": (b"\x80\x04K\x01K\x02\x93.", "1.2"),
        "dotted name of an allowed module": (
            b"\x80\x04" + short("torch") + short("serialization.os.system") + b"\x93" + argument + b"R.",
            "torch.serialization.os.system",
        ),
        "name with a line break": (b"\x80\x04" + short("os") + short("system\nx") + b"\x93.", "os.system"),
        "unicode look-alike": (b"\x80\x04" + short("torch") + text("\uff30arameter") + b"\x93.", "torch."),
        "after a good dict": (b"\x80\x02}" + text("a") + b"K\x01s0" + system + argument + b"R.", "os.system"),
        "after STOP of a first pickle": (b"\x80\x02}." + b"\x80\x02" + system + argument + b"R.", None),
        "broken tail": (b"\x80\x02" + system + argument + b"R", "os.system"),
        "reduce a dict": (b"\x80\x02}" + argument + b"R.", None),
        "reduce a storage class": (b"\x80\x02" + glob("torch", "FloatStorage") + b"K\x04\x85R.", None),
        "huge long": (b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\xff" * 64 + b".", None),
        "huge string": (b"\x80\x02X\xff\xff\xff\xffabc.", None),
        "huge frame": (b"\x80\x04\x95" + b"\xff" * 8 + system + argument + b"R.", "os.system"),
        "a million marks": (b"\x80\x02" + b"(" * 1_000_000 + b".", None),
        "deep tuples": (b"\x80\x02)" + b"\x85" * 1_000_000 + b".", None),
        "list inside itself": (b"\x80\x02]q\x00h\x00a.", None),
        "dict with a list as key": (b"\x80\x02}]K\x01s.", None),
        "recalled but never stored": (b"\x80\x02h\x07.", None),
        "empty stack": (b"\x80\x02.", None),
        "no bytes after PROTO": (b"\x80", None),
        "protocol 0 global": (b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.", "os.system"),
        "bytearray and buffers": (b"\x80\x05\x96\x04\0\0\0\0\0\0\0abcd.", None),
        "set": (b"\x80\x04\x8f.", None),
    }


def nested(canary: Path) -> dict[str, tuple[bytes, str | None]]:
    """The call hides where a tensor's parts are expected."""
    touch = f"touch {canary}"
    call = glob("os", "system") + text(touch) + b"\x85R"
    rebuild = glob("torch._utils", "_rebuild_tensor_v2")
    storage = b"(" + text("storage") + glob("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
    ordered = glob("collections", "OrderedDict") + b")R"

    def tensor(parts: bytes) -> bytes:
        return b"\x80\x02}" + text("w") + rebuild + b"(" + parts + b"tRs."

    return {
        "as a dict value": (b"\x80\x02}" + text("w") + call + b"s.", "os.system"),
        "as a dict key": (b"\x80\x02}" + call + b"K\x01s.", "os.system"),
        "as a storage": (tensor(call + b"K\x00K\x02\x85K\x01\x85\x89" + ordered), "os.system"),
        "as an offset": (tensor(storage + call + b"K\x02\x85K\x01\x85\x89" + ordered), "os.system"),
        "as a shape": (tensor(storage + b"K\x00" + call + b"K\x01\x85\x89" + ordered), "os.system"),
        "as backward hooks": (tensor(storage + b"K\x00K\x02\x85K\x01\x85\x89" + call), "os.system"),
        "as hooks in a dict": (
            tensor(storage + b"K\x00K\x02\x85K\x01\x85\x89" + ordered + text("h") + call + b"s"),
            "os.system",
        ),
        "as OrderedDict items": (b"\x80\x02" + glob("collections", "OrderedDict") + b"(" + call + b"tR.", "os.system"),
        "as OrderedDict state": (b"\x80\x02" + ordered + call + b"b.", "os.system"),
        "as a parameter": (b"\x80\x02" + glob("torch._utils", "_rebuild_parameter") + call + b"\x85R.", "os.system"),
        "as a storage type": (
            tensor(
                b"("
                + text("storage")
                + glob("builtins", "eval")
                + text("0")
                + text("cpu")
                + b"K\x04tQK\x00))\x89"
                + ordered
            ),
            "builtins.eval",
        ),
    }


def as_torch_zip(program: bytes, root: str = "archive") -> bytes:
    """The container of torch.save around any pickle, with one storage of 16 bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", program)
        archive.writestr(f"{root}/byteorder", b"little")
        archive.writestr(f"{root}/data/0", torch.arange(4.0).numpy().tobytes())
        archive.writestr(f"{root}/version", b"3\n")
    return made.getvalue()
