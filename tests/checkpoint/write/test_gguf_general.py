"""Names, size labels and file types as llama.cpp's converter has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest

from herd.checkpoint.names import shapes
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.gguf_general import (
    FILE_TYPES,
    default_name,
    file_type,
    general_fields,
    sampling_fields,
    size_label,
)
from herd.model.config import ModelConfig
from herd.model.presets import RELEASES
from herd.quant.mix import MIXES

CATALOG = {release.id: release.config for release in RELEASES if release.config is not None}


@dataclass
class Named:
    """As much of a store as names need."""

    path: str
    kind: str = "hf"
    config: ModelConfig = field(default_factory=lambda: CATALOG["llama-3.2-1b"])
    said: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        return self.said


@pytest.mark.parametrize("name", CATALOG)
def test_size_labels_are_those_of_the_gguf_package(name: str) -> None:
    config = CATALOG[name]
    numbers = {key: math.prod(shape) for key, shape in shapes(config).items()}
    experts = sum(count for key, count in numbers.items() if ".experts." in key)
    count = 0 if config.moe is None else config.moe.n_experts
    one = experts // count if count else 0
    assert size_label(config) == gguf.size_label(sum(numbers.values()), sum(numbers.values()) - experts, one, count)


def test_file_types_are_llama_cpps() -> None:
    theirs = {kind.name.partition("_")[2]: kind.value for kind in gguf.LlamaFileType}
    assert {word: theirs[word] for word in FILE_TYPES} == FILE_TYPES
    assert {name: FILE_TYPES[name] for name in MIXES} == {name: mix.file_type for name, mix in MIXES.items()}


def test_file_types_of_tensors_without_a_name_for_their_mixture() -> None:
    assert file_type(["BF16", "BF16"], None) == 32
    assert file_type(["Q4_K"], None) == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert file_type(["Q4_K", "Q6_K"], None) == gguf.LlamaFileType.GUESSED


@pytest.mark.parametrize(
    ("store", "file"),
    [
        (Named("/x/Instruct/model.safetensors"), "Instruct-Q4_K_M.gguf"),
        (Named("/x/models--meta-llama--Llama-3.2-1B/snapshots/0f1e"), "Llama-3.2-1B-Q4_K_M.gguf"),
        (Named("/x/Llama-3.2-1B-BF16-00001-of-00004.gguf", "gguf"), "Llama-3.2-1B-Q4_K_M.gguf"),
        (Named("/x/a.gguf", "gguf", said={"general.name": "Llama 3.2 1B"}), "Llama-3.2-1B-Q4_K_M.gguf"),
    ],
    ids=["file", "cache", "parts", "said"],
)
def test_names_of_files(store: Any, file: str) -> None:
    assert default_name(store, "q4_k_m") == file


def test_a_folders_name_is_taken_apart(tmp_path: Path) -> None:
    (tmp_path / "Llama-3.2-1B-Instruct").mkdir()
    store: Any = Named(str(tmp_path / "Llama-3.2-1B-Instruct"))
    assert general_fields(store, ["BF16"], None) == {
        "general.type": "model",
        "general.name": "Llama 3.2 1B Instruct",
        "general.finetune": "Instruct",
        "general.basename": "Llama-3.2",
        "general.size_label": "1B",
        "general.file_type": 32,
    }
    store.config = CATALOG["llama-3.1-8b"]  # the name says 1B, the numbers 8
    assert general_fields(store, ["BF16"], None)["general.size_label"] == "8.0B"


def test_a_limit_on_replies_has_no_key() -> None:
    with pytest.warns(UserWarning, match="max_new_tokens"):
        assert sampling_fields(GenerationDefaults(max_tokens=100)) == {}
