"""Messages as bytes and back: JSON driven by the types of frozen dataclasses, in frames with a length. No pickle, no torch.

What comes in is built only from the classes that a field is declared to hold, so that no data, whoever sent it, becomes
anything else. Fields may be of: str, int, float, bool, None, bytes, Any (plain JSON), tuple[T, ...], dict[K, T], unions, and
dataclasses of these. A union of dataclasses is written with the class's name.
"""

from __future__ import annotations

import base64
import json
import struct
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["MAX_FRAME", "Codec", "frame", "split_header"]

MAX_FRAME = 256 << 20
"""Bytes of one frame; more is a bug on the other side."""
TOGETHER = 1 << 20
"""Bytes of a frame from which on further messages go into the next one: whoever reads it does nothing else meanwhile."""
_HEADER = struct.Struct("<I")
Made = Callable[[Any], Any]


def frame(data: bytes) -> bytes:
    """`data` behind its length."""
    if len(data) > MAX_FRAME:
        raise ValueError(f"a message of {len(data):,} bytes is more than a frame holds")
    return _HEADER.pack(len(data)) + data


def split_header(head: bytes) -> int:
    """The length that four bytes announce. Raises ValueError beyond MAX_FRAME."""
    (length,) = _HEADER.unpack(head)
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length:,} bytes was announced")
    return length


HEADER = _HEADER.size


class Codec:
    """Lists of messages of the given classes, as JSON text and back."""

    def __init__(self, classes: Iterable[type]) -> None:
        self._by_name = {cls.__name__: cls for cls in classes}

    def encode(self, messages: Iterable[Any]) -> bytes:
        """A frame's content."""
        return b"[" + b", ".join(map(self._text, messages)) + b"]"

    def frames(
        self,
        messages: Iterable[Any],
        too_large: Callable[[Any, int], Any],
        *,
        together: int = TOGETHER,
        most: int | None = None,
    ) -> Iterator[bytes]:
        """Frames of all messages, in order. A message of more than `most` bytes (MAX_FRAME) becomes `too_large(message, bytes)`.
        Raises ValueError when that is too large as well."""
        most = MAX_FRAME if most is None else most
        together = min(together, most)
        texts: list[bytes] = []
        size = 0
        for message in messages:
            text = self._text(message)
            if len(text) + 2 > most:
                text = self._text(too_large(message, len(text)))
                if len(text) + 2 > most:
                    raise ValueError(f"a message of {len(text):,} bytes is more than a frame holds")
            if texts and size + len(text) + 2 > together:
                yield frame(b"[" + b", ".join(texts) + b"]")
                texts, size = [], 0
            texts.append(text)
            size += len(text) + 2
        if texts:
            yield frame(b"[" + b", ".join(texts) + b"]")

    def _text(self, message: Any) -> bytes:
        return json.dumps([type(message).__name__, _plain(message)], ensure_ascii=True).encode()

    def decode(self, data: bytes) -> list[Any]:
        """The messages of a frame. Raises ValueError for what is none of them."""
        try:
            return [_built(self._by_name[name])(content) for name, content in json.loads(data)]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a frame holds no message: {type(error).__name__} {error}") from None


def _plain(value: Any) -> Any:
    """A dataclass as a list of its fields up to the last one that is not the default."""
    kind = type(value)
    if kind in (str, int, float, bool, type(None)):
        return value
    if is_dataclass(value):
        return _written(kind)(value)
    if kind in (list, tuple):
        return [_plain(item) for item in value]
    if kind is dict:
        return {key: _plain(item) for key, item in value.items()}
    if kind is bytes:
        return base64.b64encode(value).decode()
    raise TypeError(f"a {kind.__name__} cannot be sent")


@cache
def _written(cls: type) -> Made:
    hints = get_type_hints(cls)
    parts: list[tuple[str, Any, bool]] = []
    for field in fields(cls):
        parts.append((field.name, field.default, _tagged(hints[field.name])))

    def write(value: Any) -> dict[str, Any]:
        out = {}
        for name, default, tagged in parts:
            item = getattr(value, name)
            if default is not MISSING and item is default:
                continue
            if tagged and is_dataclass(item):
                out[name] = [type(item).__name__, _plain(item)]
            else:
                out[name] = _plain(item)
        return out

    return write


@cache
def _built(cls: type) -> Made:
    hints = get_type_hints(cls)
    readers = {field.name: _reader(hints[field.name]) for field in fields(cls)}

    def build(content: dict[str, Any]) -> Any:
        return cls(**{name: readers[name](item) for name, item in content.items()})

    return build


def _tagged(hint: Any) -> bool:
    """Whether a value must say which of several dataclasses it is."""
    return (
        sum(is_dataclass(one) for one in get_args(hint)) > 1 if get_origin(hint) in (Union, types.UnionType) else False
    )


def _reader(hint: Any) -> Made:
    origin, inside = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _built(hint)
    if origin is tuple:
        return _tuple_reader(inside)
    if origin is dict:
        key, item = inside[0], _reader(inside[1])
        if key is int:
            return lambda content: {int(k): item(v) for k, v in content.items()}
        return lambda content: {k: item(v) for k, v in content.items()}
    if origin in (Union, types.UnionType):
        return _union_reader(hint, inside)
    if hint is bytes:
        return lambda content: base64.b64decode(content, validate=True)
    assert hint in (str, int, float, bool, type(None), Any) or origin is Literal, f"{hint} cannot be sent"
    return _same


def _tuple_reader(inside: tuple[Any, ...]) -> Made:
    if len(inside) == 2 and inside[1] is Ellipsis:
        item = _reader(inside[0])
        return tuple if item is _same else lambda content: tuple(map(item, content))
    readers = [_reader(one) for one in inside]
    return lambda content: tuple(read(one) for read, one in zip(readers, content, strict=True))


def _union_reader(hint: Any, inside: tuple[Any, ...]) -> Made:
    classes: dict[str, type] = {one.__name__: one for one in inside if isinstance(one, type) and is_dataclass(one)}
    if _tagged(hint):
        return lambda content: None if content is None else _built(classes[content[0]])(content[1])
    others = [one for one in inside if one is not type(None)]
    special = [one for one in others if _reader(one) is not _same]
    assert len(special) <= 1, f"{hint}: no telling which of these a value is"
    if not special:
        return _same
    read = _reader(special[0])
    return lambda content: content if content is None or isinstance(content, str | int | float) else read(content)


def _same(content: Any) -> Any:
    return content
