"""Llama 3 and Llama 4: byte BPE on tiktoken's core, with Meta's regexes, limits and special tokens.

Ids equal those of Meta's tokenizer (llama-models, models/llama3/tokenizer.py and models/llama4/tokenizer.py). The core is given
no special tokens at all, so no text can become one; `allow_special` cuts trusted text at the special names first.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from typing import Any

import tiktoken

from herd.errors import TokenizerError
from herd.tokenizer.cuts import MAX_RUN, MAX_SLICE, cut
from herd.tokenizer.special import SpecialSplitter
from herd.tokenizer.tokenizer import Family, SpecialTokens, check_text, printable

__all__ = ["REGEX", "TiktokenTokenizer"]

REGEX: dict[Family, str] = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama4": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How each family cuts text into the pieces that are merged on their own."""


class TiktokenTokenizer:
    """Tokenizer of a byte-BPE vocabulary: `ranks[i]` are the bytes of id i, special ids come after.

    Any number of ranks is served, so that small vocabularies of the same scheme work; `ranks` must hold all 256 single
    bytes and no entry twice. `visible` are added tokens whose name is text (decoded, not skipped). Raises TokenizerError
    when the ranks or the special ids do not form a vocabulary.
    """

    def __init__(
        self,
        ranks: Sequence[bytes],
        family: Family,
        special: SpecialTokens,
        *,
        template: str | None = None,
        chat_format: str | None = None,
        visible: Collection[int] = (),
    ) -> None:
        if family not in REGEX:
            raise TokenizerError(f"family {family!r} is not a byte-BPE one; use one of {', '.join(REGEX)}")
        table = set(ranks)
        if len(table) != len(ranks):
            raise TokenizerError("two ids share the same bytes")
        missing = [b for b in range(256) if bytes((b,)) not in table]
        if missing:
            raise TokenizerError(f"{len(missing)} of the 256 single bytes are missing, the first is 0x{missing[0]:02X}")
        names = {id: name for name, id in special.ids.items()}
        if names and min(names) < len(ranks):
            raise TokenizerError(f"special id {min(names)} ({names[min(names)]}) lies inside the {len(ranks)} ranks")
        self.family: Family = family
        self.special = special
        self.template = template
        self.chat_format = chat_format
        self.vocab_size = max(names, default=len(ranks) - 1) + 1
        self.ranks = ranks
        self._names = names
        self._visible = frozenset(visible)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.family}: {len(self.ranks)} ranks, {len(self._names)} special tokens>"

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is made on demand: tiktoken's encoder does not travel between processes."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_core", "_splitter")}

    @cached_property
    def _core(self) -> Any:
        """tiktoken's encoder, half of the time of opening Llama 4's vocabulary: made when the first text comes."""
        table = dict(zip(self.ranks, range(len(self.ranks)), strict=True))
        # Encoding.encode_ordinary would quietly replace lone surrogates; the core under it refuses them, as herd does.
        return tiktoken.Encoding(
            self.family, pat_str=REGEX[self.family], mergeable_ranks=table, special_tokens={}
        )._core_bpe

    @cached_property
    def _splitter(self) -> SpecialSplitter:
        return SpecialSplitter(self.special)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """Ids of `text`: see Tokenizer.encode. Trusted text that already has its BOS or EOS does not get a second one."""
        try:
            if allow_special or len(text) > MAX_RUN:
                ids = self._encode_parts(text, allow_special)
            else:
                ids = self._core.encode_ordinary(text)
        except UnicodeEncodeError:
            check_text(text)
            raise
        if bos and ids[:1] != [self.special.bos]:
            ids.insert(0, self.special.bos)
        if eos and ids[-1:] != [self.special.eos]:
            ids.append(self.special.eos)
        return ids

    def _encode_parts(self, text: str, allow_special: bool) -> list[int]:
        """Ids of a text that Meta's limits may cut, or that may hold special names."""
        parts = cut(text)
        if allow_special:
            encoded = map(self._encode_trusted, parts)
        elif len(text) > MAX_SLICE and _cores() > 1:
            encoded = _pool().map(self._core.encode_ordinary, parts)
        else:
            encoded = map(self._core.encode_ordinary, parts)
        ids = next(encoded)
        for more in encoded:
            ids += more
        return ids

    def _encode_trusted(self, text: str) -> list[int]:
        """Ids of a text whose special names count."""
        ids: list[int] = []
        for piece in self._splitter.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._core.encode_ordinary(piece)
        return ids

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, threads: int | None = None
    ) -> list[list[int]]:
        """`encode` of every text, on `threads` threads (default: one per core).

        Worth it for many texts: tiktoken's regex warms up anew in every thread.
        """
        threads = threads or _cores()
        size = max(1, min(256, len(texts) // (4 * threads)))
        chunks = [texts[i : i + size] for i in range(0, len(texts), size)]

        def encode_chunk(chunk: Sequence[str]) -> list[list[int]]:
            return [self.encode(text, bos=bos, eos=eos) for text in chunk]

        with ThreadPoolExecutor(threads) as pool:
            return [ids for chunk in pool.map(encode_chunk, chunks) for ids in chunk]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`: see Tokenizer.decode."""
        ranks, n = self.ranks, len(self.ranks)
        done: list[str] = []
        run: list[bytes] = []
        for id in ids:
            if 0 <= id < n:
                run.append(ranks[id])
            elif self.is_text(id):
                run.append(self.bytes_of(id))
            else:
                done.append(b"".join(run).decode("utf-8", "replace"))  # a special token ends a character, broken or not
                run.clear()
                if not skip_special:
                    done.append(self.piece(id))
        done.append(b"".join(run).decode("utf-8", "replace"))
        return "".join(done)

    def bytes_of(self, id: int) -> bytes:
        """Bytes of one id; empty for special tokens."""
        if 0 <= id < len(self.ranks):
            return self.ranks[id]
        return self._name(id).encode() if self.is_text(id) else b""

    def is_text(self, id: int) -> bool:
        """Whether the id adds to the text."""
        return 0 <= id < len(self.ranks) or (bool(self._name(id)) and id in self._visible)

    def piece(self, id: int) -> str:
        """Printable name of one id: a special's name, or its text with control and broken bytes escaped."""
        return printable(self.ranks[id]) if 0 <= id < len(self.ranks) else self._name(id)

    def _name(self, id: int) -> str:
        name = self._names.get(id)
        if name is None:
            raise TokenizerError(f"token id {id} is not in this vocabulary of {self.vocab_size} ids")
        return name


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads for the slices of long texts. They stay: tiktoken's regex warms up anew in every thread."""
    return ThreadPoolExecutor(_cores(), thread_name_prefix="herd-encode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
