"""What was written is compared with what was trained, by its numbers always, by logits where a second model costs little."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from herd.adapters.prefix import Prefix, Prompt
from herd.checkpoint import fill as filling
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.vocabulary import load_tokenizer
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.errors import CheckpointError
from herd.model.accounting import parameters
from herd.model.config import irope, plain
from herd.quant.late import LateMatrix
from herd.quant.linear import QuantExperts
from herd.train import export as exporting
from herd.train.config import MethodPart
from herd.train.overrides import load_config
from herd.train.recipes.catalog import recipe_file
from herd.train.start import adapt, start
from herd.train.tokenizer import learn, write_vocabulary
from tests.build import build, tiny

CPU = torch.device("cpu")
ROUTED = ("w1", "w2", "w3")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and one with routed experts, whose rows are whole blocks of NF4."""
    home, text = (
        tmp_path_factory.mktemp("bases"),
        " ".join(f"{i} and 1? That is {i + 1}. word so on" for i in range(12)).encode(),
    )
    write_vocabulary(learn([text], "tiktoken", 300, special=32), home, [text])
    vocabulary = load_tokenizer(home)
    changes = {"dim": 64, "hidden_dim": 64, "vocab_size": vocabulary.vocab_size}
    for name, kind, layers in (("llama-3", "llama-3", plain(2)), ("llama-4", "llama-4-maverick", None)):
        geometry = tiny(kind)
        if geometry.moe is not None:
            changes |= {"moe": replace(geometry.moe, hidden_dim=64)}
            layers = irope(2, chunk=None, moe_layers=(1,), temper=False)
        model = build(replace(geometry, layers=layers, **changes))
        write_hf(Source(ModelStore(model), vocabulary, GenerationDefaults(vocabulary.special.stop), None), home / name)
    return home


def described(base: Path, out: Path, kind: str):
    common = [f"model.source={base}", f"method.kind={kind}", "method.tokens=3", "method.rank=4"]
    return load_config(recipe_file("lora"), [*common, f"out={out}", "data.sources=x", "data.chat_format=llama3"])


def exported(base: Path, out: Path, kind: str):
    """The result of a run of no steps."""
    config = described(base, out, kind)
    begun = start(config, CPU)
    return exporting.export(adapt(begun.model, config.method, 0), begun, config)


def sevens(adapter):
    if isinstance(adapter, Prefix):
        return Prefix(torch.full_like(adapter.keys, 7), adapter.values, adapter.base)
    if isinstance(adapter, Prompt):
        return Prompt(torch.full_like(adapter.embeddings, 7), adapter.base)
    name = next(iter(adapter.factors))
    changed = replace(adapter.factors[name], a=torch.full_like(adapter.factors[name].a, 7))
    return replace(adapter, factors=adapter.factors | {name: changed})


@pytest.mark.parametrize(
    ("kind", "writer"), [("prefix", "write_virtual"), ("prompt", "write_virtual"), ("lora", "write_peft")]
)
def test_an_adapter_of_other_numbers_is_refused(bases, tmp_path, monkeypatch, kind, writer):
    """Of a large base, too, beside which no second one is made."""
    monkeypatch.setattr(exporting, "LARGE", 0)
    assert "read back and compared" in str(exported(bases / "llama-3", tmp_path / "honest", kind))
    honest = getattr(exporting, writer)
    monkeypatch.setattr(exporting, writer, lambda adapter, *rest: honest(sevens(adapter), *rest))
    with pytest.raises(CheckpointError, match="other numbers than were trained"):
        exported(bases / "llama-3", tmp_path / "sevens", kind)


def test_quantized_numbers_count_for_what_is_large(bases, tmp_path, monkeypatch):
    size = parameters(open_store(bases / "llama-3").config)
    for limit, measured in ((size, True), (size - 1, False)):
        monkeypatch.setattr(exporting, "LARGE", limit)
        made = exported(bases / "llama-3", tmp_path / str(limit), "qlora")
        assert (made.drift is not None) == measured


@pytest.mark.parametrize("targets", [None, ("wq",), ("experts", "wq")])
def test_experts_that_come_later_are_made_once_for_a_call(bases, monkeypatch, targets):
    """Not once for each expert: each time a whole tensor is read and encoded."""
    honest, made = filling._stored, Counter()

    def counted(store, name, *rest):
        made[name] += 1
        return honest(store, name, *rest)

    monkeypatch.setattr(filling, "_stored", counted)
    store = open_store(bases / "llama-4")

    def model(later):
        found = filling.fill(store, torch.float32, CPU, weights="nf4", later=later)
        return found if targets is None else adapt(found, MethodPart(kind="qlora", rank=4, targets=targets), 0)

    late = model(later=True)
    ids = torch.randint(store.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(exporting._logits(late, ids), exporting._logits(model(later=False), ids))
    assert [made[f"layers.1.feed_forward.experts.{key}"] for key in ROUTED] == [1, 1, 1]
    experts = next(module for module in late.modules() if isinstance(module, QuantExperts))
    assert all(isinstance(one, LateMatrix) for one in experts.matrices()), "nothing stays"
