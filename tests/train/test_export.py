import json

import pytest
import torch

from herd.chat.templates import template_of
from herd.checkpoint.load import fill
from herd.checkpoint.open import open_store
from herd.checkpoint.write.hf_config import same_model
from herd.errors import ConfigError
from herd.model.config import LayerSpec, ModelConfig, RopeScaling, irope, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.train.export import export_folder

SHAPE = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48, "vocab_size": 64, "max_seq_len": 40}


@pytest.fixture(params=[True, False])
def exported(request, tmp_path):
    torch.manual_seed(0)
    model = init_weights(Llama(ModelConfig(**SHAPE, layers=plain(2), tie_embeddings=request.param, rope_theta=1e4)))
    export_folder(model, tmp_path, torch.float32, bos=0, stop=[1, 2], pad=3, sampling={"temperature": 0.5})
    return model, tmp_path


def test_herd_reads_what_was_written(exported):
    model, folder = exported
    again = fill(open_store(folder))
    assert again.config == model.config
    tokens = torch.arange(30)[None]
    assert torch.equal(again(tokens), model(tokens))


def test_transformers_computes_the_same_logits(exported):
    transformers = pytest.importorskip("transformers")
    model, folder = exported
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens), rtol=0, atol=1e-5)


def test_safetensors_reads_the_file(exported):
    safetensors = pytest.importorskip("safetensors.torch")
    model, folder = exported
    tensors = safetensors.load_file(folder / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], model.tok_embeddings.weight)
    assert ("lm_head.weight" in tensors) is not model.config.tie_embeddings
    start = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert start % 8 == 0


def test_settings_are_written(exported):
    _, folder = exported
    generation = json.loads((folder / "generation_config.json").read_text())
    ids = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 3}
    assert generation == ids | {"do_sample": True, "temperature": 0.5}
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in ids} == ids
    assert (folder / "chat_template.jinja").read_text() == template_of("llama3")


def test_every_generation_can_be_exported(tmp_path):
    """What training may build later: stretched frequencies, Llama 4's layers."""
    for layers, scaling in ((plain(1), RopeScaling(factor=8.0)), (irope(4, temper=False), None)):
        model = init_weights(Llama(ModelConfig(**SHAPE, layers=layers, rope_scaling=scaling)))
        folder = tmp_path / str(len(layers))
        export_folder(model, folder, torch.float32, bos=0, stop=[1], pad=2, sampling={})
        assert same_model(fill(open_store(folder)).config, model.config)


def test_what_cannot_be_said_is_refused(tmp_path):
    model = Llama(ModelConfig(**SHAPE, layers=(LayerSpec(chunk=4), LayerSpec(chunk=8))))
    with pytest.raises(ConfigError, match="different attention chunks"):
        export_folder(model, tmp_path, torch.float32, bos=0, stop=[1], pad=2, sampling={})
