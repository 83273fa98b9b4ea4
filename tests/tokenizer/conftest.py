"""Vocabularies for the tokenizer tests: the real ones, and tiny ones made on the spot.

Llama 3 and 4 come with the llama-models package. Llama 2's file lies in the shared folder (HERD_SHARED, or ../shared beside the
checkout); tests that need it skip without it, and a small SentencePiece model (tests/vocabularies.py) stands in for the rules.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.pieces import PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import llama3_names, llama4_names
from herd.tokenizer.tiktoken import REGEX, TiktokenTokenizer
from tests import vocabularies

BYTE_FAMILIES = ("llama3", "llama4")


def meta_module(family: str) -> Any:
    """Meta's tokenizer module of the family."""
    return importlib.import_module(f"llama_models.{family}.tokenizer")


@cache
def model_path(family: str) -> Path:
    """Meta's tokenizer.model of Llama 3 or 4, from the llama-models package."""
    return Path(meta_module(family).__file__).parent / "tokenizer.model"


@cache
def opened(family: str) -> TiktokenTokenizer:
    """herd's tokenizer of Llama 3 or 4, opened once. Tests must not change it."""
    tokenizer = load_tokenizer(model_path(family))
    assert isinstance(tokenizer, TiktokenTokenizer)
    return tokenizer


@cache
def meta(family: str) -> Any:
    """Meta's own tokenizer of Llama 3 or 4."""
    return meta_module(family).Tokenizer.get_instance()


@pytest.fixture(scope="session", params=BYTE_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the two byte-BPE families in turn."""
    return request.param


@pytest.fixture(scope="session")
def llama2_path() -> Path:
    """Llama 2's tokenizer.model; skips without the shared folder."""
    return vocabularies.llama2_path()


@pytest.fixture(scope="session")
def llama2(llama2_path: Path) -> SentencePieceTokenizer:
    """herd's tokenizer of Llama 2."""
    tokenizer = load_tokenizer(llama2_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_pieces() -> bytes:
    """The file of the small SentencePiece model with Llama's settings."""
    return vocabularies.trained_pieces()


@pytest.fixture(scope="session")
def tiny_sp(tiny_pieces: bytes) -> SentencePieceTokenizer:
    """The small SentencePiece model, opened."""
    return SentencePieceTokenizer(PieceModel.parse(tiny_pieces))


@pytest.fixture(scope="session")
def infill_sp(tiny_pieces: bytes) -> SentencePieceTokenizer:
    """The small model with Code Llama's sixteen extra pieces, as its file has them: ordinary pieces that text could reach."""
    return SentencePieceTokenizer(with_infill_pieces(PieceModel.parse(tiny_pieces)))


def with_infill_pieces(model: PieceModel) -> PieceModel:
    """`model` with the pieces that Code Llama adds behind Llama 2's, and `<step>` of the 70B files."""
    steps = ["▁<", "▁<P", "▁<PR", "▁<S", "▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MI", "▁<MID", "▁<E", "▁<EO", "▁<EOT"]
    extra = [*steps, "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "▁<EOT><EOT>", "<step>"]
    extra = [piece for piece in extra if piece not in set(model.pieces)]
    n = len(extra)
    low = min(model.scores)
    return PieceModel(
        pieces=[*model.pieces, *extra],
        scores=[*model.scores, *(low - 1 - i for i in range(n))],
        types=[*model.types, *([1] * n)],
    )


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`hf_folder("llama3")`: a folder as transformers' converter writes it (tokenizer.json, tokenizer_config.json)."""

    @cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(f"hf-{family}")
        converter = importlib.import_module("transformers.convert_slow_tokenizer").TikTokenConverter
        names = list(llama3_names()) if family == "llama3" else list(llama4_names()[:1135])
        path = str(model_path(family))
        made = converter(vocab_file=path, pattern=REGEX[family], extra_special_tokens=names).converted()
        made.save(str(folder / "tokenizer.json"))
        config = {"bos_token": names[0], "eos_token": names[1]}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make
