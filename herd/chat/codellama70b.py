"""The prompt format of Code Llama 70B Instruct. No torch.

    BOS  { " Source: {role}"  "\\n\\n {content}"  <step> } ...  " Source: assistant\\nDestination: user"  "\\n\\n "

Every quoted text is encoded on its own (so each begins with SentencePiece's dummy space), the content is stripped, and an
empty system message is put in front when there is none (meta-llama/codellama llama/generation.py). Only the header of the reply
to be written names a destination; headers of past messages do not, as in the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

from herd.chat.format import Rendered, ToolSpec
from herd.chat.messages import Message
from herd.chat.reply import ReplyParser, Stops
from herd.chat.turns import check_turns, shared_prefix
from herd.chat.writer import TokenWriter, special_id
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["CodeLlama70BFormat"]


class CodeLlama70BFormat:
    """Source/Destination headers and `<step>` over one tokenizer; PromptError when the vocabulary has no `<step>`."""

    name = "codellama-70b"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._step = special_id(tokenizer, "<step>", self.name)
        self.stop_ids = frozenset({self._step, tokenizer.special.eos, *tokenizer.special.stop})

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, generate: bool = True) -> Rendered:
        """Ids and loss mask; `generate` opens the assistant's reply. Raises PromptError for tools, images, and turns that
        do not alternate."""
        turns = check_turns(messages, tools, self.name, generate=generate)
        system = messages[0] if messages[0].role == "system" else Message("system")
        writer = TokenWriter(self.tokenizer)
        writer.special(self.tokenizer.special.bos)
        for message in (system, *turns):
            writer.text(f" Source: {message.role}")
            self._write_content(writer, message)
            learned = message.role == "assistant" and message.stop_reason != "out_of_tokens"
            writer.special(self._step, learn=learned)
        if generate:
            writer.text(" Source: assistant\nDestination: user")
            writer.text("\n\n ")
        return writer.rendered()

    def parser(self, tools: Sequence[ToolSpec] | None = ()) -> ReplyParser:
        """A parser for one reply; white space around the reply belongs to the format. There are no tool calls."""
        return ReplyParser(self.tokenizer, Stops(turn=self.stop_ids), strip=True)

    def _write_content(self, writer: TokenWriter, message: Message) -> None:
        content = message.text.strip()
        if not content:
            return
        ids = self.tokenizer.encode(f"\n\n {content}")
        if message.role != "assistant":
            writer.ids(ids)
            return
        known = shared_prefix(ids, self.tokenizer.encode("\n\n "))  # the newlines are the format's, not the assistant's
        writer.ids(ids[:known])
        writer.ids(ids[known:], learn=True)
