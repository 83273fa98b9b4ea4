"""tokenizer.json contents made on the spot by the tokenizers and transformers packages."""

from __future__ import annotations

import importlib
import json
from functools import cache
from typing import Any

from herd.tokenizer.pieces import PieceModel
from herd.tokenizer.tiktoken import REGEX
from tests.tokenizer import texts

NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]


@cache
def small_json() -> dict[str, Any]:
    """A byte-level tokenizer.json of 600 ranks, trained by the tokenizers package as herd's own small model's is."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(REGEX["llama3"]), behavior="isolated", invert=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator(texts.ALL * 2, trainer)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES])
    return json.loads(made.to_str())


def hf_pieces(model: PieceModel, *, legacy: bool, by_id: bool = False) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of a SentencePiece model (`by_id`: with the merges of transformers 5.x)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    generate_merges = importlib.import_module("transformers.convert_slow_tokenizer").generate_merges
    vocab = {piece: id for id, piece in enumerate(model.pieces)}
    scores = None if by_id else dict(zip(model.pieces, model.scores, strict=True))
    merges = generate_merges(vocab, scores)
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteFallback()  # type: ignore[assignment]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return json.loads(made.to_str())


def like_llama(model: PieceModel) -> PieceModel:
    """The tiny model with runs of spaces merging last of all, as in Llama 2's file."""
    scores = [-1e9 if not piece.strip("▁") else score for piece, score in zip(model.pieces, model.scores, strict=True)]
    return PieceModel(pieces=model.pieces, scores=scores, types=model.types)
