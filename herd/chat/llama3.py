"""The prompt format of Llama 3, 3.1, 3.2 and 3.3 (text). No torch.

    <|begin_of_text|><|start_header_id|>{role}<|end_header_id|>\\n\\n{content}<|eot_id|>...
    <|start_header_id|>assistant<|end_header_id|>\\n\\n

The defaults are those of Meta's chat_format.py: content as it is, no text that nobody wrote. The HF chat templates differ in
three ways, each an option: they strip content (`strip_content`), they always open with a system message about dates
(`preamble`), and they dump tool results as JSON (`quote_results`). `Llama3Format.as_hf` sets all three.

Where Meta's chat_format.py and Meta's documents disagree, the documents win: calls of built-in tools stand behind
`<|python_tag|>` and, unless the message says otherwise, close with `<|eom_id|>`.
"""

from __future__ import annotations

from collections.abc import Sequence

from herd.chat.dialects import with_system_text
from herd.chat.format import ToolSpec
from herd.chat.headers import HeaderFormat, HeaderTokens, quoted
from herd.chat.messages import Message, ToolCall
from herd.chat.pycalls import print_dotted_call
from herd.chat.toolspec import BUILTIN_TOOLS, is_builtin
from herd.chat.writer import TokenWriter
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Llama3Format"]


class Llama3Format(HeaderFormat):
    """Llama 3 headers over one tokenizer.

    `dialect` names how functions are described and called (herd.chat.dialects): "json" for 3.1, "pythonic" for 3.2 and 3.3,
    None for Llama 3, which was trained without tools. Built-in tools (herd.chat.toolspec.BUILTIN_TOOLS) are switched on in
    the system message whatever the dialect.

    `preamble` writes `Cutting Knowledge Date` and `Today Date` lines into the system message, as the HF templates do;
    `date` is the text of today's date ("26 Jul 2024", the template's fixed default, unless given).
    """

    tokens = HeaderTokens(
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", code_start="<|python_tag|>"
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        dialect: str | None = "json",
        strip_content: bool = False,
        preamble: bool = False,
        date: str = "26 Jul 2024",
        quote_results: bool = False,
        name: str = "llama3.1",
    ) -> None:
        super().__init__(tokenizer, name=name, dialect=dialect, strip_content=strip_content)
        self.preamble = preamble
        self.date = date
        self.quote_results = quote_results

    @classmethod
    def as_hf(cls, tokenizer: Tokenizer, *, date: str = "26 Jul 2024", name: str = "llama3.1-hf") -> Llama3Format:
        """The conversation as the HF templates of 3.1, 3.2 and 3.3 write it."""
        return cls(tokenizer, strip_content=True, preamble=True, date=date, quote_results=True, name=name)

    def prepared(self, messages: tuple[Message, ...], tools: tuple[ToolSpec, ...]) -> tuple[Message, ...]:
        """The conversation with the tools described in it, and the lines that switch built-in tools on."""
        builtin = [tool for tool in tools if self.dialect is not None and is_builtin(tool)]
        messages = super().prepared(messages, tuple(tool for tool in tools if tool not in builtin))
        listed = [tool.name for tool in builtin if tool.name != "code_interpreter"]
        lines = ["Environment: ipython"] if builtin or (tools and self.preamble) else []
        if listed or (builtin and self.preamble):  # the HF template writes the word even when no name follows
            lines.append(f"Tools: {', '.join(listed)}")
        if self.preamble:
            # The HF template leaves a blank line behind the tools; without them the lines follow each other.
            dates = f"Cutting Knowledge Date: December 2023\nToday Date: {self.date}"
            head = "\n".join(lines) + ("\n\n" if builtin else "\n" if lines else "")
            messages = with_system_text(messages, f"{head}{dates}\n\n", "")
        elif lines:
            messages = with_system_text(messages, "\n".join(lines), "\n\n")
        if not self.quote_results:
            return messages
        return tuple(quoted(message) if message.role == "tool" else message for message in messages)

    def is_builtin_call(self, call: ToolCall, tools: Sequence[ToolSpec]) -> bool:
        """`brave_search` and `wolfram_alpha` with a query, unless the conversation has its own tool of that name."""
        if call.name not in BUILTIN_TOOLS or set(call.arguments) != {"query"}:
            return False
        return all(is_builtin(tool) for tool in tools if tool.name == call.name)

    def waits(self, message: Message, tools: Sequence[ToolSpec]) -> bool:
        """In an `ipython` environment (built-in tools) calls close with `<|eom_id|>`; elsewhere with `<|eot_id|>`."""
        if not message.tool_calls:
            return False
        return any(is_builtin(tool) for tool in tools) or any(
            call.name == "code_interpreter" or self.is_builtin_call(call, tools) for call in message.tool_calls
        )

    def _write_builtin(self, writer: TokenWriter, calls: Sequence[ToolCall]) -> None:
        if self._code_start is None:
            raise PromptError(f"{self.name}: this tokenizer has no {self.tokens.code_start}, which built-in tools need")
        writer.special(self._code_start, learn=True)
        writer.text("\n".join(print_dotted_call(call) for call in calls), learn=True)
