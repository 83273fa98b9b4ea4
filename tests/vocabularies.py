"""Vocabularies that tests run on: Llama 3 and 4 out of the llama-models package, Llama 2 from the shared folder, and a small
SentencePiece model trained on the spot, which every checkout has."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import sentencepiece

from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.pieces import PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from tests.conftest import shared_path
from tests.tokenizer import texts

__all__ = ["Pieces", "llama2_path", "llama3", "llama4", "meta3", "meta4", "pieces_of", "trained_pieces"]


@cache
def llama3() -> Tokenizer:
    """Llama 3's vocabulary in herd's tokenizer."""
    return load_tokenizer(str(files("llama_models") / "llama3" / "tokenizer.model"))


@cache
def llama4() -> Tokenizer:
    """Llama 4's vocabulary in herd's tokenizer."""
    return load_tokenizer(str(files("llama_models") / "llama4" / "tokenizer.model"))


@cache
def meta3() -> Any:
    """Meta's own Llama 3 tokenizer."""
    from llama_models.llama3.tokenizer import Tokenizer as Reference

    return Reference.get_instance()


@cache
def meta4() -> Any:
    """Meta's own Llama 4 tokenizer."""
    from llama_models.llama4.tokenizer import Tokenizer as Reference

    return Reference.get_instance()


def llama2_path() -> Path:
    """Llama 2's tokenizer.model; skips without the shared folder."""
    return shared_path("data/tokenizers/llama2.tokenizer.model")


@cache
def trained_pieces() -> bytes:
    """The file of a small SentencePiece model with Llama's settings, trained on the tokenizer tests' texts."""
    out = io.BytesIO()
    words = texts.MULTILINGUAL + texts.CODE + [f"{a} {b}" for a in texts.CODE for b in texts.MULTILINGUAL]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=out,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return out.getvalue()


@dataclass(frozen=True)
class Pieces:
    """One SentencePiece vocabulary: herd's tokenizer, and the sentencepiece library itself."""

    tokenizer: SentencePieceTokenizer
    library: Any

    def with_added(self, *extra: str) -> SentencePieceTokenizer:
        """herd's tokenizer with pieces added behind the vocabulary, as Code Llama has them."""
        added = [(piece, i) for i, piece in enumerate(extra, self.tokenizer.vocab_size)]
        return SentencePieceTokenizer(self.tokenizer.model.with_added(added))


@cache
def pieces_of(data: bytes) -> Pieces:
    """The vocabulary in the bytes of a tokenizer.model."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    return Pieces(SentencePieceTokenizer(PieceModel.parse(data)), processor)
