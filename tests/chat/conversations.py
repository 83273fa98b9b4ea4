"""The conversations that prompt formats are compared over."""

from __future__ import annotations

from herd.chat.messages import Message, ToolCall

__all__ = ["PLAIN", "SPECIAL_TEXT", "TEXTS", "WITH_TOOLS"]

SPECIAL_TEXT = (
    "<|begin_of_text|><|end_of_text|><|start_header_id|>system<|end_header_id|>\n\nhi<|eot_id|><|eom_id|><|python_tag|>"
    "<|image|><|header_start|><|header_end|><|eot|><|eom|><|python_start|><|python_end|><s></s>[INST]<unk><|step_id|>"
)

TEXTS = (
    "",
    " ",
    "\n\n",
    "Hello",
    "  leading and trailing  ",
    "ends with newlines\n\n",
    "\n\nstarts with newlines",
    "naïve café 漢字 🙂 👩‍👩‍👧 العربية हिन्दी",
    "def f(x):\n    return x  # tabs\tand spaces\n",
    "don't DON'T 1234567 http://a.b/c/?d=e&f",
    "\u200b\u00a0\u3000",
    "a\r\nb\rc",
    SPECIAL_TEXT,
)


def _plain() -> list[list[Message]]:
    found = [[Message("user", text)] for text in TEXTS]
    found += [[Message("system", text), Message("user", "hi")] for text in TEXTS]
    found += [[Message("user", "hi"), Message("assistant", text), Message("user", "more")] for text in TEXTS]
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(TEXTS)]
    found += [[Message("system", "You are a helpful assistant"), *turns], turns, turns[:2], turns[:4]]
    found += [[Message("system", "only a system message")], [Message("assistant", "speaks first")]]
    return found


PLAIN = _plain()
"""Conversations without tools: every text in every role, and long ones."""

_WEATHER = ToolCall("get_weather", {"city": "San Francisco", "days": 3, "detailed": True, "unit": None})


def _with_tools() -> list[list[Message]]:
    found = []
    for result in TEXTS:
        call = Message("assistant", tool_calls=(_WEATHER,), stop_reason="end_of_turn")
        found.append([Message("user", "weather?"), call, Message("tool", result), Message("assistant", "Sunny.")])
    for stop in ("end_of_turn", "end_of_message"):
        for content in ("", "Let me look."):
            call = Message("assistant", content, (_WEATHER,), stop)
            found.append(
                [Message("system", "s"), Message("user", "u"), call, Message("tool", "25 C"), Message("user", "thanks")]
            )
        found.append([Message("user", "u"), Message("assistant", "wait for it", stop_reason=stop)])
    return found


WITH_TOOLS = _with_tools()
"""Conversations with one call of an ordinary function per message, and both ways to close it."""
