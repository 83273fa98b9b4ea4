"""Damaged and malicious files of every kind through the doors that users use.

0 crashes, 0 hangs, bounded memory, every rejection an error of herd's that names the file. `make test` runs a seeded sample,
`pytest -m slow tests/hostile` the full counts of docs/security.md: 5,000 GGUF, 2,000 safetensors, 1,000 torch, 300 config and
300 tokenizer files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from herd.checkpoint.inspect import inspect
from herd.checkpoint.open import open_store
from herd.checkpoint.peft import read_peft
from herd.checkpoint.safetensors import SafetensorsFile
from herd.checkpoint.vocabulary import load_tokenizer, tokenizer_at
from herd.errors import CheckpointError, HerdError
from herd.tokenizer.files import load_tokenizer as load_files
from herd.tokenizer.pieces import PieceModel
from tests import vocabularies
from tests.build import build
from tests.checkpoint import gguf_hostile
from tests.checkpoint.folders import meta_params, save_bin, write_hf, write_meta
from tests.checkpoint.test_gguf_hostile import inside
from tests.checkpoint.test_safetensors import mutants as safetensors_mutants
from tests.checkpoint.test_safetensors import repeated, theirs
from tests.hostile.cases import Case, survive
from tests.hostile.jsonfiles import hostile_texts, with_value
from tests.hostile.tokenizers import tokenizer_cases
from tests.hostile.torchfiles import structural, torch_mutants
from tests.tokenizer.made import hf_pieces, small_json

Measured = Callable[[str, str, float], None]
Counts = dict[str, tuple[int, Callable[[Path], Iterator[Case]], Callable[[Path], None]]]


def read_all(path: Path) -> None:
    """Open a checkpoint and read every tensor; none is larger than the files."""
    store = open_store(path)
    folder = path if path.is_dir() else path.parent
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    for name in store.names():
        assert store.info(name).shape is not None
        tensor = store.read(name)
        assert tensor.numel() * tensor.element_size() <= size, name
    dict(store.metadata())


def read_gguf(path: Path) -> None:
    """The same, and the vocabulary in it."""
    store = open_store(path)
    for name in store.names():
        store.read(name)
    dict(store.metadata())
    inside(path)
    with suppress(HerdError):  # these files hold no real vocabulary
        tokenizer_at(path)


def encode(path: Path) -> None:
    """Open a tokenizer and use it."""
    tokenizer = load_files(path)
    ids = tokenizer.encode("Hello, wörld 🙂\n", bos=True)
    tokenizer.decode(ids, skip_special=False)
    assert all(0 <= id < tokenizer.vocab_size for id in ids)


# -- the cases of each kind


def gguf_cases(folder: Path) -> Iterator[Case]:
    for case in gguf_hostile.all_cases(mutants=3_200):
        yield Case(case.name, {"hostile.gguf": case.raw}, "hostile.gguf", case.must_fail)


def hf_folder(folder: Path) -> dict[str, bytes]:
    """The files of a small Hugging Face checkpoint."""
    write_hf(folder / "hf", build("llama-3"))
    return {file.name: file.read_bytes() for file in (folder / "hf").iterdir()}


def safetensors_cases(folder: Path) -> Iterator[Case]:
    files = hf_folder(folder)
    good = files["model.safetensors"]
    for number, data in enumerate(safetensors_mutants(2_000, good=good)):
        yield Case(f"safetensors mutant {number}", {**files, "model.safetensors": data})


def torch_cases(folder: Path) -> Iterator[Case]:
    model = build("llama-3")
    write_meta(folder / "meta", model)
    save_bin(folder / "bin", model)
    for place, weights in (("meta", "consolidated.00.pth"), ("bin", "pytorch_model.bin")):
        files = {file.name: file.read_bytes() for file in (folder / place).iterdir()}
        for name, data in structural(files[weights]):
            yield Case(f"{weights}: {name}", {**files, weights: data}, must_fail=not name.startswith("end of"))
        for name, data in torch_mutants(files[weights], 450):
            yield Case(f"{weights}: {name}", {**files, weights: data})


def config_cases(folder: Path) -> Iterator[Case]:
    files = hf_folder(folder)
    write_meta(folder / "meta", build("llama-3"))
    meta = {file.name: file.read_bytes() for file in (folder / "meta").iterdir()}
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(_names(files), "model.safetensors")}
    places: list[tuple[dict[str, bytes], str, dict[str, Any]]] = [
        (files, "config.json", json.loads(files["config.json"])),
        (
            files,
            "generation_config.json",
            {"eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.9, "do_sample": True},
        ),
        (files, "model.safetensors.index.json", index),
        (meta, "params.json", meta_params(build("llama-3").config)),
    ]
    for base, name, _ in places:
        base = {k: v for k, v in base.items() if name.endswith("index.json") is False or k != "model.safetensors"}
        for label, text in hostile_texts():
            yield Case(f"{name}: {label}", {**base, name: text})
    for number in range(400):
        base, name, content = places[number % len(places)]
        label, data = with_value(content, random.Random(f"config {number}"))
        yield Case(f"{name} {number}: {label}", {**base, name: data})


def adapter_cases(folder: Path) -> Iterator[Case]:
    """PEFT folders: adapter_config.json and the weights' names."""
    place = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    weights = save({f"{place}A.weight": torch.ones(4, 64), f"{place}B.weight": torch.ones(64, 4)})
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "use_rslora": False,
        "alpha_pattern": {"layers.0.self_attn.q_proj": 4}, "rank_pattern": {}, "init_lora_weights": True, "use_dora": False,
        "base_model_name_or_path": "x", "fan_in_fan_out": False, "modules_to_save": None, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    good = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}
    for label, text in hostile_texts():
        yield Case(f"adapter_config.json: {label}", {**good, "adapter_config.json": text}, must_fail=True)
    for number in range(100):
        label, data = with_value(config, random.Random(f"adapter {number}"))
        yield Case(f"adapter_config.json {number}: {label}", {**good, "adapter_config.json": data})
    for number, data in enumerate(safetensors_mutants(60, good=weights)):
        yield Case(f"adapter weights, mutant {number}", {**good, "adapter_model.safetensors": data})


def open_adapter(path: Path) -> None:
    """An adapter of the small model."""
    read_peft(path, build("llama-3").config)


def _names(files: dict[str, bytes]) -> list[str]:
    size = int.from_bytes(files["model.safetensors"][:8], "little")
    return [name for name in json.loads(files["model.safetensors"][8 : 8 + size]) if name != "__metadata__"]


def vocabulary_cases(folder: Path) -> Iterator[Case]:
    pieces = vocabularies.trained_pieces()
    contents = [small_json(), hf_pieces(PieceModel.parse(pieces), legacy=True)]
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "default", "template": "{{ x }}"}],
        "added_tokens_decoder": {"600": {"content": "<x>", "special": True}},
        "chat_format": "llama3",
    }
    return tokenizer_cases(pieces, contents, config, 300)


KINDS: Counts = {
    "gguf": (5_000, gguf_cases, read_gguf),
    "safetensors": (2_000, safetensors_cases, read_all),
    "torch": (1_000, torch_cases, read_all),
    "config": (300, config_cases, read_all),
    "adapter": (150, adapter_cases, open_adapter),
    "tokenizer": (300, vocabulary_cases, encode),
}
STEPS = {"gguf": 61, "safetensors": 37, "torch": 23, "config": 7, "adapter": 5, "tokenizer": 5}
"""Every how many-th file the quick test takes."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample(kind: str, tmp_path: Path) -> None:
    _, cases, examine = KINDS[kind]
    made = islice(cases(tmp_path / "made"), 3, None, STEPS[kind])
    (tmp_path / "open").mkdir()
    figures = survive(made, tmp_path / "open", examine)
    assert figures["refused"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all(kind: str, tmp_path: Path, measured: Measured) -> None:
    count, cases, examine = KINDS[kind]
    (tmp_path / "open").mkdir()
    figures = survive(cases(tmp_path / "made"), tmp_path / "open", examine)
    for name, figure in figures.items():
        measured(f"hostile {kind} files", name, figure)
    assert figures["refused"] + figures["loaded"] >= count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "torch", "config", "tokenizer"])
def test_inspect_survives_too(kind: str, tmp_path: Path) -> None:
    """`herd inspect` describes what cannot be opened instead of failing."""
    (tmp_path / "open").mkdir()
    made = islice(KINDS[kind][1](tmp_path / "made"), 0, None, 11)
    survive(made, tmp_path / "open", lambda path: inspect(path) and None, (HerdError,))


@pytest.mark.slow
def test_the_safetensors_package_judges_the_same(tmp_path: Path) -> None:
    """The header alone, without the model around it: accepted by both or refused by both."""
    file, accepted = tmp_path / "x.safetensors", 0
    for number, data in enumerate(safetensors_mutants(2_000, seed=7)):
        file.write_bytes(data)
        expected = theirs(file)
        try:
            SafetensorsFile(file)
            found = True
        except CheckpointError:
            found = False
        if expected is not None and not found:
            assert repeated(data), number
        else:
            assert found == (expected is not None), number
        accepted += found
    assert 100 < accepted < 1_900


def test_valid_ones_load(tmp_path: Path) -> None:
    """The files that are damaged here are good to begin with."""
    hf_folder(tmp_path)
    read_all(tmp_path / "hf")
    write_meta(tmp_path / "meta", build("llama-3"))
    read_all(tmp_path / "meta")
    save_bin(tmp_path / "bin", build("llama-3"))
    read_all(tmp_path / "bin")
    (tmp_path / "tokenizer.json").write_text(json.dumps(small_json()))
    encode(tmp_path)
    load_tokenizer(tmp_path / "tokenizer.json")
