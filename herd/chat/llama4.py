"""The prompt format of Llama 4 (text). No torch.

    <|begin_of_text|><|header_start|>{role}<|header_end|>\\n\\n{content}<|eot|>...
    <|header_start|>assistant<|header_end|>\\n\\n

As in Meta's chat_format.py, an assistant message with tool calls and every tool result close with `<|eom|>`, everything else
with `<|eot|>`, content stays as it is, and there is no text that nobody wrote. A stop reason given with a message wins: a reply
`[f(a=1)]<|eot|>` is written back as the model wrote it. Code stands between `<|python_start|>` and `<|python_end|>`, which
Meta's decoder reads and its encoder leaves out.

The HF chat template (`Llama4Format.as_hf`) differs: everything closes with `<|eot|>`, calls are JSON behind the content in
`<|python_start|>{content}<|python_end|>`, results are dumped as JSON, the system text is stripped and says
`Environment: ipython` when there are tools.
"""

from __future__ import annotations

from collections.abc import Sequence

from herd.chat.dialects import with_system_text
from herd.chat.format import ToolSpec
from herd.chat.headers import HeaderFormat, HeaderTokens, quoted
from herd.chat.messages import Message
from herd.chat.writer import TokenWriter, special_id
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Llama4Format"]


class Llama4Format(HeaderFormat):
    """Llama 4 headers over one tokenizer. `dialect` names how functions are described and called (herd.chat.dialects):
    "llama4" is Meta's pythonic wording, "json" the HF template's. Llama 4 has no built-in tools: those named so are
    described like any other function. `template` writes as the HF chat template does."""

    tokens = HeaderTokens(
        "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|python_start|>", "<|python_end|>"
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        dialect: str | None = "llama4",
        strip_content: bool = False,
        template: bool = False,
        name: str = "llama4",
    ) -> None:
        super().__init__(tokenizer, name=name, dialect=dialect, strip_content=strip_content)
        self.template = template
        if template:
            for marker in ("<|python_start|>", "<|python_end|>"):
                special_id(tokenizer, marker, name)

    @classmethod
    def as_hf(cls, tokenizer: Tokenizer, *, name: str = "llama4-hf") -> Llama4Format:
        """The conversation as the HF template writes it."""
        return cls(tokenizer, dialect="json", template=True, name=name)

    def prepared(self, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...]) -> tuple[Message, ...]:
        """The conversation with the tools described in it."""
        if not self.template:
            return super().prepared(messages, tools)
        first = 0
        if messages[0].role == "system":
            messages, first = (self._stripped(messages[0]), *messages[1:]), 1
            if tools:
                messages = with_system_text(messages, "Environment: ipython\n", "")
        if tools and len(messages) > first:
            messages = (*messages[:first], self._stripped(messages[first]), *messages[first + 1 :])
        placed = super().prepared(messages, tools)
        return tuple(quoted(message) if message.role == "tool" else message for message in placed)

    def waits(self, message: Message, tools: Sequence[ToolSpec]) -> bool:
        """Calls and results close with `<|eom|>`: more is to come before the turn ends. The HF template never does."""
        return not self.template and (bool(message.tool_calls) or message.role == "tool")

    def _write_body(self, writer: TokenWriter, message: Message, tools: tuple[ToolSpec, ...]) -> None:
        if not self.template or not message.tool_calls or self.dialect is None:
            super()._write_body(writer, message, tools)
            return
        assert self._code_start is not None
        assert self._code_end is not None
        writer.special(self._code_start, learn=True)
        self._write_content(writer, message)
        writer.special(self._code_end, learn=True)
        writer.text("".join(self.dialect.print([call]) for call in message.tool_calls), learn=True)
