"""Fill in the middle with Code Llama: a prefix and a suffix in, the text between them out. No torch.

    PSM   BOS PRE enc(prefix) SUF enc_infill(suffix) MID             the default
    SPM   BOS PRE SUF enc_infill(suffix) MID enc(prefix)

`enc_infill` encodes without SentencePiece's dummy space; the middle is decoded the same way (meta-llama/codellama
llama/generation.py). The model goes on with the middle and ends it with EOT. In SPM the model was trained with prefix and
middle encoded as one text, so a prefix cut inside a word works worse there.

The 34B and the 7B/13B Python vocabularies have no such pieces; neither has any other Llama.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

from herd.chat.format import Rendered
from herd.chat.reply import ReplyParser, Stops
from herd.chat.writer import TokenWriter
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Infill", "InfillOrder"]

InfillOrder = Literal["psm", "spm"]


@runtime_checkable
class _InfillTokenizer(Tokenizer, Protocol):
    def encode_infilling(self, text: str) -> list[int]: ...
    def decode_infilling(self, ids: Sequence[int]) -> str: ...


class Infill:
    """Prompts for the middle and their answers, over one tokenizer; PromptError when it has no infill pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = [tokenizer.special.get(name) for name in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")]
        if not isinstance(tokenizer, _InfillTokenizer) or None in ids:
            raise PromptError(
                "this vocabulary has no fill-in-the-middle pieces: use Code Llama 7B, 13B or 70B (base), or Instruct 7B or 13B"
            )
        self._tokenizer: _InfillTokenizer = tokenizer
        self._pre, self._suf, self._mid, self._eot = (id for id in ids if id is not None)
        self.stop_ids = frozenset({self._eot, tokenizer.special.eos})

    def prompt(self, prefix: str, suffix: str, order: InfillOrder = "psm") -> Rendered:
        """Ids after which the model writes the middle. Nothing in them is to be learned."""
        if order not in get_args(InfillOrder):
            raise PromptError(f"there is no infill order {order!r}; choose psm or spm")
        writer = TokenWriter(self._tokenizer)
        writer.special(self._tokenizer.special.bos)
        writer.special(self._pre)
        if order == "psm":
            writer.text(prefix)
        writer.special(self._suf)
        writer.ids(self._tokenizer.encode_infilling(suffix))
        writer.special(self._mid)
        if order == "spm":
            writer.text(prefix)
        return writer.rendered()

    def parser(self) -> ReplyParser:
        """A parser that passes the middle on as it is written; its stop reason is end_of_turn at EOT."""
        return ReplyParser(self._tokenizer, Stops(turn=self.stop_ids), follows_text=True)

    def middle(self, ids: Sequence[int]) -> str:
        """The text of generated ids, up to the first stop id."""
        end = next((i for i, id in enumerate(ids) if id in self.stop_ids), len(ids))
        return self._tokenizer.decode_infilling(ids[:end])
