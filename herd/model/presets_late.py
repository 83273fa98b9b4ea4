"""Catalog rows of Llama 3 to 4. Read through `herd.model.presets`. Imports no torch.

Sources: llama-models (sku_list, model cards, args), Hugging Face configs, Meta's announcements.
"""

from __future__ import annotations

from typing import Any

from herd.model import shapes
from herd.model.release import Release, dense, meta

__all__ = ["LATE"]

_3: dict[str, Any] = {
    "generation": "3",
    "tokenizer": "llama3",
    "chat_format": "llama3",
    "variants": ("base", "instruct"),
    "release_date": "2024-04-18",
}
_31: dict[str, Any] = {
    "generation": "3.1",
    "tokenizer": "llama3",
    "chat_format": "llama3.1",
    "variants": ("base", "instruct"),
    "release_date": "2024-07-23",
    "knowledge_cutoff": "2023-12",
}
_32: dict[str, Any] = {
    "generation": "3.2",
    "tokenizer": "llama3",
    "chat_format": "llama3.2",
    "release_date": "2024-09-25",
    "knowledge_cutoff": "2023-12",
}
_32_TEXT: dict[str, Any] = _32 | {
    "variants": ("base", "instruct", "instruct-int4-spinquant", "instruct-int4-qlora"),
    "notes": ("Meta's own code applies RoPE factor 8 here; 32 is right", "the INT4 releases support 8,192 tokens"),
    "unverified": ("whether native output.weight is stored",),
}
_32_VISION: dict[str, Any] = _32 | {
    "kind": "mllama",
    "config": None,
    "variants": ("base", "instruct"),
    "max_context": 131_072,
    "notes": (
        "n_layers counts self- and cross-attention layers; native params.json counts the self-attention layers",
        "parameters are those of the Hugging Face layout with 560-pixel tiles",
    ),
    "unverified": ("image size of the 90B base model",),
    "why_not": "it needs an image encoder and cross-attention layers, which herd does not have yet",
}
_4: dict[str, Any] = {
    "generation": "4",
    "kind": "moe",
    "tokenizer": "llama4",
    "chat_format": "llama4",
    "native_shards": 8,
    "base_context": 262_144,
    "release_date": "2025-04-05",
    "knowledge_cutoff": "2024-08",
    "facts": {"vision": shapes.LLAMA_4_VISION},
}

LATE: tuple[Release, ...] = (
    # Llama 3
    dense(
        "llama-3-8b",
        "Llama 3 8B",
        shapes.LLAMA_3_8B,
        8_030_261_248,
        **_3,
        hf_base=meta("Meta-Llama-3-8B"),
        hf_instruct=meta("Meta-Llama-3-8B-Instruct"),
        native=("Llama3-8B", "Llama3-8B-Instruct"),
        tags=("llama3:8b", "llama3:latest"),
        knowledge_cutoff="2023-03",
    ),
    dense(
        "llama-3-70b",
        "Llama 3 70B",
        shapes.LLAMA_3_70B,
        70_553_706_496,
        **_3,
        hf_base=meta("Meta-Llama-3-70B"),
        hf_instruct=meta("Meta-Llama-3-70B-Instruct"),
        native=("Llama3-70B", "Llama3-70B-Instruct"),
        tags=("llama3:70b",),
        native_shards=8,
        knowledge_cutoff="2023-12",
    ),
    # Llama 3.1
    dense(
        "llama-3.1-8b",
        "Llama 3.1 8B",
        shapes.LLAMA_31_8B,
        8_030_261_248,
        **_31,
        hf_base=meta("Llama-3.1-8B", "Meta-Llama-3.1-8B"),
        hf_instruct=meta("Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B-Instruct"),
        native=("Llama3.1-8B", "Llama3.1-8B-Instruct"),
        tags=("llama3.1:8b", "llama3.1:latest"),
    ),
    dense(
        "llama-3.1-70b",
        "Llama 3.1 70B",
        shapes.LLAMA_31_70B,
        70_553_706_496,
        **_31,
        hf_base=meta("Llama-3.1-70B", "Meta-Llama-3.1-70B"),
        hf_instruct=meta("Llama-3.1-70B-Instruct", "Meta-Llama-3.1-70B-Instruct"),
        native=("Llama3.1-70B", "Llama3.1-70B-Instruct"),
        tags=("llama3.1:70b",),
        native_shards=8,
    ),
    dense(
        "llama-3.1-405b",
        "Llama 3.1 405B",
        shapes.LLAMA_31_405B,
        405_853_388_800,
        **_31 | {"variants": ("base", "instruct", "base-fp8", "instruct-fp8", "base-mp16", "instruct-mp16")},
        hf_base=meta("Llama-3.1-405B", "Meta-Llama-3.1-405B", "Llama-3.1-405B-FP8"),
        hf_instruct=meta("Llama-3.1-405B-Instruct", "Meta-Llama-3.1-405B-Instruct", "Llama-3.1-405B-Instruct-FP8"),
        native=("Llama3.1-405B", "Llama3.1-405B-Instruct"),
        tags=("llama3.1:405b",),
        native_shards=8,
        notes=("the 16-shard release stores each key/value head twice and says n_kv_heads 16",),
        unverified=("duplicated key/value heads in the first Hugging Face upload",),
    ),
    # Llama 3.3
    dense(
        "llama-3.3-70b",
        "Llama 3.3 70B Instruct",
        shapes.LLAMA_31_70B,
        70_553_706_496,
        generation="3.3",
        tokenizer="llama3",
        chat_format="llama3.3",
        hf_instruct=meta("Llama-3.3-70B-Instruct"),
        native=("Llama3.3-70B-Instruct",),
        tags=("llama3.3:70b", "llama3.3:latest"),
        variants=("instruct",),
        native_shards=8,
        release_date="2024-12-06",
        knowledge_cutoff="2023-12",
    ),
    # Llama 3.2
    dense(
        "llama-3.2-1b",
        "Llama 3.2 1B",
        shapes.LLAMA_32_1B,
        1_235_814_400,
        **_32_TEXT,
        hf_base=meta("Llama-3.2-1B"),
        hf_instruct=meta(
            "Llama-3.2-1B-Instruct",
            "Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8",
            "Llama-3.2-1B-Instruct-QLORA_INT4_EO8",
        ),
        native=(
            "Llama3.2-1B",
            "Llama3.2-1B-Instruct",
            "Llama3.2-1B-Instruct:int4-spinquant-eo8",
            "Llama3.2-1B-Instruct:int4-qlora-eo8",
        ),
        tags=("llama3.2:1b",),
    ),
    dense(
        "llama-3.2-3b",
        "Llama 3.2 3B",
        shapes.LLAMA_32_3B,
        3_212_749_824,
        **_32_TEXT,
        hf_base=meta("Llama-3.2-3B"),
        hf_instruct=meta(
            "Llama-3.2-3B-Instruct",
            "Llama-3.2-3B-Instruct-SpinQuant_INT4_EO8",
            "Llama-3.2-3B-Instruct-QLORA_INT4_EO8",
        ),
        native=(
            "Llama3.2-3B",
            "Llama3.2-3B-Instruct",
            "Llama3.2-3B-Instruct:int4-spinquant-eo8",
            "Llama3.2-3B-Instruct:int4-qlora-eo8",
        ),
        tags=("llama3.2:3b", "llama3.2:latest"),
    ),
    Release(
        id="llama-3.2-11b-vision",
        name="Llama 3.2 11B Vision",
        total_params=10_670_220_835,
        active_params=10_670_220_835,
        **_32_VISION,
        hf_base=meta("Llama-3.2-11B-Vision"),
        hf_instruct=meta("Llama-3.2-11B-Vision-Instruct"),
        native=("Llama3.2-11B-Vision", "Llama3.2-11B-Vision-Instruct"),
        tags=("llama3.2-vision:11b", "llama3.2-vision:latest"),
        facts=shapes.mllama(n_layers=40, cross=8, dim=4096, n_heads=32, hidden_dim=14_336),
    ),
    Release(
        id="llama-3.2-90b-vision",
        name="Llama 3.2 90B Vision",
        total_params=88_593_355_323,
        active_params=88_593_355_323,
        **_32_VISION,
        hf_base=meta("Llama-3.2-90B-Vision"),
        hf_instruct=meta("Llama-3.2-90B-Vision-Instruct"),
        native=("Llama3.2-90B-Vision", "Llama3.2-90B-Vision-Instruct"),
        tags=("llama3.2-vision:90b",),
        native_shards=8,
        facts=shapes.mllama(n_layers=100, cross=20, dim=8192, n_heads=64, hidden_dim=28_672),
    ),
    # Llama 4: herd runs the text decoder
    Release(
        id="llama-4-scout",
        name="Llama 4 Scout",
        config=shapes.SCOUT,
        total_params=108_641_793_536,
        text_params=107_769_861_120,
        active_params=17_172_894_720,
        **_4,
        hf_base=meta("Llama-4-Scout-17B-16E"),
        hf_instruct=meta("Llama-4-Scout-17B-16E-Instruct"),
        native=meta("Llama-4-Scout-17B-16E-Original", "Llama-4-Scout-17B-16E-Instruct-Original"),
        tags=("llama4:scout", "llama4:16x17b", "llama4:latest"),
        variants=("base", "instruct", "instruct-int4 (quantised on the fly in the reference)"),
        max_context=10_485_760,
        notes=("the first Hugging Face configs had RoPE factor 8 and high_freq_factor 4; 16 and 1 are right",),
    ),
    Release(
        id="llama-4-maverick",
        name="Llama 4 Maverick",
        config=shapes.MAVERICK,
        total_params=401_583_781_376,
        text_params=400_711_848_960,
        active_params=17_184_691_200,
        **_4,
        hf_base=meta("Llama-4-Maverick-17B-128E"),
        hf_instruct=meta("Llama-4-Maverick-17B-128E-Instruct", "Llama-4-Maverick-17B-128E-Instruct-FP8"),
        native=meta(
            "Llama-4-Maverick-17B-128E-Original",
            "Llama-4-Maverick-17B-128E-Instruct-Original",
            "Llama-4-Maverick-17B-128E-Instruct-FP8-Original",
        ),
        tags=("llama4:maverick", "llama4:128x17b"),
        variants=("base", "instruct", "instruct-fp8"),
        max_context=1_048_576,
        unverified=("the numbers that Meta's width rule starts from (they give 8,192 and 16,384)",),
    ),
    Release(
        id="llama-4-behemoth",
        name="Llama 4 Behemoth",
        generation="4",
        kind="moe",
        config=None,
        total_params=None,
        active_params=288_000_000_000,
        tokenizer=None,
        variants=(),
        native_shards=None,
        release_date=None,
        facts={"experts": 16, "announced_total_params": "nearly two trillion", "announced": "2025-04-05"},
        notes=("announced while still training; the weights were never released",),
        unverified=("everything except 288B active, 16 experts and about 2T in total",),
        why_not="its weights and geometry were never published",
    ),
)
