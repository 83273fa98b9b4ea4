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
from herd.server.wire import HEADER, frame, split_header

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


def test_many_messages_become_several_frames_and_one_too_large_is_replaced() -> None:
    """What comes out holds every message once, in order, in frames that the other side takes."""
    small = [Piece("1", text="x" * 300) for _ in range(40)]
    large = Piece("2", text="y" * 5000)
    found = list(
        UP.frames([*small[:20], large, *small[20:]], lambda message, size: Failed(message.call, "E", str(size > 5000)),
                  together=1000, most=2000)
    )  # fmt: skip
    told = [UP.decode(one[HEADER:]) for one in found]
    assert [message for messages in told for message in messages] == [
        *small[:20],
        Failed("2", "E", "True"),
        *small[20:],
    ]
    assert all(split_header(one[:HEADER]) == len(one) - HEADER <= 1000 for one in found)
    assert len(found) < 30, "messages share frames"
    alone = list(
        UP.frames([small[0], Piece("3", text="z" * 1500), small[1]], lambda *_: None, together=1000, most=2000)
    )
    assert [len(UP.decode(one[HEADER:])) for one in alone] == [1, 1, 1]


def test_no_frame_is_made_of_what_cannot_be_replaced() -> None:
    """A replacement that is too large as well is a bug, and does not loop."""
    with pytest.raises(ValueError, match="more than a frame"):
        list(UP.frames([Piece("1", text="x" * 99)], lambda message, _: message, most=50))


def test_lengths_are_bounded() -> None:
    with pytest.raises(ValueError):
        split_header(b"\xff\xff\xff\xff")
    assert split_header(frame(json.dumps([1]).encode())[:4]) == 3
