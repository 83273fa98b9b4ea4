"""Train a byte-level BPE vocabulary in the Llama 3 scheme and write it as Hugging Face tokenizer files.

Scheme (Llama 3, models/llama3/tokenizer.py and the released tokenizer.json): the Llama 3 regex cuts the text, each piece is
merged byte pair by byte pair, whole pieces that are in the table are taken directly (`ignore_merges`), no normaliser, no
prefix space. Base ranks come first (ids 0..N-1, all 256 bytes among them), then the special tokens in Llama 3's order.

Needs the `tokenizers` package (train extra); herd itself reads the result without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.errors import ConfigError
from herd.tokenizer.special import LLAMA3_NAMED, llama3_names
from herd.tokenizer.tiktoken import REGEX

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

__all__ = ["special_ids", "special_names", "tokenizer_config", "train_vocabulary", "write_tokenizer"]


def special_names(count: int) -> tuple[str, ...]:
    """The `count` special tokens in Llama 3's order: the named ones, then reserved ones numbered from 2."""
    if count < len(LLAMA3_NAMED):
        raise ConfigError(f"{count} special tokens asked for, Llama 3 names {len(LLAMA3_NAMED)}")
    return llama3_names(count)


def special_ids(tokenizer: FastTokenizer, count: int = 32) -> dict[str, int]:
    """Name -> id of the special tokens of a vocabulary made here; one that is missing raises ConfigError."""
    found = {}
    for name in special_names(count):
        id = tokenizer.token_to_id(name)
        if id is None:
            raise ConfigError(f"the vocabulary has no special token {name}")
        found[name] = id
    return found


def train_vocabulary(texts: Iterable[str], vocab_size: int, n_special: int = 32) -> FastTokenizer:
    """Train `vocab_size - n_special` base ranks on `texts` and return the `tokenizers` tokenizer.

    The same texts in the same order give the same file. Encoding adds nothing by itself: the caller places
    `<|begin_of_text|>` (a post-processor that adds it is written into tokenizer.json by `write_tokenizer`).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(REGEX["llama3"]), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    base = vocab_size - n_special
    trainer = trainers.BpeTrainer(
        vocab_size=base,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != base:
        raise ConfigError(f"the text holds only {tokenizer.get_vocab_size()} of the {base} base ranks asked for")
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in special_names(n_special)]
    )
    for offset, name in enumerate(special_names(n_special)):
        if tokenizer.token_to_id(name) != base + offset:
            raise ConfigError(f"special token {name} did not get id {base + offset}")
    return tokenizer


def tokenizer_config(context: int) -> dict[str, Any]:
    """tokenizer_config.json of a Llama 3-style folder with `context` positions."""
    return {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_tokenizer(tokenizer: FastTokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json (with the post-processor that puts `<|begin_of_text|>` in front) and tokenizer_config.json."""
    from tokenizers import Tokenizer, processors

    bos = "<|begin_of_text|>"
    written = Tokenizer.from_str(tokenizer.to_str())
    written.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, written.token_to_id(bos))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(written.to_str(pretty=True) + "\n", encoding="utf-8")
    text = json.dumps(tokenizer_config(context), indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
