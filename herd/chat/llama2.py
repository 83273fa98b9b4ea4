"""The prompt formats of Llama 2 Chat and of Code Llama Instruct 7B, 13B and 34B. No torch.

    BOS "[INST] {user} [/INST] {assistant} " EOS   for every finished pair, encoded on its own
    BOS "[INST] {user} [/INST]"                    for the user turn to answer

System text stands inside the first user text: `<<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user}`. Texts are stripped. The tags are
ordinary text, so a conversation that contains one could forge a turn: it is refused, as the reference refuses it
(meta-llama/llama llama/generation.py, meta-llama/codellama llama/generation.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from herd.chat.format import Rendered, ToolSpec
from herd.chat.messages import Message
from herd.chat.reply import ReplyParser, Stops
from herd.chat.turns import check_turns, shared_prefix
from herd.chat.writer import TokenWriter
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Llama2Format"]

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
CODE_TAGS = (*TAGS, "<step>")


class Llama2Format:
    """Llama 2 chat over one tokenizer; `code` is Code Llama Instruct, which refuses one more tag."""

    def __init__(self, tokenizer: Tokenizer, *, code: bool = False) -> None:
        self.name = "codellama" if code else "llama2"
        self.tokenizer = tokenizer
        self.stop_ids = frozenset({tokenizer.special.eos, *tokenizer.special.stop})
        self._tags = CODE_TAGS if code else TAGS

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, generate: bool = True) -> Rendered:
        """Ids and loss mask. The reply position needs no header, so `generate` only demands that a user speaks last.

        Raises PromptError for tools, images, turns that do not alternate, and texts with a tag of the format.
        """
        turns = check_turns(messages, tools, self.name, generate=generate)
        for i, message in enumerate(messages):
            if tag := next((tag for tag in self._tags if tag in message.text), None):
                raise PromptError(
                    f"message {i} ({message.role}) holds {tag}, a tag of the {self.name} prompt format: remove or reword it"
                )
        system = messages[0].text if messages[0].role == "system" else None
        writer = TokenWriter(self.tokenizer)
        special = self.tokenizer.special
        for i in range(0, len(turns), 2):
            user = turns[i].text
            if i == 0 and system is not None:
                user = f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}"
            prompt = f"[INST] {user.strip()} [/INST]"
            writer.special(special.bos)
            if i + 1 == len(turns):
                writer.text(prompt)
                break
            answer = turns[i + 1]
            ids = self.tokenizer.encode(f"{prompt} {answer.text.strip()} ")
            known = shared_prefix(ids, self.tokenizer.encode(prompt))
            writer.ids(ids[:known])
            writer.ids(ids[known:], learn=True)
            writer.special(special.eos, learn=answer.stop_reason != "out_of_tokens")
        return writer.rendered()

    def parser(self, tools: Sequence[ToolSpec] | None = ()) -> ReplyParser:
        """A parser for one reply; white space around the reply belongs to the format. There are no tool calls."""
        return ReplyParser(self.tokenizer, Stops(turn=self.stop_ids), strip=True)
