"""Messages between processes: every one comes back as it was, and nothing else comes out of hostile frames."""

from __future__ import annotations

import json

import pytest

from herd.server.protocol import (
    DOWN,
    UP,
    Began,
    Call,
    Chat,
    Ended,
    Failed,
    Ids,
    Load,
    Piece,
    Text,
    TokenInfo,
    ToolPiece,
    Truncated,
)
from herd.server.wire import frame, split_header

TOOL = {"type": "function", "$": "Call", "function": {"name": "f", "parameters": {"$defs": {"x": {"type": "object"}}}}}
MESSAGES_DOWN = [
    Load("nano", {"max_len": 7, "seed": None}, (("a", "b"),)),
    Call("1", Chat(({"role": "user", "content": "Hi 😀"},), (TOOL,), tool_choice="named", tool_name="f")),
    Call("2", Text("a", "b"), {"stop": ["x"], "logit_bias": {"3": -1.5}}, adapter="lora", echo=True),
    Call("3", Ids((1, 2, 3))),
]
MESSAGES_UP = [
    Began("1", 5, ("note",), Truncated(1, 2), "text"),
    Piece(
        "1", 1, "é", ToolPiece(0, "id", "f", "{}"), (TokenInfo(3, "\ufffd", b"\xc3", -0.5, ((4, "a", b"a", -1.0),)),)
    ),
    Ended("1", 0, "length", "context_full", 3),
    Failed("1", "ContextFullError", "too long", {"needed": 3, "available": 2}),
]


@pytest.mark.parametrize(("codec", "messages"), [(DOWN, MESSAGES_DOWN), (UP, MESSAGES_UP)])
def test_messages_come_back(codec: object, messages: list[object]) -> None:
    data = codec.encode(messages)  # type: ignore[attr-defined]
    assert codec.decode(data) == messages  # type: ignore[attr-defined]
    assert data.isascii(), "a frame can be logged"


def test_data_never_becomes_a_message() -> None:
    """A tool schema that looks like a message stays a dictionary."""
    (call,) = DOWN.decode(DOWN.encode([Call("1", Chat(({"role": ["Call", {}]},), (["Call", {"id": "x"}],)))]))
    assert call.prompt.messages == ({"role": ["Call", {}]},)
    assert call.prompt.tools == (["Call", {"id": "x"}],)


@pytest.mark.parametrize(
    "frame_content",
    [
        b"{}1",
        b"[[]]",
        b'[["Popen", {}]]',
        b'[["Call", {"id": "1", "prompt": ["Load", {}]}]]',
        b'[["Call", {"no": 1}]]',
        b"nan",
        b"\xff",
    ],
)
def test_hostile_frames_are_refused(frame_content: bytes) -> None:
    with pytest.raises(ValueError):
        DOWN.decode(frame_content)


def test_lengths_are_bounded() -> None:
    with pytest.raises(ValueError):
        split_header(b"\xff\xff\xff\xff")
    assert split_header(frame(json.dumps([1]).encode())[:4]) == 3
