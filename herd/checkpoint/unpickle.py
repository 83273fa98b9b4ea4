"""A pickle interpreter that can only build descriptions of tensors.

torch.save writes a small pickle program that names storages and shapes. This runs such programs as data: nothing is
imported, looked up or called, whatever the bytes say. The few globals below are symbols with a fixed meaning, every other
one ends the reading with a CheckpointError that names it, and opcodes that torch does not write are refused.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from herd.errors import CheckpointError
from herd.files import short
from herd.quant.numbers import NUMBER_BYTES

__all__ = ["ForbiddenGlobalError", "Storage", "TensorSpec", "unpickle"]

MAX_OPCODES = 250_000
"""About thirty per tensor: enough for 8,000 tensors in one file, and a bound on the time a hostile one can take."""

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8",
    "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip


class ForbiddenGlobalError(CheckpointError):
    """The pickle names a global that is not needed for tensors; the message says which."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A global that is known: what REDUCE may apply or a tensor may mention. `number` names a torch dtype."""

    name: str
    number: str | None = None


GLOBALS = {
    ("collections", "OrderedDict"): Symbol("dict"),
    ("torch", "Size"): Symbol("size"),
    ("torch._utils", "_rebuild_tensor_v2"): Symbol("tensor"),
    ("torch._utils", "_rebuild_tensor_v3"): Symbol("tensor"),
    ("torch._utils", "_rebuild_parameter"): Symbol("parameter"),
    **{
        (module, name): Symbol("storage", number)
        for name, number in STORAGES.items()
        for module in ("torch", "torch.storage")
    },
    **{("torch", name): Symbol("dtype", name) for name in DTYPES},
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of `nbytes` bytes that lives in the archive under `key`; `number` names the torch dtype of its elements."""

    key: str
    number: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor before it is read: `offset` and `strides` count elements in `storage`; bounds are checked.

    `number` names the torch dtype.
    """

    storage: Storage
    number: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return NUMBER_BYTES[self.number]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie row-major, without gaps."""
        step = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != step:
                return False
            step *= n
        return True


_MARK = Symbol("mark")


def unpickle(data: bytes, path: str | os.PathLike[str], start: int = 0) -> Any:
    """Run the program `data`, found at byte `start` of file `path`; returns dicts, lists, tuples, numbers, TensorSpecs.

    Raises CheckpointError, with the offending global or opcode and its place.
    """
    return _Machine(data, path, start).run()


class _Machine:
    def __init__(self, data: bytes, path: str | os.PathLike[str], start: int) -> None:
        self.data, self.path, self.start = data, path, start
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                break
            act = _OPCODES.get(code)
            if act is None:
                self.fail(f"the pickle opcode 0x{code:02x} is not part of any checkpoint")
            act(self)
        else:
            self.fail(f"more than {MAX_OPCODES} pickle opcodes")
        return self.pop()

    def fail(self, why: str, error: type[CheckpointError] = CheckpointError) -> NoReturn:
        raise error(f"{why}; nothing in this file was executed", path=self.path, offset=self.start + self.at)

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            self.fail("the pickle ends in the middle of an opcode")
        self.at += count
        return piece

    def unpack(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            self.fail("a pickle line has no end")
        return self.take(end + 1 - self.at)[:-1].decode("utf-8", "replace")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            self.fail("the pickle takes from an empty stack")
        return self.stack.pop()

    def marked(self) -> list[Any]:
        """Everything above the last mark."""
        place = len(self.stack) - 1
        while place >= 0 and self.stack[place] is not _MARK:
            place -= 1
        if place < 0:
            self.fail("the pickle has no mark where one is needed")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            self.fail(f"the pickle adds an item to something that is no {kind.__name__}")
        return self.stack[-1]

    def symbol(self, module: object, name: object) -> None:
        found = GLOBALS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if found is None:
            self.forbid(module, name)
        self.stack.append(found)

    def forbid(self, module: object, name: object) -> NoReturn:
        self.fail(
            f"refused: it asks for {str(module)[:80]}.{str(name)[:80]}, which no tensor needs", ForbiddenGlobalError
        )

    # Opcodes

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.symbol(module, name)

    def inst(self) -> None:
        self.forbid(self.line(), self.line())

    def text(self, form: str) -> None:
        try:
            self.stack.append(self.take(self.unpack(form)).decode("utf-8"))
        except UnicodeDecodeError:
            self.fail("a pickled string is not UTF-8")

    def tuple_of(self, count: int) -> None:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            self.fail("the pickle takes from an empty stack")
        self.stack[-count:] = [tuple(items)]

    def get(self, index: int) -> None:
        if index not in self.memo:
            self.fail(f"the pickle recalls item {index}, which it never stored")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        value = self.pop()
        self.memo[index] = value
        self.stack.append(value)

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def appends(self) -> None:
        items = self.marked()
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            self.fail("a pickled dict has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                self.fail("a pickled dict has a key that is neither text nor number")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def persistent(self) -> None:
        match self.pop():
            case ("storage", Symbol("storage", str(number)), str(key), str(), int(count)) if count >= 0:
                self.stack.append(Storage(key, number, count * NUMBER_BYTES[number]))
            case _:
                self.fail("a reference to data outside of the pickle is no torch storage")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case Symbol("dict"), ():
                self.stack.append({})
            case Symbol("size"), (tuple(size),):
                self.stack.append(size)
            case Symbol("parameter"), (TensorSpec() as tensor, bool(), dict()):
                self.stack.append(tensor)
            case Symbol("tensor"), (Storage() as storage, offset, shape, strides, bool(), dict() as hooks, *rest):
                self.stack.append(self.tensor(storage, offset, shape, strides, hooks, rest))
            case _:
                name = function.name if isinstance(function, Symbol) else short(function)
                self.fail(f"a call of {name} with arguments that torch.save does not write")

    def tensor(self, storage: Storage, offset: Any, shape: Any, strides: Any, hooks: dict, rest: list) -> TensorSpec:
        """Arguments of torch._utils._rebuild_tensor_v2 and _v3, checked against their storage."""
        number = storage.number
        if rest and isinstance(rest[0], Symbol) and rest[0].number is not None:
            number, rest = rest[0].number, rest[1:]
        if hooks or any(rest):
            self.fail("a tensor carries hooks or flags, which no weight has")
        whole = _size(offset) and isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
        if not whole or len(shape) > 16 or not all(map(_size, (*shape, *strides))):
            self.fail("a tensor's offset, shape or strides are not sizes")
        count, last = 1, offset
        for n, stride in zip(shape, strides, strict=True):
            count *= n
            last += max(n - 1, 0) * stride
        held = storage.nbytes // NUMBER_BYTES[number]
        if any(n >= 1 << 48 for n in shape) or (count and (last >= held or count > held)):
            self.fail(
                f"a tensor of shape {shape} and strides {strides} at {offset} leaves its storage of {held} elements"
            )
        return TensorSpec(storage, number, offset, shape, strides)

    def build(self) -> None:
        state = self.pop()
        target = self.top(dict)  # torch writes OrderedDict attributes (_metadata) this way
        if not isinstance(state, dict) or target is state:
            self.fail("an object is built from state that torch.save does not write")

    def long(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.take(1)[0]), "little", signed=True))


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _push(value: Any) -> Any:
    return lambda m: m.stack.append(value)


_OPCODES: dict[int, Any] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord("("): _push(_MARK),
    ord("0"): lambda m: m.pop(),
    ord("N"): _push(None),
    0x88: _push(True),
    0x89: _push(False),
    ord("J"): lambda m: m.stack.append(m.unpack("<i")),
    ord("K"): lambda m: m.stack.append(m.unpack("<B")),
    ord("M"): lambda m: m.stack.append(m.unpack("<H")),
    0x8A: _Machine.long,
    ord("G"): lambda m: m.stack.append(m.unpack(">d")),
    ord("X"): lambda m: m.text("<I"),
    0x8C: lambda m: m.text("<B"),
    0x8D: lambda m: m.text("<Q"),
    ord("U"): lambda m: m.text("<B"),  # Python 2 strings
    ord("T"): lambda m: m.text("<I"),
    ord(")"): _push(()),
    ord("t"): lambda m: m.stack.append(tuple(m.marked())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("]"): lambda m: m.stack.append([]),
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("}"): lambda m: m.stack.append({}),
    ord("s"): _Machine.set_item,
    ord("u"): lambda m: m.set_items(m.marked()),
    ord("q"): lambda m: m.put(m.unpack("<B")),
    ord("r"): lambda m: m.put(m.unpack("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.unpack("<B")),
    ord("j"): lambda m: m.get(m.unpack("<I")),
    ord("c"): lambda m: m.symbol(m.line(), m.line()),
    0x93: _Machine.stack_global,
    ord("i"): _Machine.inst,
    ord("Q"): _Machine.persistent,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
}
