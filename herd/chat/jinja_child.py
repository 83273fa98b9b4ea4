"""The other side of `herd.chat.sandbox`: a small program that checks, compiles and runs one chat template after another.

It is the only place in herd where a Jinja environment is made, and it is never imported: the sandbox starts this file with
`python -I -S`, the folders of jinja2 and markupsafe as arguments. It speaks JSON behind a length of four bytes, on pipes.
Templates are checked node by node before they are compiled, and by the time the first one arrives the process has limited
memory and processor time, can open no file and no socket, start no program and, on Linux, make no other system call either.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from typing import Any, ClassVar

MEMORY = 256 * 2**20
CPU_SECONDS = 10
MAX_OUTPUT = 8 * 2**20
MAX_PRODUCT = 2**20


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NODES = _words(
    "Add And Assign AssignBlock Break CallBlock Call Compare Concat CondExpr Const Continue Dict Div Filter FilterBlock "
    "FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul NSRef Name Neg Not Operand Or Output Pair Pos Scope Slice "
    "Sub Template TemplateData Test Tuple With"
)
FILTERS = _words(
    "abs batch capitalize count d default dictsort e escape first float groupby indent int items join last length list "
    "lower map max min reject rejectattr replace reverse round safe select selectattr slice sort string sum title tojson "
    "trim truncate unique upper wordcount"
)
METHODS: dict[str, frozenset[str]] = {
    "str": _words(
        "strip lstrip rstrip split rsplit splitlines startswith endswith replace upper lower title capitalize find rfind "
        "index count join removeprefix removesuffix partition rpartition isdigit isalpha isalnum isspace isupper "
        "islower isnumeric isdecimal"
    ),
    "Markup": _words("strip lstrip rstrip split startswith endswith replace upper lower title"),
    "dict": frozenset({"get", "items", "keys", "values"}),
    "list": frozenset({"index", "count"}),
    "tuple": frozenset({"index", "count"}),
    "LoopContext": frozenset({"cycle", "changed"}),
    "Joiner": frozenset(),
    "Cycler": frozenset({"next", "reset"}),
}
WHY = {
    "Pow": "** can make numbers that take minutes to compute",
    "Include": "it loads other templates",
    "Import": "it loads other templates",
    "FromImport": "it loads other templates",
    "Extends": "it loads other templates",
    "Block": "it belongs to template inheritance",
}


class Refused(Exception):
    """A template does what a chat template has no need of."""

    def __init__(self, message: str, *, node: str = "", line: int | None = None) -> None:
        super().__init__(message)
        self.node = node
        self.line = line


class Raised(Exception):
    """The template called raise_exception."""


def check(tree: Any, nodes: Any, tests: Any) -> None:
    """Refuse every node, filter, test and name that is not on the lists. No recursion: a stack of its own."""
    stack = [tree]
    while stack:
        node = stack.pop()
        kind, line = type(node).__name__, node.lineno
        if kind not in NODES:
            raise Refused(WHY.get(kind, "chat templates have no need of it"), node=kind, line=line)
        if kind == "Filter" and node.name not in FILTERS:
            raise Refused("not among the filters that are allowed", node=f"filter {node.name!r}", line=line)
        if kind == "Test" and node.name not in tests:
            raise Refused("not among the tests that are allowed", node=f"test {node.name!r}", line=line)
        if kind in ("Name", "NSRef") and (node.name.startswith("__") or node.name == "self"):
            raise Refused("the name reaches into the template engine", node=f"name {node.name!r}", line=line)
        attribute = node.attr if kind in ("Getattr", "NSRef") else None
        if kind == "Getitem" and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            attribute = node.arg.value
        if attribute is not None and attribute.startswith("_"):
            raise Refused(
                "names with a leading underscore reach into Python", node=f"attribute {attribute!r}", line=line
            )
        stack.extend(node.iter_child_nodes())


def make_environment() -> tuple[Any, Any]:
    """The environment of every template, as transformers makes it but for what is not allowed; and its node classes."""
    from datetime import datetime

    import jinja2.debug
    import jinja2.ext
    import jinja2.nodes as nodes
    import jinja2.runtime
    import jinja2.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant wrote; it prints its content."""

        tags = {"generation"}  # noqa: RUF012 (Jinja reads it from the class)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "%", "**"})  # also keeps the compiler from computing them

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if not super().is_safe_attribute(obj, attr, value):
                return False
            if not callable(value) or isinstance(value, jinja2.runtime.Undefined | jinja2.runtime.Macro):
                return True
            return attr in METHODS.get(type(obj).__name__, ())

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise Refused(
                f"not among the methods of a {type(obj).__name__} that are allowed", node=f"attribute {attribute!r}"
            )

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                raise Refused(WHY["Pow"], node="Pow")
            if operator == "*":
                for many, times in ((left, right), (right, left)):
                    if isinstance(many, str | list | tuple) and (
                        not isinstance(times, int) or len(many) * times > MAX_PRODUCT
                    ):
                        raise Refused(f"repeats a text or a list to more than {MAX_PRODUCT:,} items", node="Mul")
                    if isinstance(many, int) and abs(many) >= 2**64:
                        raise Refused("multiplies numbers beyond 64 bits", node="Mul")
            if operator == "%" and isinstance(left, str):
                digits = "".join(char if char.isdigit() or char == "*" else " " for char in left).split()
                if any("*" in run or len(run) > 3 for run in digits):
                    raise Refused("formats to a very wide text", node="Mod")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols], cache_size=0
    )

    def raise_exception(message: Any) -> None:
        raise Raised(str(message))

    def strftime_now(format: str) -> str:
        year, month, day, hour, minute, second = NOW
        return datetime(year, month, day, hour, minute, second).strftime(format)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
            raise Refused("indents by more than 16 spaces", node="filter 'tojson'")
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def namespace(*given: Any, **more: Any) -> Any:
        if any(str(name).startswith("_") for name in dict(*given, **more)):
            raise Refused("names with a leading underscore reach into Python", node="namespace")
        return jinja2.utils.Namespace(*given, **more)

    def mapping(*given: Any, **more: Any) -> dict[Any, Any]:
        return dict(*given, **more)

    environment.filters = {name: environment.filters[name] for name in FILTERS if name in environment.filters}
    environment.filters["tojson"] = tojson
    environment.globals = {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": namespace,
        "dict": mapping,
        "range": environment.globals["range"],
        "joiner": jinja2.utils.Joiner,
        "cycler": jinja2.utils.Cycler,
    }
    return environment, nodes


NOW: list[int] = [2024, 7, 26, 0, 0, 0]


def answer(request: dict[str, Any], environment: Any, nodes: Any, known: dict[str, Any]) -> dict[str, Any]:
    """What became of one request: `{"kind": "text", "text": ...}`, or another kind with message, node and line."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    source = request["source"]
    try:
        template = known.get(source)
        if template is None:
            tree = environment.parse(source)
            check(tree, nodes, environment.tests)
            template = environment.from_string(tree)
            if len(known) > 7:
                known.clear()
            known[source] = template
        if request.get("variables") is None:
            return {"kind": "text", "text": ""}
        NOW[:] = request["now"]
        pieces, length = [], 0
        for piece in template.generate(request["variables"]):
            length += len(piece)
            if length > MAX_OUTPUT:
                raise Refused(f"writes more than {MAX_OUTPUT:,} characters")
            pieces.append(piece)
        return {"kind": "text", "text": "".join(pieces)}
    except Refused as error:
        line = error.line or line_of(error)
        return {"kind": "refused", "message": str(error), "node": error.node, "line": line}
    except SecurityError as error:
        return {"kind": "refused", "message": str(error), "node": "", "line": line_of(error)}
    except Raised as error:
        return {"kind": "raised", "message": str(error)[:2000], "node": "", "line": line_of(error)}
    except TemplateSyntaxError as error:
        return {"kind": "broken", "message": str(error.message), "node": "", "line": error.lineno}
    except (MemoryError, OverflowError) as error:
        message = "needs more memory than it may have" if isinstance(error, MemoryError) else str(error)
        return {"kind": "refused", "message": message, "node": "", "line": None}
    except RecursionError:
        return {"kind": "refused", "message": "is nested too deeply", "node": "", "line": None}
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:2000]
        return {"kind": "failed", "message": message, "node": "", "line": line_of(error)}


def line_of(error: BaseException) -> int | None:
    """The line of the template in which an error was raised."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            template = trace.tb_frame.f_globals.get("__jinja_template__")
            line = trace.tb_lineno if template is None else template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


def limit() -> list[str]:
    """Give up what templates have no need of; the names of the limits that hold on this system."""
    held: list[str] = []
    try:
        import ctypes
        import resource
    except ImportError:  # Windows has no resource
        return held
    wanted = [("memory", "RLIMIT_AS", MEMORY), ("cpu", "RLIMIT_CPU", CPU_SECONDS), ("files", "RLIMIT_NOFILE", 0)]
    wanted += [("", "RLIMIT_NPROC", 0), ("", "RLIMIT_CORE", 0), ("", "RLIMIT_FSIZE", 0)]
    for name, which, value in wanted:
        try:
            resource.setrlimit(getattr(resource, which), (value, value))
        except (AttributeError, ValueError, OSError):
            continue
        if name and not (name == "memory" and sys.platform == "darwin"):  # macOS takes the limit and ignores it
            held.append(name)
    if sys.platform == "linux" and filter_system_calls(ctypes):
        held.append("system calls")
    return held


# Numbers of: read write mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn mremap madvise futex
# clock_gettime gettimeofday sched_yield getrandom exit exit_group (and of getrusage, for process times).
_CALLS = {
    "x86_64": (
        0xC000003E,
        (0, 1, 9, 10, 11, 12, 13, 14, 15, 25, 28, 202, 228, 96, 24, 318, 60, 231, 98),
    ),
    "aarch64": (
        0xC00000B7,
        (63, 64, 222, 226, 215, 214, 134, 135, 139, 216, 233, 98, 113, 169, 124, 278, 93, 94, 165),
    ),
}


def filter_system_calls(ctypes: Any) -> bool:
    """A seccomp filter: every other system call fails with EPERM. False where the kernel has none."""
    machine = os.uname().machine
    if machine not in _CALLS:
        return False
    arch, allowed = _CALLS[machine]
    load, equal, give = 0x20, 0x15, 0x06  # BPF: load a word, jump when equal, return
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    for i, number in enumerate(allowed):
        program.append((equal, len(allowed) - i, 0, number))
    program += [(give, 0, 0, 0x00050000 | errno.EPERM), (give, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))

    class Program(ctypes.Structure):
        _fields_: ClassVar[Any] = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filled = Program(len(program), ctypes.addressof(code))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    no_new_privileges, seccomp, mode_filter = 38, 22, 2
    if prctl(no_new_privileges, ctypes.c_ulong(1), *[ctypes.c_ulong(0)] * 3) != 0:
        return False
    return prctl(seccomp, ctypes.c_ulong(mode_filter), ctypes.byref(filled), *[ctypes.c_ulong(0)] * 2) == 0


def read(count: int) -> bytes | None:
    """Exactly `count` bytes of standard input; None at its end."""
    parts = []
    while count:
        part = os.read(0, min(count, 2**20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def send(value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    view = memoryview(len(body).to_bytes(4, "little") + body)
    while view:
        view = view[os.write(1, view) :]


def main() -> None:
    import time

    sys.path[:0] = sys.argv[1:]
    environment, nodes = make_environment()
    # Everything that is imported or read on first use, before files can no longer be opened.
    warm = "{% for m in messages %}{{ m.a|trim|tojson(indent=2) }}{% break %}{% endfor %}{{ strftime_now('%d %b %Y') }}"
    wake = {"source": warm, "variables": {"messages": [{"a": "é"}]}, "now": NOW}
    answer(wake, environment, nodes, {})
    answer(wake | {"source": "{{ 1 / 0 }}"}, environment, nodes, {})
    answer(wake | {"source": "{{ 1 "}, environment, nodes, {})
    limits = limit()
    sys.path.clear()
    send({"limits": limits})
    known: dict[str, Any] = {}
    while (head := read(4)) is not None:
        body = read(int.from_bytes(head, "little"))
        if body is None:
            return
        reply = answer(json.loads(body), environment, nodes, known)
        send(reply | {"cpu": time.process_time()})


if __name__ == "__main__":
    main()
