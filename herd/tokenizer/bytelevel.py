"""The byte-level alphabet of GPT-2: how `tokenizer.json` and GGUF write token bytes as printable characters.

Bytes that are printable in Latin-1 stand for themselves, the other 68 become U+0100 and up in order (openai/gpt-2, encoder.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from herd.errors import TokenizerError

__all__ = ["from_alphabet", "to_alphabet"]

_PLAIN = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_SHIFTED = {chr(byte): chr(0x100 + i) for i, byte in enumerate(b for b in range(256) if b not in _PLAIN)}
_ALPHABET = {*map(chr, _PLAIN), *_SHIFTED.values()}
_SEPARATOR = "\uffff"  # outside the alphabet: thousands of tokens are translated as one string


def to_alphabet(tokens: Iterable[bytes]) -> list[str]:
    """Byte-level spelling of each token."""
    text = _SEPARATOR.join([token.decode("latin-1") for token in tokens])
    for byte, shown in _SHIFTED.items():
        text = text.replace(byte, shown)
    return text.split(_SEPARATOR)


def from_alphabet(names: Sequence[str]) -> list[bytes]:
    """Bytes of each byte-level name. Raises TokenizerError for a name with characters outside the alphabet."""
    text = _SEPARATOR.join(names)
    if not _ALPHABET.issuperset(set(text) - {_SEPARATOR}) or text.count(_SEPARATOR) != max(0, len(names) - 1):
        broken = next(name for name in names if not _ALPHABET.issuperset(name))
        raise TokenizerError(f"token {broken!r} is not written in the byte-level alphabet")
    for byte, shown in _SHIFTED.items():
        text = text.replace(shown, byte)
    return [name.encode("latin-1") for name in text.split(_SEPARATOR)]
