"""The geometry of every released size, each derived from its parent by what changed. Imports no torch.

Sources: the params.json and config.json facts of each release (Llama 1 paper table 2, Llama 2 paper table 1, Code Llama
paper, llama-models models/*/args and sku_list, PurpleLlama model cards). Feed-forward widths are written out;
`herd.model.config.hidden_dim_of` gives the same numbers from Meta's rule.
"""

from __future__ import annotations

from dataclasses import replace

from herd.model.config import ModelConfig, MoEConfig, RopeScaling, Temper, irope, plain

# Llama 1: multi-head attention, context 2,048. 65B is the one whose params.json is reported with epsilon 1e-5.
LLAMA_1_7B = ModelConfig(
    dim=4096,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    hidden_dim=11_008,
    vocab_size=32_000,
    layers=plain(32),
    norm_eps=1e-6,
    rope_theta=10_000.0,
    max_seq_len=2048,
)
LLAMA_1_13B = replace(LLAMA_1_7B, layers=plain(40), dim=5120, n_heads=40, n_kv_heads=40, hidden_dim=13_824)
LLAMA_1_33B = replace(LLAMA_1_7B, layers=plain(60), dim=6656, n_heads=52, n_kv_heads=52, hidden_dim=17_920)
LLAMA_1_65B = replace(
    LLAMA_1_7B, layers=plain(80), dim=8192, n_heads=64, n_kv_heads=64, hidden_dim=22_016, norm_eps=1e-5
)

# Llama 2: context 4,096, epsilon 1e-5; 70B shares each key/value head among eight query heads.
LLAMA_2_7B = replace(LLAMA_1_7B, norm_eps=1e-5, max_seq_len=4096)
LLAMA_2_13B = replace(LLAMA_1_13B, norm_eps=1e-5, max_seq_len=4096)
LLAMA_2_70B = replace(LLAMA_1_65B, n_kv_heads=8, hidden_dim=28_672, max_seq_len=4096)

# Code Llama: Llama 2 trained on with theta 1e6 and 16,384 tokens; 16 more vocabulary rows where infilling was trained.
# The 70B Python and Instruct models had no long-context training and keep Llama 2's theta and context.
CODE_7B_PYTHON = replace(LLAMA_2_7B, rope_theta=1_000_000.0, max_seq_len=16_384)
CODE_13B_PYTHON = replace(LLAMA_2_13B, rope_theta=1_000_000.0, max_seq_len=16_384)
CODE_7B = replace(CODE_7B_PYTHON, vocab_size=32_016)
CODE_13B = replace(CODE_13B_PYTHON, vocab_size=32_016)
CODE_34B = replace(LLAMA_2_70B, layers=plain(48), hidden_dim=22_016, rope_theta=1_000_000.0, max_seq_len=16_384)
CODE_70B = replace(LLAMA_2_70B, vocab_size=32_016, rope_theta=1_000_000.0, max_seq_len=16_384)
CODE_70B_SHORT = replace(LLAMA_2_70B, vocab_size=32_016)

# Llama 3: eight key/value heads at every size, theta 5e5, 128,256 rows.
LLAMA_3_8B = replace(
    LLAMA_2_7B, n_kv_heads=8, hidden_dim=14_336, vocab_size=128_256, rope_theta=500_000.0, max_seq_len=8192
)
LLAMA_3_70B = replace(LLAMA_2_70B, vocab_size=128_256, rope_theta=500_000.0, max_seq_len=8192)

# Llama 3.1 and 3.3: the same, with stretched frequencies and a context of 131,072.
LLAMA_31_8B = replace(LLAMA_3_8B, rope_scaling=RopeScaling(factor=8.0), max_seq_len=131_072)
LLAMA_31_70B = replace(LLAMA_3_70B, rope_scaling=RopeScaling(factor=8.0), max_seq_len=131_072)
LLAMA_31_405B = replace(LLAMA_31_70B, layers=plain(126), dim=16_384, n_heads=128, hidden_dim=53_248)

# Llama 3.2 text: stretched by 32, output tied to the embedding. Meta's own code hard-codes 8 and never reads the factor;
# the published configs, litgpt and torchtune say 32.
LLAMA_32_1B = replace(
    LLAMA_31_8B,
    layers=plain(16),
    dim=2048,
    head_dim=64,
    hidden_dim=8192,
    rope_scaling=RopeScaling(factor=32.0),
    tie_embeddings=True,
)
LLAMA_32_3B = replace(LLAMA_32_1B, layers=plain(28), dim=3072, n_heads=24, head_dim=128)

# Llama Guard 3 1B INT4: pruned from 3.2 1B and untied; the shipped program keeps only 20 output rows.
GUARD_3_1B_INT4 = replace(LLAMA_32_1B, layers=plain(12), hidden_dim=6400, tie_embeddings=False)

# Llama 4 text decoders. Dense layers are 16,384 wide, experts and the shared expert 8,192.
SCOUT = ModelConfig(
    dim=5120,
    n_heads=40,
    n_kv_heads=8,
    head_dim=128,
    hidden_dim=16_384,
    vocab_size=202_048,
    layers=irope(48, moe_layers=range(48)),
    rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
    max_seq_len=10_485_760,
    moe=MoEConfig(n_experts=16, hidden_dim=8192),
    temper=Temper(),
)
MAVERICK = replace(
    SCOUT,
    layers=irope(48, moe_layers=range(1, 48, 2), qk_norm=False),
    rope_scaling=None,
    max_seq_len=1_048_576,
    moe=MoEConfig(n_experts=128, hidden_dim=8192),
)
# Llama Guard 4: Scout without routers and routed experts; the shared expert is the whole feed-forward. Chunks are off.
GUARD_4 = replace(SCOUT, layers=irope(48, chunk=None), hidden_dim=8192, rope_scaling=None, moe=None, max_seq_len=8192)

LLAMA_4_VISION = {
    "type": "llama4",
    "encoder_width": 1408,
    "encoder_layers": 34,
    "encoder_heads": 16,
    "encoder_head_dim": 88,
    "encoder_mlp": 5632,
    "image_size": 336,
    "patch_size": 14,
    "patches_per_tile": 576,
    "tokens_per_tile": 144,
    "max_tiles": 16,
    "output_dim": 4096,
    "parameters": 850_960_896,
    "projector_parameters": 20_971_520,
}


def mllama(*, n_layers: int, cross: int, dim: int, n_heads: int, hidden_dim: int) -> dict[str, object]:
    """Numbers of a Llama 3.2 Vision model: `n_layers` in all, `cross` of them attend to the image."""
    return {
        "n_layers": n_layers,
        "dim": dim,
        "n_heads": n_heads,
        "n_kv_heads": 8,
        "head_dim": 128,
        "ffn_hidden_dim": hidden_dim,
        "vocab_size": 128_256,
        "embedding_rows": 128_264,
        "vision": {
            "type": "mllama",
            "self_attention_layers": n_layers - cross,
            "cross_attention_layers": cross,
            "max_tiles": 4,
            "patch_size": 14,
            "encoder_width": 1280,
            "encoder_heads": 16,
            "encoder_head_dim": 80,
            "encoder_mlp": 5120,
            "encoder_layers": 32,
            "global_layers": 8,
            "encoder_output_dim": 7680,
        },
    }


def deberta(*, dim: int, n_heads: int, hidden_dim: int, vocab_size: int, labels: int) -> dict[str, object]:
    """Numbers of a Prompt Guard encoder."""
    return {
        "n_layers": 12,
        "dim": dim,
        "n_heads": n_heads,
        "head_dim": 64,
        "ffn_hidden_dim": hidden_dim,
        "vocab_size": vocab_size,
        "encoder": {"type": "deberta-v2", "num_labels": labels, "position_buckets": 256},
    }
