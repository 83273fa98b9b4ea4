"""The special tokens of every Llama generation: which names exist, at which ids, and which of them end a reply.

Canonical names are Meta's (meta-llama/llama-models, models/llama3/tokenizer.py and models/llama4/tokenizer.py, the 2024-2025
files). Other spellings of the same ids (Hugging Face, April 2024) are aliases as long as they name only one id: the numbers in
`reserved_special_token_N` differ between releases, so only ids can be relied on there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from herd.errors import TokenizerError
from herd.tokenizer.tokenizer import Family, SpecialTokens

__all__ = [
    "INFILL_PIECES",
    "LLAMA3_NAMED",
    "RANKS",
    "STEP_PIECE",
    "SpecialSplitter",
    "byte_bpe_specials",
    "known_aliases",
    "llama3_names",
    "llama4_names",
    "piece_specials",
    "with_added",
    "with_stop",
]

RANKS: Mapping[Family, int] = {"llama3": 128_000, "llama4": 200_000}
"""Merge ranks of the two released byte-BPE vocabularies; the special ids follow directly."""

LLAMA3_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)

INFILL_PIECES = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
"""Code Llama's fill-in-the-middle pieces: prefix, suffix, middle, end. Absent from the 34B and the 7B/13B Python files."""

STEP_PIECE = "<step>"
"""Ends a turn in Code Llama 70B Instruct; absent from the other files."""

# Alias -> canonical name, per family. Only spellings that mean the same id wherever they occur.
_ALIASES: Mapping[Family, Mapping[str, str]] = {
    "llama3": {"<|finetune_right_pad|>": "<|finetune_right_pad_id|>"},
    "llama4": {"<|finetune_right_pad_id|>": "<|finetune_right_pad|>"},
}

_BOS = "<|begin_of_text|>"
_EOS = "<|end_of_text|>"
_STOP = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|eom|>", "<|eot|>")
_PAD = ("<|finetune_right_pad_id|>", "<|finetune_right_pad|>")


def llama3_names(count: int = 256) -> tuple[str, ...]:
    """The first `count` special names of Llama 3 in id order: the named ones, then reserved ones numbered from 2."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(2, count - len(LLAMA3_NAMED) + 2))
    return (*LLAMA3_NAMED, *reserved)[:count]


def llama4_names() -> tuple[str, ...]:
    """The 2,048 special names of Llama 4 in id order."""

    def reserved(group: str, first: int, last: int) -> list[str]:
        return [f"{group}reserved_special_token_{i}" for i in range(first, last + 1)]

    names = [
        *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
        *("header_start", "header_end", "eom", "eot", "step"),
        *reserved("text_post_train_", 0, 5),
        *("python_start", "python_end", "finetune_right_pad"),
        *reserved("text_post_train_", 8, 68),
        *("image_start", "image_end"),
        *reserved("vision_", 0, 1),
        *("tile_x_separator", "tile_y_separator"),
        *reserved("vision_", 2, 5),
        *("image", *reserved("vision_", 6, 6), "patch"),
        *reserved("vision_", 7, 1047),
        *reserved("reasoning_", 0, 7),
        *("reasoning_thinking_start", "reasoning_thinking_end"),
        *reserved("", 0, 903),
    ]
    return tuple(f"<|{name}|>" for name in names)


def known_aliases(family: Family) -> Collection[str]:
    """The other spellings that every vocabulary of this family understands, whatever its files list."""
    return _ALIASES.get(family, {}).keys()


def byte_bpe_specials(family: Family, n_ranks: int, listed: Mapping[str, int] | None = None) -> SpecialTokens:
    """Special tokens of a Llama 3 or 4 style vocabulary with `n_ranks` merge ranks.

    A released vocabulary (128,000 or 200,000 ranks) always gets Meta's table; `listed`, the names a file gives, then only
    adds aliases and tokens beyond the table. Any other rank count is a vocabulary of its own, whose specials are exactly
    `listed`. Raises TokenizerError when `listed` is needed and missing, or names no beginning or end of text.
    """
    if n_ranks == RANKS.get(family):
        names = llama3_names() if family == "llama3" else llama4_names()
        ids = {name: n_ranks + i for i, name in enumerate(names)}
        listed = listed or {}
    elif listed:
        ids, listed = dict(listed), {}
    else:
        raise TokenizerError(
            f"{n_ranks} merge ranks and no list of special tokens: Llama 3 has {RANKS['llama3']} ranks, Llama 4 has "
            f"{RANKS['llama4']}; a vocabulary of another size must come as tokenizer.json with its added_tokens"
        )
    if _BOS not in ids:
        raise TokenizerError(f"the special tokens do not include {_BOS}, so this is not a Llama 3 or 4 vocabulary")
    stop = frozenset(ids[name] for name in _STOP if name in ids)
    if not stop:
        raise TokenizerError("the special tokens include none that ends a text or a turn (" + ", ".join(_STOP) + ")")
    pad = next((ids[name] for name in _PAD if name in ids), None)
    special = SpecialTokens(bos=ids[_BOS], eos=ids.get(_EOS, min(stop)), stop=stop, pad=pad, ids=ids)
    known = {alias: ids[name] for alias, name in _ALIASES[family].items() if name in ids and alias not in ids}
    return with_added(replace(special, aliases=known), listed)


def piece_specials(pieces: Sequence[str], special_ids: Collection[int]) -> SpecialTokens:
    """Special tokens of a SentencePiece vocabulary; `special_ids` are its control, unknown and user-defined pieces.

    Code Llama's infill pieces and `<step>` are special wherever the file has them. Raises TokenizerError without `<s>`/`</s>`.
    """
    ids = {pieces[i]: i for i in sorted(special_ids)}
    if "<s>" not in ids or "</s>" not in ids:
        raise TokenizerError(
            "the vocabulary has no control pieces <s> and </s>, so it is not a Llama 1, 2 or Code Llama one"
        )
    ends = ("</s>", INFILL_PIECES[-1], STEP_PIECE)
    stop = frozenset(ids[name] for name in ends if name in ids)
    return SpecialTokens(
        bos=ids["<s>"], eos=ids["</s>"], stop=stop, pad=ids.get("<pad>"), unk=ids.get("<unk>"), ids=ids
    )


def with_added(special: SpecialTokens, listed: Mapping[str, int]) -> SpecialTokens:
    """`special` plus the tokens a file lists: another name for a known id becomes an alias, a new id a special of its own.

    A listed name that already means another id (reserved names are numbered differently in each release, and Llama 3.2
    Vision lists `<|image|>` again at 128256) keeps its first meaning; a new id under such a name is called `name#id`.
    """
    ids, aliases = dict(special.ids), dict(special.aliases)
    known = set(ids.values())
    for name, id in listed.items():
        taken = name in ids or aliases.get(name, id) != id
        if id not in known:
            ids[f"{name}#{id}" if taken else name] = id
            known.add(id)
        elif not taken:
            aliases[name] = id
    return replace(special, ids=ids, aliases=aliases)


def with_stop(special: SpecialTokens, extra: Iterable[int]) -> SpecialTokens:
    """`special` with more ids that end a reply."""
    return replace(special, stop=special.stop | frozenset(extra))


class SpecialSplitter:
    """Cuts trusted text at the special names of one vocabulary."""

    def __init__(self, special: SpecialTokens) -> None:
        self._ids = {**special.aliases, **special.ids}
        # Longest first: regex alternation takes the first match, and one name may begin another.
        names = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def split(self, text: str) -> Iterator[str | int]:
        """The stretches of ordinary text (str, never empty) and special tokens (their ids) of `text`, in order."""
        for i, part in enumerate(self._pattern.split(text)):
            if i % 2:
                yield self._ids[part]
            elif part:
                yield part
