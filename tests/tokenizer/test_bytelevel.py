"""The byte-level alphabet against the one that the tokenizers package uses."""

from __future__ import annotations

import random

import pytest

from herd.errors import TokenizerError
from herd.tokenizer.bytelevel import from_alphabet, to_alphabet
from tests.tokenizer.conftest import opened


def test_alphabet_is_the_one_of_tokenizers() -> None:
    from tokenizers import pre_tokenizers

    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(to_alphabet(bytes((b,)) for b in range(256)))
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a é\n漢🙂")[0][0]
    assert to_alphabet(["a é\n漢🙂".encode()]) == [shown]


def test_every_token_comes_back(family: str) -> None:
    ranks = list(opened(family).ranks)
    assert from_alphabet(to_alphabet(ranks)) == ranks
    rng = random.Random(0)
    made = [rng.randbytes(rng.randrange(1, 9)) for _ in range(500)]
    assert from_alphabet(to_alphabet(made)) == made


@pytest.mark.parametrize("name", ["a b", "\n", "漢", "\uffff", "\u0144", "a\u00ad"])
def test_other_characters_are_refused(name: str) -> None:
    with pytest.raises(TokenizerError, match="byte-level alphabet"):
        from_alphabet(["ok", name])
