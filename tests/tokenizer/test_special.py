"""The tables of special tokens: exact ids of every generation, aliases, and what a file may add."""

from __future__ import annotations

import pytest

from herd.errors import TokenizerError
from herd.tokenizer.special import SpecialSplitter, byte_bpe_specials, llama3_names, llama4_names, with_added, with_stop

# huggingface tokenizer.json of Llama 3.1: reserved numbers run differently from Meta's (128005 is reserved_2 there)
HF_31 = {"<|begin_of_text|>": 128000, "<|reserved_special_token_2|>": 128005, "<|reserved_special_token_247|>": 128255}
# the April 2024 release: eom, python_tag and others were still reserved
APRIL = {
    "<|reserved_special_token_2|>": 128004,
    "<|reserved_special_token_4|>": 128008,
    "<|reserved_special_token_250|>": 128255,
}


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("<|begin_of_text|>", 128000),
        ("<|end_of_text|>", 128001),
        ("<|reserved_special_token_1|>", 128003),
        ("<|finetune_right_pad_id|>", 128004),
        ("<|step_id|>", 128005),
        ("<|start_header_id|>", 128006),
        ("<|end_header_id|>", 128007),
        ("<|eom_id|>", 128008),
        ("<|eot_id|>", 128009),
        ("<|python_tag|>", 128010),
        ("<|image|>", 128011),
        ("<|reserved_special_token_2|>", 128012),
        ("<|reserved_special_token_245|>", 128255),
    ],
)
def test_llama3_ids(name: str, id: int) -> None:
    assert byte_bpe_specials("llama3", 128_000).get(name) == id


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("<|begin_of_text|>", 200000),
        ("<|end_of_text|>", 200001),
        ("<|fim_prefix|>", 200002),
        ("<|fim_middle|>", 200003),
        ("<|fim_suffix|>", 200004),
        ("<|header_start|>", 200005),
        ("<|header_end|>", 200006),
        ("<|eom|>", 200007),
        ("<|eot|>", 200008),
        ("<|step|>", 200009),
        ("<|text_post_train_reserved_special_token_0|>", 200010),
        ("<|text_post_train_reserved_special_token_5|>", 200015),
        ("<|python_start|>", 200016),
        ("<|python_end|>", 200017),
        ("<|finetune_right_pad|>", 200018),
        ("<|finetune_right_pad_id|>", 200018),
        ("<|text_post_train_reserved_special_token_8|>", 200019),
        ("<|text_post_train_reserved_special_token_68|>", 200079),
        ("<|image_start|>", 200080),
        ("<|image_end|>", 200081),
        ("<|vision_reserved_special_token_1|>", 200083),
        ("<|tile_x_separator|>", 200084),
        ("<|tile_y_separator|>", 200085),
        ("<|vision_reserved_special_token_5|>", 200089),
        ("<|image|>", 200090),
        ("<|vision_reserved_special_token_6|>", 200091),
        ("<|patch|>", 200092),
        ("<|vision_reserved_special_token_7|>", 200093),
        ("<|vision_reserved_special_token_1047|>", 201133),
        ("<|reasoning_reserved_special_token_0|>", 201134),
        ("<|reasoning_thinking_start|>", 201142),
        ("<|reasoning_thinking_end|>", 201143),
        ("<|reserved_special_token_0|>", 201144),
        ("<|reserved_special_token_903|>", 202047),
    ],
)
def test_llama4_ids(name: str, id: int) -> None:
    assert byte_bpe_specials("llama4", 200_000).get(name) == id


def test_counts() -> None:
    assert len(set(llama3_names())) == 256
    assert len(set(llama4_names())) == 2048
    assert llama3_names(32)[-1] == "<|reserved_special_token_21|>"


def test_stop_and_pad() -> None:
    three, four = byte_bpe_specials("llama3", 128_000), byte_bpe_specials("llama4", 200_000)
    assert (three.bos, three.eos, three.pad, three.stop) == (128000, 128001, 128004, {128001, 128008, 128009})
    assert (four.bos, four.eos, four.pad, four.stop) == (200000, 200001, 200018, {200001, 200007, 200008})
    assert with_stop(three, [5]).stop == {5, 128001, 128008, 128009}


@pytest.mark.parametrize("listed", [HF_31, APRIL])
def test_renumbered_names_keep_metas_ids(listed: dict[str, int]) -> None:
    special = byte_bpe_specials("llama3", 128_000, listed)
    assert special.get("<|reserved_special_token_2|>") == 128012
    last = list(listed)[-1]
    assert special.get(last) == 128255  # a name that only the other file has is an alias
    assert special.ids == byte_bpe_specials("llama3", 128_000).ids


def test_tokens_beyond_the_table() -> None:
    special = byte_bpe_specials("llama3", 128_000, {"<|image|>": 128256, "<pad>": 128257})
    assert special.get("<|image|>") == 128011  # Llama 3.2 Vision of Hugging Face lists it twice
    assert special.get("<|image|>#128256") == 128256
    assert special.get("<pad>") == 128257
    assert special.get("<nothing>") is None


def test_another_size_needs_a_list() -> None:
    with pytest.raises(TokenizerError, match="no list of special tokens"):
        byte_bpe_specials("llama3", 1_000)
    with pytest.raises(TokenizerError, match="do not include"):
        byte_bpe_specials("llama3", 1_000, {"<s>": 1000})
    with pytest.raises(TokenizerError, match="none that ends"):
        byte_bpe_specials("llama3", 1_000, {"<|begin_of_text|>": 1000})


def test_splitter_takes_the_longest_name() -> None:
    special = with_added(byte_bpe_specials("llama3", 128_000), {"<a": 128256, "<a>": 128257})
    splitter = SpecialSplitter(special)
    assert list(splitter.split("x<a><a y<|eot_id|>")) == ["x", 128257, 128256, " y", 128009]
    assert list(splitter.split("")) == []
