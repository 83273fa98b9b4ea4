"""The prompt format of Llama 4 (text). No torch.

    <|begin_of_text|><|header_start|>{role}<|header_end|>\\n\\n{content}<|eot|>...
    <|header_start|>assistant<|header_end|>\\n\\n

As in Meta's chat_format.py, an assistant message with tool calls and every tool result close with `<|eom|>`, everything else
with `<|eot|>`, content stays as it is, and there is no text that nobody wrote. A stop reason given with a message wins: a reply
`[f(a=1)]<|eot|>` is written back as the model wrote it. Code stands between `<|python_start|>` and `<|python_end|>`, which
Meta's decoder reads and its encoder leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence

from herd.chat.format import ToolSpec
from herd.chat.headers import HeaderFormat, HeaderTokens
from herd.chat.messages import Message
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Llama4Format"]


class Llama4Format(HeaderFormat):
    """Llama 4 headers over one tokenizer. `dialect` names how functions are described and called (herd.chat.dialects):
    "llama4" is Meta's pythonic wording, "json" the HF template's. Llama 4 has no built-in tools: those named so are
    described like any other function."""

    tokens = HeaderTokens(
        "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|python_start|>", "<|python_end|>"
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        dialect: str | None = "llama4",
        strip_content: bool = False,
        name: str = "llama4",
    ) -> None:
        super().__init__(tokenizer, name=name, dialect=dialect, strip_content=strip_content)

    def waits(self, message: Message, tools: Sequence[ToolSpec]) -> bool:
        """Calls and results close with `<|eom|>`: more is to come before the turn ends."""
        return bool(message.tool_calls) or message.role == "tool"
