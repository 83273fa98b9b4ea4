"""A Llama Guard made by hand: a Llama of two layers whose weights say "unsafe" where a word was said, and "safe" elsewhere.

Queries and keys are zero, so that its first layer looks at all tokens alike; the value of one word is a number that what follows
can see. What comes next depends on the last token and on that number: line ends, a verdict, its category, the end.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny import SPECIALS, tiny_config, write_folder

__all__ = ["WORD", "write_judge"]

WORD = " bomb"
MERGES = (("s", "a"), ("sa", "f"), ("saf", "e"), ("u", "n"), ("un", "safe"), ("\n", "\n"), ("S", "1"))
MERGES += ((" ", "b"), (" b", "o"), (" bo", "m"), (" bom", "b"))
EXTRA = tuple(left + right for left, right in MERGES)
IDS = {text: 256 + i for i, text in enumerate(EXTRA)} | {"\n": 10}
FIRST = 256 + len(EXTRA)
SPECIAL = {name: FIRST + i for i, name in enumerate(SPECIALS)}
LAST = ("<|end_header_id|>", "\n\n", "safe", "unsafe", "\n", "S1")
"""Tokens that something follows: each has a direction of its own in the residual stream, by its place here."""
OTHER, BAD, SEEN = 6, 7, 8
"""Directions of all other tokens, of the word, and of its having been said."""
SURE, DOUBT = 20.0, 10.0


def write_judge(folder: Path, prompt: int, context: int = 4096) -> Path:
    """Write it to `folder`, for prompts of about `prompt` tokens."""
    config = replace(tiny_config(context), vocab_size=FIRST + len(SPECIALS))
    write_folder(folder, config=config)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if not name.endswith("norm.weight"):
            tensor.zero_()
        else:
            tensor.fill_(1.0)
    ids = {**IDS, **SPECIAL}
    embedding, output = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embedding[:, OTHER] = 1.0
    for direction, name in enumerate(LAST):
        embedding[ids[name]] = torch.eye(config.dim)[direction]
    embedding[ids[WORD]] = torch.eye(config.dim)[BAD]
    tensors["model.layers.0.self_attn.v_proj.weight"][0, BAD] = 1.0
    # A norm makes sqrt(dim) of the one number of a token, and all tokens share it evenly.
    tensors["model.layers.0.self_attn.o_proj.weight"][SEEN, 0] = prompt / config.dim**0.5
    for last, following in (
        ("<|end_header_id|>", "\n\n"),
        ("safe", "<|eot_id|>"),
        ("unsafe", "\n"),
        ("\n", "S1"),
        ("S1", "<|eot_id|>"),
    ):
        output[ids[following], LAST.index(last)] = SURE
    output[ids["safe"], LAST.index("\n\n")] = DOUBT
    output[ids["unsafe"], LAST.index("\n\n")], output[ids["unsafe"], SEEN] = 0.6 * DOUBT, 0.8 * DOUBT
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stop = [SPECIAL[name] for name in ("<|end_of_text|>", "<|eot_id|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    _rewrite(folder / "tokenizer.json")
    return folder


def _rewrite(path: Path) -> None:
    """The vocabulary of bytes, with whole words behind them."""
    from herd.tokenizer.bytelevel import to_alphabet

    content = json.loads(path.read_text())
    words = to_alphabet([text.encode() for text in EXTRA])
    content["model"]["vocab"] |= {word: 256 + i for i, word in enumerate(words)}
    halves = [to_alphabet([half.encode() for half in pair]) for pair in MERGES]
    content["model"]["merges"] = [list(pair) for pair in halves]
    for token in content["added_tokens"]:
        token["id"] = SPECIAL[token["content"]]
    path.write_text(json.dumps(content))
