"""A very small chat model in a Hugging Face folder: random weights, one token per byte, the Llama 3 prompt format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from herd.model.config import ModelConfig
from herd.tokenizer.pieces import PieceModel
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.tokenizer.special import byte_bpe_specials
from herd.tokenizer.tiktoken import REGEX, TiktokenTokenizer
from herd.tokenizer.tokenizer import Tokenizer
from tests.build import build, tiny

__all__ = [
    "CONTEXT",
    "SPECIALS",
    "TEMPLATE",
    "infill_config",
    "infill_tokenizer",
    "tiny_config",
    "tokenizer",
    "write_folder",
    "write_infill_folder",
]

CONTEXT = 256
SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
)
INFILL = ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>...{% endfor %}"


def tiny_config(context: int = CONTEXT) -> ModelConfig:
    """Two layers over 256 bytes and the special tokens."""
    return replace(tiny("llama-3"), vocab_size=256 + len(SPECIALS), max_seq_len=context)


def tokenizer() -> Tokenizer:
    """The vocabulary of the folder, without files."""
    ids = {name: 256 + i for i, name in enumerate(SPECIALS)}
    special = byte_bpe_specials("llama3", 256, listed=ids)
    return TiktokenTokenizer([bytes([i]) for i in range(256)], "llama3", special, chat_format="llama3")


def _pieces() -> PieceModel:
    """A vocabulary like Code Llama's: control pieces, bytes, a few letters with and without a space, the infill pieces."""
    words = [mark + letter for mark in ("", "\u2581") for letter in "abcdefgh"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *words, *INFILL]
    types = [2, 3, 3, *([6] * 256)] + [1] * (len(pieces) - 259)
    return PieceModel(pieces=pieces, scores=[-float(i) for i in range(len(pieces))], types=types)


def infill_tokenizer() -> SentencePieceTokenizer:
    """A vocabulary that fills in the middle."""
    return SentencePieceTokenizer(_pieces())


def infill_config() -> ModelConfig:
    """Two layers over that vocabulary."""
    return replace(tiny("code-llama"), vocab_size=len(_pieces().pieces), max_seq_len=CONTEXT)


def write_infill_folder(folder: Path) -> Path:
    """A base model that fills in the middle."""
    write_folder(folder, chat=False, config=infill_config())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(_pieces().serialize())
    return folder


def write_folder(
    folder: Path, *, chat: bool = True, context: int = CONTEXT, config: ModelConfig | None = None, endless: bool = False
) -> Path:
    """config.json, model.safetensors, generation_config.json and tokenizer files; without `chat` a base model.

    Greedy replies of an `endless` one say the first piece of the vocabulary until the context is full.
    """
    from safetensors.torch import save_file

    from herd.checkpoint.names import join, sources

    config = config or tiny_config(context)
    model = build(config)
    if endless:
        model.output.weight.data.zero_()
    folder.mkdir(parents=True, exist_ok=True)
    ours = model.state_dict()
    save_file(
        {
            name: join(group, [ours[home.canonical] for home in group], config).clone()
            for name, group in sources(config, "hf").items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    stop = [256 + SPECIALS.index(name) for name in ("<|end_of_text|>", "<|eot_id|>")]
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": config.dim,
            "intermediate_size": config.hidden_dim,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "max_position_embeddings": config.max_seq_len,
            "tie_word_embeddings": config.tie_embeddings,
            "torch_dtype": "float32",
        },
        "generation_config.json": {"eos_token_id": stop, "temperature": 0.7, "top_p": 0.8},
        "tokenizer.json": _tokenizer_json(),
        "tokenizer_config.json": {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            **({"chat_template": TEMPLATE} if chat else {}),
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _tokenizer_json() -> dict[str, object]:
    """A byte-level BPE vocabulary without merges, in the Llama 3 scheme."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    from herd.tokenizer.bytelevel import to_alphabet

    pieces = to_alphabet([bytes([i]) for i in range(256)])
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(REGEX["llama3"]), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return json.loads(made.to_str())
