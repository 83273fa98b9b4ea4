"""Prefix and prompt tuning on grouped-query models: PEFT's logits and losses both ways, packed documents, and refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from herd.adapters.prefix import Prefix, PrefixTuned, Prompt, PromptTuned, tune_prefix, tune_prompt
from herd.checkpoint.adapter import read_adapter
from herd.checkpoint.peft import read_peft
from herd.checkpoint.peft_virtual import read_virtual, write_virtual
from herd.errors import CheckpointError, ConfigError
from herd.model.attend import packed
from herd.model.llama import Llama
from herd.quant.apply import quantize
from tests.adapters.steps import losses
from tests.adapters.test_apply import LOGITS, LOSSES, train
from tests.build import build, tokens
from tests.checkpoint.folders import oracle

# PEFT asks transformers under a name that is going away; nothing in herd can change it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

COUNT = 5
GAIN = 0.2
"""Nats in 25 steps: the batches differ by less, and virtual tokens of a random model cannot do much more."""
MODELS = ["llama-2", "llama-3", "llama-3.2"]
KINDS = ["prefix", "projected", "prompt"]


def saved_by_peft(folder: Path, model: Llama, kind: str) -> Any:
    torch.manual_seed(2)
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": COUNT}
    if kind == "prompt":
        config: Any = peft.PromptTuningConfig(**shared)
    else:
        config = peft.PrefixTuningConfig(**shared, prefix_projection=kind == "projected", encoder_hidden_size=24)
    made = peft.get_peft_model(oracle(model), config)
    with warnings.catch_warnings():  # the base has no name to look up
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return made.eval()


def tuned(model: Llama, folder: Path) -> PrefixTuned | PromptTuned:
    adapter = read_virtual(folder, model.config)
    return PrefixTuned(model, adapter) if isinstance(adapter, Prefix) else PromptTuned(model, adapter)


def theirs_on(made: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the real tokens: prompt tuning gives those of virtual ones, too."""
    return made(input_ids=ids).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_peft_both_ways(name: str, kind: str, tmp_path: Path) -> None:
    model = build(name)
    ids = tokens(model.config, 24, batch=2)
    theirs = saved_by_peft(tmp_path / "theirs", model, kind)
    ours = tuned(model, tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs_on(theirs, ids)
        assert (ours(ids) - expected).abs().max() <= LOGITS
        assert (model(ids) - expected).abs().max() > 100 * LOGITS
    (tmp_path / "ours").mkdir()
    write_virtual(ours.adapter("some base"), tmp_path / "ours", model.config, lambda _: None)
    back = peft.PeftModel.from_pretrained(oracle(model), tmp_path / "ours").eval()
    with torch.no_grad():
        assert (theirs_on(back, ids) - expected).abs().max() <= LOGITS
    one, other = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])
    assert read_virtual(tmp_path / "ours", model.config).base == "some base"


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_twenty_steps_lose_what_peft_loses(kind: str, tmp_path: Path) -> None:
    model = build("llama-3")
    theirs = saved_by_peft(tmp_path, model, kind).train()
    ours = tuned(model, tmp_path).train()
    expected = losses(lambda ids: theirs_on(theirs, ids), theirs.parameters(), model.config)
    found = losses(ours, ours.parameters(), model.config)
    assert max(abs(x - y) for x, y in zip(expected, found, strict=True)) <= LOSSES


@pytest.mark.parametrize("tune", [tune_prefix, tune_prompt])
def test_every_packed_document_begins_with_the_virtual_tokens(tune: Any) -> None:
    model = tune(build("llama-3"), COUNT, "random")
    documents = [tokens(model.config, length, seed=length)[0] for length in (7, 1, 12)]
    row = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    with torch.no_grad():
        together = model(row, positions, packed(model.config, positions))[0]
        apart = torch.cat([model(d[None])[0] for d in documents])
    assert (together - apart).abs().max() <= LOGITS


@pytest.mark.parametrize("start", ["vocabulary", [5, 6, 7]])
def test_a_start_from_ids_is_those_ids(start: Any) -> None:
    """Behind a prefix or prompt made of ids, the model says what it says behind the ids themselves."""
    model = build("llama-3")
    torch.manual_seed(4)
    given = torch.randint(model.config.vocab_size, (3,)) if start == "vocabulary" else torch.tensor(start)
    ids = tokens(model.config, 9)
    with torch.no_grad():
        expected = model(torch.cat([given[None], ids], 1))[:, 3:]
        for tune in (tune_prefix, tune_prompt):
            torch.manual_seed(4)
            assert (tune(model, 3, start)(ids) - expected).abs().max() <= LOGITS


@pytest.mark.parametrize("base", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", "nf4"])
@pytest.mark.parametrize("tune", [tune_prefix, tune_prompt])
def test_the_trainer_teaches_virtual_tokens_and_leaves_the_base(base: str, tune: Any) -> None:
    model = build("llama-3")
    model = model if base == "nf4" else model.to(getattr(torch, base))
    if base == "nf4":
        quantize(model, "nf4")
    ids = tokens(model.config, 9)
    with torch.no_grad():
        plain = model(ids)
    torch.manual_seed(0)
    ours = tune(model, 8)
    losses = train(ours, 25, rate=0.3 if tune is tune_prompt else 0.05)
    assert sum(losses[-5:]) / 5 < losses[0] - GAIN
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), plain), "the base is as it was, and can be used beside the tuned one"


def test_refusals(tmp_path: Path) -> None:
    model = build("llama-3")
    with pytest.raises(ConfigError, match="Llama 4"):
        tune_prefix(build("llama-4-scout"), 3, "zero")
    with pytest.raises(ConfigError, match="Llama 4"):
        tune_prompt(build("llama-guard-4"), 3)
    for count in (0, -1, 2.5):
        with pytest.raises(ConfigError, match="virtual tokens"):
            tune_prefix(model, count)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="start as"):
        tune_prompt(model, 3, [model.config.vocab_size])
    with pytest.raises(ConfigError, match="already"):
        tune_prefix(tune_prompt(model, 3), 3)
    with pytest.raises(CheckpointError, match="dim 64"):
        PromptTuned(model, Prompt(torch.zeros(3, 63)))
    with pytest.raises(CheckpointError, match="this base has"):
        PrefixTuned(model, Prefix(torch.zeros(2, 3, 4, 16), torch.zeros(2, 3, 4, 16)))
    with pytest.raises(ConfigError, match="a cache holds their keys"):
        tune_prompt(model, 3).hidden(torch.zeros(1, 2, 64), None, [lambda q, k, v, chunk: q] * 2)
    saved_by_peft(tmp_path, model, "prefix")
    assert isinstance(read_adapter(tmp_path, model.config), Prefix)
    with pytest.raises(ConfigError, match="cannot be merged or converted"):
        read_peft(tmp_path, model.config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_virtual_tokens": 6}, "6 virtual tokens"), ({"num_attention_heads": 4}, "key/value heads"),
        ({"num_transformer_submodules": 2}, "encoder"), ({"invented_later": 1}, "invented_later"),
        ({"peft_type": "P_TUNING"}, "P_TUNING"), ({"peft_type": "PROMPT_TUNING"}, "dim 64"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"num_layers": 4}, "num_layers is 4: this base has 2"),
        ({"token_dim": 64}, "token_dim is 64: this base has 2 key/value heads of 16"),
    ],
)  # fmt: skip
def test_damaged_folders_are_named(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path, model, "prefix")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises((ConfigError, CheckpointError), match=told):
        read_virtual(tmp_path, model.config)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path, model, "prompt")
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    for wrong, told in (
        ({"prompt_embeddings": state["prompt_embeddings"][:, :-1].contiguous()}, "shape"),
        ({"other": state["prompt_embeddings"]}, "prompt_embeddings alone"),
        ({"prompt_embeddings": state["prompt_embeddings"] / 0}, "not finite"),
    ):
        save_file(wrong, file)
        with pytest.raises(CheckpointError, match=told):
            read_virtual(tmp_path, model.config)
