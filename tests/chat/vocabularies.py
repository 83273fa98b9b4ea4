"""The vocabularies these tests run on: Llama 3 and 4 out of the llama-models package, Llama 2 from the shared folder."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import pytest

from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.tokenizer import Tokenizer
from tests.conftest import SHARED

__all__ = ["llama2", "llama3", "llama4", "meta3", "meta4", "piece_processor"]


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


def _llama2_path() -> str:
    path = SHARED / "data" / "tokenizers" / "llama2.tokenizer.model"
    if not path.exists():
        pytest.skip("the Llama 2 vocabulary is not beside this checkout (looked in ../shared/data/tokenizers)")
    return str(path)


@cache
def _llama2(path: str) -> Tokenizer:
    return load_tokenizer(path)


def llama2() -> Tokenizer:
    """Llama 2's vocabulary in herd's tokenizer; skips without the shared folder."""
    return _llama2(_llama2_path())


def piece_processor() -> Any:
    """The sentencepiece library itself on Llama 2's vocabulary."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=_llama2_path())
