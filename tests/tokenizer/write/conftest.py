"""The vocabularies that are written, each in every form, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from herd.errors import TokenizerError
from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.gguf import tokenizer_from_gguf
from herd.tokenizer.pieces import NORMAL, PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import llama3_names
from herd.tokenizer.tiktoken import TiktokenTokenizer
from herd.tokenizer.write import gguf_fields, hf_files, meta_file
from tests import vocabularies
from tests.tokenizer import texts

NANO = Path(__file__).parents[3] / "herd" / "embedded" / "nano"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}é"
MANY = texts.ALL + texts.generate(2_000, seed=31)
SMALL = ("tiny", "tiny-infill", "tiny-no-prefix", "tiny-added", "nano", "renamed")
LARGE = ("llama2", "codellama", "llama3", "llama3.2-vision", "llama4")
SOME = ("llama2", "codellama", "llama3", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE[3:]))
"""The large ones; those that take seconds each behind the slow marker."""


def _tiny() -> PieceModel:
    return PieceModel.parse(vocabularies.trained_pieces())


def _tiny_infill() -> PieceModel:
    """With Code Llama's extra pieces, of the normal type as its file has them."""
    model, more = _tiny(), ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>"]
    return PieceModel(
        pieces=[*model.pieces, *more],
        scores=[*model.scores, *[-1e9] * len(more)],
        types=[*model.types, *[NORMAL] * len(more)],
    )


def _renamed() -> TiktokenTokenizer:
    """herd-nano's ranks with the names that a fine-tune gave to two of its reserved ids, and a token that is text."""
    nano = load_tokenizer(NANO)
    assert isinstance(nano, TiktokenTokenizer)
    names = list(nano.special.ids)
    ids = {"<|im_start|>" if i == 11 else name: 4064 + i for i, name in enumerate(names)} | {"<tool>": 4096}
    special = replace(nano.special, ids=ids)
    return TiktokenTokenizer(nano.ranks, "llama3", special, visible=[4096], chat_format="llama3")


def _vision() -> TiktokenTokenizer:
    """Llama 3.2 Vision lists `<|image|>` a second time, behind the 256 special ids."""
    tokenizer = vocabularies.llama3()
    assert isinstance(tokenizer, TiktokenTokenizer)
    special = replace(tokenizer.special, ids={**tokenizer.special.ids, "<|image|>#128256": 128256})
    return TiktokenTokenizer(tokenizer.ranks, "llama3", special)


def _codellama() -> SentencePieceTokenizer:
    """Llama 2's pieces with sixteen more behind them, as the 32,016-row models have."""
    model = PieceModel.parse(vocabularies.llama2_path().read_bytes())
    more = ["▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT"]
    more += ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "▁<EOT><EOT>", "[a]", "[b]", "[c]", "<step>"]
    return SentencePieceTokenizer(
        PieceModel(pieces=[*model.pieces, *more], scores=[*model.scores, *[-1e9] * 16], types=[*model.types, *[1] * 16])
    )


_MADE: dict[str, Callable[[], Any]] = {
    "tiny": lambda: SentencePieceTokenizer(_tiny()),
    "tiny-infill": lambda: SentencePieceTokenizer(_tiny_infill(), chat_format="codellama70b"),
    "tiny-no-prefix": lambda: SentencePieceTokenizer(replace(_tiny(), dummy_prefix=False, source=None)),
    "tiny-added": lambda: SentencePieceTokenizer(
        _tiny().with_added([("<pad>", 900), ("<tool>", 901), ("<|x|>", 902)]), visible=[901]
    ),
    "nano": lambda: load_tokenizer(NANO),
    "renamed": _renamed,
    "llama2": lambda: load_tokenizer(vocabularies.llama2_path()),
    "codellama": _codellama,
    "llama3": vocabularies.llama3,
    "llama3.2-vision": _vision,
    "llama4": vocabularies.llama4,
}


@cache
def original(name: str) -> Any:
    """herd's tokenizer of that vocabulary."""
    return _MADE[name]()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder_of("llama3")`: a Hugging Face folder with the written files and a config.json."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(f"written-{name}")
        for file, data in hf_files(original(name), TEMPLATE, max_length=4096).items():
            (folder / file).write_bytes(data)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_version": "5.0.0"}))
        return folder

    return make


def reopened(tokenizer: Any, form: str, folder: Path) -> Any:
    """`tokenizer` written in one form and opened again; raises TokenizerError where the form cannot hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "gguf":
        return tokenizer_from_gguf(gguf_fields(tokenizer, tokenizer.template))
    if form == "meta":
        (folder / "tokenizer.model").write_bytes(meta_file(tokenizer))
        return load_tokenizer(folder)
    for file, data in hf_files(tokenizer, tokenizer.template).items():
        if form == "json" and file == "tokenizer.model":
            continue
        (folder / file).write_bytes(data)
    return load_tokenizer(folder)


FORMS = ("hf", "json", "meta", "gguf")


def metas_names(name: str) -> bool:
    """Whether Meta's code knows all special tokens of this vocabulary."""
    return name not in ("nano", "renamed", "llama3.2-vision")


__all__ = [
    "FORMS",
    "LARGE",
    "MANY",
    "SMALL",
    "SOME",
    "TEMPLATE",
    "TokenizerError",
    "llama3_names",
    "metas_names",
    "reopened",
]
