"""What a vocabulary and a prompt format do, as short texts: equal ones make equal tokens of equal rows. No torch.

Both are taken from behaviour, not from file names: the bytes of every id and the ids of hard texts, and what the format makes
of conversations with and without system message, tools and several turns (options such as a date are in there too).
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256

from herd.chat.format import ChatFormat, ToolSpec
from herd.chat.messages import Message, ToolCall
from herd.errors import HerdError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["format_fingerprint", "tokenizer_fingerprint"]

TEXTS = (
    "The quick brown fox didn't jump over 12345 lazy dogs;  it\tslept.\n\n  def f(x):\n\treturn x ** 2  # done\r\n",
    "Füße, naïve café, ΑΒΓ, Привет, 你好世界, こんにちは, สวัสดี, नमस्ते, مرحبا, 👩‍👩‍👧 \u00a0\u2028 ﬁ Å",
    "<|begin_of_text|> [INST] <s> </s> <|eot|> \ufeff \u200b",
)

_TOOL = ToolSpec("look", "Looks something up.", {"type": "object", "properties": {"what": {"type": "string"}}})
_CONVERSATIONS = (
    ((Message("user", " Hi \n"), Message("assistant", " Hello. ")), ()),
    ((Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes"), Message("user", "So?"),
      Message("assistant", "No")), ()),
    ((Message("user", "Look"), Message("assistant", "", (ToolCall("look", {"what": "é", "n": 1}, "c1"),)),
      Message("tool", '{"found": 3}', name="look", tool_call_id="c1"), Message("assistant", "Three.")), (_TOOL,)),
)  # fmt: skip


@cache
def _memory() -> dict[int, tuple[Tokenizer, str]]:
    return {}


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """16 letters for a vocabulary: its family, the bytes of its ids, its special ids, and the ids of hard texts."""
    kept = _memory().get(id(tokenizer))
    if kept is not None and kept[0] is tokenizer:
        return kept[1]
    digest = sha256()
    special = tokenizer.special
    digest.update(repr((tokenizer.family, tokenizer.vocab_size, special.bos, special.eos)).encode())
    digest.update(repr(sorted(special.ids.items())).encode())
    for number in range(tokenizer.vocab_size):
        try:
            piece = tokenizer.bytes_of(number)
        except HerdError:  # a hole in the numbering
            piece = b""
        digest.update(len(piece).to_bytes(2, "little") + piece)
    for text in TEXTS:
        digest.update(repr(tokenizer.encode(text)).encode())
    found = digest.hexdigest()[:16]
    _memory()[id(tokenizer)] = (tokenizer, found)
    return found


def format_fingerprint(format: ChatFormat | None) -> str:
    """The name of a format and 16 letters for what it renders; "none" without one."""
    if format is None:
        return "none"
    digest = sha256()
    for messages, tools in _CONVERSATIONS:
        try:
            rendered = format.render(messages, tools, generate=False)
            digest.update(repr((rendered.tokens, rendered.loss_mask)).encode())
        except HerdError as error:  # not every format has tools: that, too, is what it does
            digest.update(str(error).encode())
    return f"{format.name}-{digest.hexdigest()[:16]}"
