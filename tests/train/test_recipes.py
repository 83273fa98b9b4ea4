"""Recipes from a configuration to a folder that others open: every generation, every method, stages, what is refused."""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import herd
from herd.chat.formats import detect
from herd.chat.templates import template_of
from herd.checkpoint.open import open_store
from herd.checkpoint.peft import read_peft
from herd.checkpoint.peft_virtual import read_virtual
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.vocabulary import load_tokenizer
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.errors import CheckpointError, ConfigError
from herd.model.accounting import parameters
from herd.model.config import irope
from herd.quant.apply import dequantize, quantize
from herd.tokenizer.sentencepiece import SentencePieceTokenizer
from herd.train import export as exporting
from herd.train.forecast import forecast
from herd.train.metrics import read_log
from herd.train.overrides import load_config
from herd.train.recipes.catalog import names, recipe_file, recipe_module, summary
from herd.train.run import run_recipe
from herd.train.start import shape_config
from herd.train.tokenizer import learn, write_vocabulary
from herd.train.watch import Recorder
from tests.build import build, tiny
from tests.vocabularies import trained_pieces

STEPS = 3
EQUAL = 1e-4
"""Logits of one model in herd and in another program: the same products, added in another order."""
MERGED = 1e-5
"""Logits of order one, with an adapter beside its matrices or in them: the bar of the plan."""
NEAR = 0.3
"""Of memory: kernels, allocators and libraries differ between machines by more than a few percent."""
KINDS = {"llama-2": "llama2", "llama-3": "llama3", "llama-4-maverick": "llama3"}
"""Generation -> a prompt format for which a small vocabulary is at hand. That of Llama 4 differs in its headers alone."""


@cache
def tokenizer(name):
    """A small vocabulary of a generation's kind: it is read and written many times."""
    with tempfile.TemporaryDirectory() as place:
        if name == "llama-2":
            path = Path(place) / "tokenizer.model"
            path.write_bytes(trained_pieces())
            return load_tokenizer(path)
        text = " ".join(f"{i} and 1? That is {i + 1}. word so on" for i in range(12)).encode()
        write_vocabulary(learn([text], "tiktoken", 300, special=32), Path(place), [text])
        return load_tokenizer(place)


def written(tmp_path, name="llama-3", **changes):
    """A tiny model of a generation with a vocabulary of its kind, in a folder."""
    vocabulary = tokenizer(name)
    config = replace(tiny(name), vocab_size=vocabulary.vocab_size, **changes)
    model = build(config)
    folder = tmp_path / name
    kept = GenerationDefaults(vocabulary.special.stop)
    write_hf(Source(ModelStore(model), vocabulary, kept, template_of(KINDS[name])), folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Each model is written once."""

    @cache
    def made(name="llama-3", **changes):
        return written(tmp_path_factory.mktemp("source"), name, **changes)

    return made


@pytest.fixture
def chats(tmp_path):
    return talks(tmp_path)


def talks(tmp_path):
    """A file of conversations."""
    path = tmp_path / "chats.jsonl"
    with open(path, "w") as file:
        for i in range(12):
            messages = [
                {"role": "user", "content": f"{i} and 1?"},
                {"role": "assistant", "content": f"That is {i + 1}."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(f"word{j % (i + 3)} and so on" for j in range(60)))
    return folder


def config(tmp_path, recipe, *overrides):
    common = [
        f"out={tmp_path / 'run'}", f"data.shards={tmp_path / 'shards'}", "data.processes=1", "data.workers=0",
        f"train.budget.steps={STEPS}", "data.length=64", "data.rows=2", "train.evaluate.prompts=[Hi]",
        "train.evaluate.max_tokens=4", "train.schedule.warmup_steps=1", "device=cpu", "data.held_out=null",
    ]  # fmt: skip
    return load_config(recipe_file(recipe), [*common, *overrides])


def done(made, **given):
    told = []
    figures = run_recipe(made, tell=told.append, **given)
    return figures, "\n".join(told)


@pytest.mark.parametrize("name", KINDS)
def test_fine_tuning_of_every_generation(name, source, chats, tmp_path):
    folder = source(name)
    recorder = Recorder()
    made = config(
        tmp_path, "sft", f"model.source={folder}", f"data.sources={chats}", "data.held_out=45%", "train.optim.lr=1e-2"
    )
    ticks = []
    figures, told = done(made, watchers=[recorder], tick=ticks.append)
    assert next(tick.total for tick in ticks if tick.doing == "loading") > 0
    assert [tick.done == tick.total for tick in ticks if tick.doing == "loading"][-1]
    assert figures["bits_per_byte"] > 0
    assert [step.step for step in recorder.steps] == [1, 2, 3]
    assert recorder.steps[-1].loss < recorder.steps[0].loss
    assert recorder.texts[0][1] == "Hi"
    model, vocabulary = herd.load(tmp_path / "run" / "model")
    assert detect(vocabulary).name == KINDS[name]
    assert model.config == open_store(folder).config
    assert "read back" in told
    before = dict(herd.load(folder)[0].named_parameters())
    assert any(not torch.equal(weight, before[key]) for key, weight in model.named_parameters())
    for part in ("config.yaml", "log.jsonl", "tensorboard", "checkpoints", "model/generation_config.json"):
        assert (tmp_path / "run" / part).exists(), part


def test_transformers_opens_the_result(source, chats, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = config(tmp_path, "sft", f"model.source={source()}", f"data.sources={chats}", "data.held_out=null")
    done(made)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    model, _ = herd.load(tmp_path / "run" / "model", "float32")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids), rtol=0, atol=EQUAL)


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora", "prefix", "prompt"])
def test_adapters_of_every_kind(kind, source, chats, tmp_path):
    # NF4 takes 64 weights a block, so rows are multiples of 64.
    folder = source("llama-3", hidden_dim=192)
    made = config(
        tmp_path, "lora", f"model.source={folder}", f"data.sources={chats}", f"method.kind={kind}", "method.rank=4",
        "method.tokens=3", "train.optim.lr=1e-2",
    )  # fmt: skip
    recorder = Recorder()
    done(made, watchers=[recorder])
    assert recorder.steps[-1].loss < recorder.steps[0].loss
    result, geometry = tmp_path / "run" / "adapter", open_store(folder).config
    if kind in ("prefix", "prompt"):
        kept = read_virtual(result, geometry)
        with herd.LLM(folder, max_len=64, max_seqs=1) as llm:  # what was trained is what is served
            assert llm.load_adapter("tuned", result).virtual == 3
            assert llm.generate([[5, 6, 7]], llm.params(max_tokens=2), adapter="tuned")[0].outputs[0].tokens
    else:
        kept = read_peft(result, geometry)
        assert kept.rank == 4
        assert kept.dora == (kind == "dora")
        assert all(bool(pair.b.any()) for pair in kept.factors.values())
    assert kept.base == str(folder.resolve())
    assert not (tmp_path / "run" / "model").exists()


def test_peft_computes_what_was_trained(source, chats, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = source()
    done(config(tmp_path, "lora", f"model.source={folder}", f"data.sources={chats}", "train.optim.lr=1e-2"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own use of transformers
        other = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    from herd.adapters.apply import apply_adapter

    model, _ = herd.load(folder, "float32")
    ids = torch.arange(5, 40)[None]
    plain = model(ids)
    apply_adapter(model, read_peft(tmp_path / "run" / "adapter", model.config))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids), rtol=0, atol=EQUAL)
        assert float((model(ids) - plain).abs().max()) > 100 * EQUAL


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_adapter_and_the_merged_model_beside_it(kind, source, chats, tmp_path):
    made = config(
        tmp_path,
        "lora",
        f"model.source={source('llama-3', hidden_dim=192)}",
        f"data.sources={chats}",
        f"method.kind={kind}",
        "train.optim.lr=1e-2",
        "method.save_merged=true",
    )
    _, told = done(made)
    assert "merged model written" in told
    from herd.adapters.apply import apply_adapter

    model, merged = herd.load(made.model.source, "float32")[0], herd.load(tmp_path / "run" / "model", "float32")[0]
    adapter = read_peft(tmp_path / "run" / "adapter", model.config)
    plain, ids = model(torch.arange(5, 40)[None]), torch.arange(5, 40)[None]
    apply_adapter(model, adapter)
    torch.testing.assert_close(merged(ids), model(ids), rtol=0, atol=MERGED)
    assert float((model(ids) - plain).detach().abs().max()) > 100 * MERGED


def test_an_adapter_merged_into_what_four_bits_kept_of_its_base(source, chats, tmp_path):
    """The logits of QLoRA as it trains: the base's numbers are those of its blocks."""
    folder = source("llama-3", hidden_dim=192)
    done(
        config(
            tmp_path,
            "lora",
            f"model.source={folder}",
            f"data.sources={chats}",
            "method.kind=qlora",
            "train.optim.lr=1e-2",
        )
    )
    from herd.adapters.apply import apply_adapter

    model, vocabulary = herd.load(folder, "float32")
    quantize(model, "nf4")
    kept = GenerationDefaults(vocabulary.special.stop)
    write_hf(Source(ModelStore(dequantize(model)), vocabulary, kept, template_of(KINDS["llama-3"])), tmp_path / "kept")
    assert herd.merge(tmp_path / "kept", tmp_path / "run" / "adapter", tmp_path / "merged", greedy=0).passed
    ids = torch.arange(5, 40)[None]
    apply_adapter(model, read_peft(tmp_path / "run" / "adapter", model.config))
    merged = herd.load(tmp_path / "merged", "float32")[0]
    torch.testing.assert_close(merged(ids), model(ids), rtol=0, atol=MERGED)
    other = herd.load(folder, "float32")[0]
    apply_adapter(other, read_peft(tmp_path / "run" / "adapter", other.config))
    assert float((merged(ids) - other(ids)).detach().abs().max()) > 100 * MERGED


def test_pretraining_from_texts_and_going_on(texts, tmp_path):
    made = config(
        tmp_path, "pretrain", f"data.sources={texts}", "model.shape={dim: 32, n_layers: 2, n_heads: 2}", "data.held_out=40%",
        "train.accumulate=1",
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        done(made, watchers=[Interrupting(2)])
    first, _ = done(made, until=2)
    assert first == {}
    assert not (tmp_path / "run" / "model").exists()
    seen, watcher = [], Evaluating()
    figures, told = done(made, watchers=[watcher], tick=lambda at: seen.append((at.doing, at.done, at.total)))
    assert watcher.rows[0][0] == 0
    assert all(done == total > 0 for done, total in watcher.rows[-1:])
    for doing in ("writing", "reading back"):
        counts = [(done, total) for what, done, total in seen if what == doing]
        assert counts == sorted(counts)
        assert counts[-1][0] == counts[-1][1] == weights(tmp_path / "run" / "model")
    lines = list(read_log(tmp_path / "run" / "log.jsonl"))
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3]
    assert lines[-1]["event"] == "end"
    assert figures["bits_per_byte"] > 0
    assert "model written" in told
    model, vocabulary = herd.load(tmp_path / "run" / "model")
    assert detect(vocabulary).name == "base"  # the vocabulary's owner chats, this one does not
    assert model.config.max_seq_len == 64
    assert load_config(tmp_path / "run" / "config.yaml") == made


class Evaluating(Recorder):
    """How far evaluations were."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def on_evaluating(self, done, total):
        self.rows.append((done, total))


def weights(folder):
    """Bytes of its tensors."""
    store = open_store(folder)
    return sum(store.read(name).nbytes for name in store.names())


class Interrupting(Recorder):
    """Ctrl-C twice, in the middle of telling: nothing is saved."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_step(self, report):
        if report.step == self.at:
            raise KeyboardInterrupt


def test_stages_of_growing_length(texts, source, tmp_path):
    made = config(
        tmp_path, "extend", f"model.source={source()}", f"data.sources={texts}", "data.held_out=null", "train.budget.steps=4",
        "stages=[{length: 64, share: 1, rope_theta: 600000}, {length: 128, share: 3, rope_scaling: {factor: 2.0}}]",
    )  # fmt: skip
    done(made)
    first = open_store(tmp_path / "run" / "stage-1-64" / "model").config
    last = open_store(tmp_path / "run" / "model").config
    assert (first.rope_theta, first.rope_scaling, first.max_seq_len) == (600_000.0, None, 64)
    assert (last.rope_theta, last.max_seq_len) == (600_000.0, 128)
    assert last.rope_scaling is not None
    assert (last.rope_scaling.factor, last.rope_scaling.original_max_seq_len) == (2.0, 64)  # what the stage before had
    steps = [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl") if line["event"] == "step"]
    assert steps == [1, 2, 3]
    assert open_store(tmp_path / "run" / "stage-1-64" / "model").info("norm.weight").number == "float32"
    _, told = done(made)
    assert "done" in told
    assert load_config(tmp_path / "run" / "config.yaml") == made  # the folder goes on with all stages
    # A stage that was trained with other settings is not taken for this one.
    other = replace(made, train=replace(made.train, optim=replace(made.train.optim, lr=0.5)), threads=3)
    with pytest.raises(
        ConfigError, match=r"stage-1-64 is a stage of another run.*\n  train\.optim\.lr: 0\.0001 .* 0\.5 now"
    ) as error:
        done(other)
    assert "threads" not in str(error.value)


def test_a_longer_context_is_written_as_the_model_was_stored(texts, source, tmp_path):
    """Between stages weights are float32, so that nothing is rounded twice; the result is what its source was."""
    folder = source()
    small = tmp_path / "small"
    model, vocabulary = herd.load(folder)
    kept = GenerationDefaults(vocabulary.special.stop)
    write_hf(Source(ModelStore(model), vocabulary, kept, None), small, dtype=torch.bfloat16)
    made = config(
        tmp_path, "extend", f"model.source={small}", f"data.sources={texts}", "train.budget.steps=2",
        "train.evaluate.prompts=[]", "stages=[{length: 64}, {length: 128}]",
    )  # fmt: skip
    done(made)
    assert open_store(tmp_path / "run" / "stage-1-64" / "model").info("norm.weight").number == "float32"
    assert open_store(tmp_path / "run" / "model").info("norm.weight").number == "bfloat16"


def test_an_average_that_never_began_is_told(source, chats, tmp_path):
    common = [f"model.source={source()}", f"data.sources={chats}", "train.evaluate.prompts=[]"]
    _, told = done(config(tmp_path, "sft", *common, "train.average={kind: tail, every_steps: 100}"))
    assert "train.average: the run was over before anything was averaged" in told
    _, told = done(config(tmp_path, "sft", *common, f"out={tmp_path / 'b'}", "train.average={kind: ema}"))
    assert "train.average" not in told


def test_losses_of_routers_that_are_not_there_are_refused(source, chats, tmp_path):
    common = [f"model.source={source()}", f"data.sources={chats}"]
    with pytest.raises(ConfigError, match=r"train\.router_aux, train\.router_z: this model has no experts"):
        done(config(tmp_path, "sft", *common, "train.router_z=0.1"))


def test_stages_of_data_begin_at_their_share_of_the_tokens(source, chats, texts, tmp_path):
    """Rows of one short conversation each are mostly padding, which a budget of tokens does not count."""
    recorder = Recorder()
    made = config(
        tmp_path, "sft", f"model.source={source()}", f"data.sources=[{{path: {chats}, name: a}}, {{path: {chats}, name: b}}]",
        "data.stages=[{until: 0.5, weights: {a: 1}}, {until: 1, weights: {b: 1}}]", "data.pack=none",
        "train.budget={tokens: 1000}", "train.accumulate=1", "train.evaluate.prompts=[]",
    )  # fmt: skip
    done(made, watchers=[recorder])
    (begins,) = [note for note in recorder.notes if "stage 2 of 2 begins at row" in note]
    row = int(begins.rpartition(" ")[2])
    before = next(report for report in recorder.steps if report.step == row // made.data.rows)
    assert 0.5 <= before.progress < 0.6, "half of the tokens, to a step"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.length=600"], r"data\.length is 600, and the model is made for 512 positions"),
        (["data.length=512"], None),
        (["data.length=600", "model.max_seq_len=600"], None),
        (["train.evaluate.every_steps=5"], r"there is nothing to evaluate: data\.held_out"),
        (["train.evaluate.every_steps=5", "data.held_out=1%"], None),
        (["model.dtype=bfloat16"], r"products of weights of 16 bits are of 16 bits"),
        (["model.dtype=bfloat16", "train.precision=bfloat16"], None),
    ],
)
def test_what_is_probably_not_meant_is_told(overrides, said, chats, tmp_path):
    common = ["model.source=nano", f"data.sources={chats}", "train.evaluate.prompts=[]"]
    warnings = forecast(config(tmp_path, "lora", *common, *overrides)).warnings
    if said is None:
        assert warnings == ()
    else:
        assert len(warnings) == 1
        assert re.search(said, warnings[0])


def test_a_frozen_base_on_a_gpu_is_counted_as_it_is_held(chats, tmp_path):
    made = config(tmp_path, "lora", "model.source=nano", f"data.sources={chats}")
    here, there = forecast(made), forecast(replace(made, device="cuda"))
    assert here.weights - 4 * here.trained == 2 * (there.weights - 4 * there.trained)


def test_training_with_rounding_in_view(source, chats, tmp_path):
    folder = source("llama-3", hidden_dim=192)
    common = [f"model.source={folder}", f"data.sources={chats}", "train.optim.lr=1e-2"]
    recorder = Recorder()
    done(config(tmp_path, "sft", *common, "method.qat=q4_0"), watchers=[recorder])
    plain = Recorder()
    done(config(tmp_path, "sft", *common, f"out={tmp_path / 'plain'}"), watchers=[plain])
    # The first loss is that of the model which herd quantize would write, not of the float one.
    assert recorder.steps[0].loss != plain.steps[0].loss
    # And the result is float again, to be quantized.
    assert open_store(tmp_path / "run" / "model").info("layers.0.attention.wq.weight").number == "float32"


def test_a_result_of_other_numbers_is_refused(source, chats, tmp_path, monkeypatch):
    made = config(tmp_path, "sft", f"model.source={source()}", f"data.sources={chats}", "data.held_out=null")
    honest = exporting.write_hf

    def tampered(source, folder, **given):
        notes = honest(source, folder, **given)
        path = Path(folder) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40
        path.write_bytes(content)
        return notes

    monkeypatch.setattr(exporting, "write_hf", tampered)
    with pytest.raises(CheckpointError, match="other numbers than were trained"):
        done(made)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.chat_format=base"], r"data\.chat_format: the files of .* name the prompt format"),
        (["data.chat_format=llama9"], r"data\.chat_format: there is no prompt format 'llama9'"),
        (["method={kind: lora, rank: 64}"], r"rank 64 is not thin"),
        (["method={kind: lora, targets: [wz]}"], r"no matrix of this model is called 'wz'"),
        (["device=cuda"], r"device: cuda, but torch finds no GPU"),
        (["device=tpu9"], r"device: 'tpu9' is none"),
        (["model.rope_scaling={faktor: 2}"], r"model\.rope_scaling: .*faktor"),
        (["model.source=no-such-model"], r"no-such-model"),
        (["method={kind: lora}", "model.rope_theta=1e6"], r"an adapter \(lora\) cannot carry"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(overrides, said, source, chats, tmp_path):
    if "cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(herd.HerdError, match=said):
        done(config(tmp_path, "sft", f"model.source={source()}", f"data.sources={chats}", *overrides))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_shapes_from_a_few_numbers():
    made = shape_config({"dim": 256, "n_layers": 4}, 1000)
    assert (made.n_heads, made.head_dim, made.hidden_dim, made.tie_embeddings) == (4, 64, 704, True)
    four = shape_config({"dim": 64, "n_layers": 4, "chunk": 32, "moe": {"n_experts": 4}}, 1000)
    assert four.layers == irope(4, chunk=32, moe_layers=(1, 3), temper=False)
    for bad, said in (
        ({"dim": 64}, "n_layers is missing"),
        ({"dim": 64, "n_layers": 2, "n_head": 4}, "did you mean n_heads"),
        ({"dim": 63, "n_layers": 2}, "model.shape"),
        ({"dim": "64", "n_layers": 2}, "model.shape.dim: '64'"),
        ({"dim": 64, "n_layers": 2, "moe": {"experts": 4}}, "model.shape"),
    ):
        with pytest.raises(ConfigError, match=said):
            shape_config(bad, 1000)


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "prefix", "prompt"])
def test_the_forecast_counts_what_is_trained(kind, source, chats, tmp_path):
    from herd.train.start import adapt, start

    made = config(
        tmp_path, "lora", f"model.source={source()}", f"data.sources={chats}", f"method.kind={kind}", "method.rank=4",
        "train.accumulate=3",
    )  # fmt: skip
    told = forecast(made)
    model = adapt(start(made, torch.device("cpu")).model, made.method, 0)
    assert told.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert told.parameters == parameters(model.config) + (told.trained if kind != "full" else 0)
    assert told.tokens == 2 * 64 * 3
    assert any("3 steps" in line for line in told.lines())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_forecast_of_memory_is_near_what_a_run_takes(kind, chats, tmp_path):
    overrides = [
        "model.source=nano", f"data.sources={chats}", f"method.kind={kind}", "data.length=512", "data.rows=4",
        "data.held_out=null", "train.evaluate.prompts=[]", "train.budget.steps=3", f"out={tmp_path / 'run'}", "device=cpu",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "herd", "train", "lora", *overrides], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["event"] == "step"]
    told = forecast(load_config(recipe_file("lora"), overrides)).memory
    assert told == pytest.approx(steps[-1]["memory_bytes"], rel=NEAR)


@pytest.mark.parametrize("name", names())
def test_recipes_that_come_with_herd_are_whole(name):
    made = load_config(recipe_file(name), ["data.sources=FILE"])
    assert made.out == f"runs/{name}"
    assert summary(name)
    text = recipe_module(name).read_text()
    assert text.count("\n") < 130
    compile(text, name, "exec")


def test_a_small_vocabulary_of_pieces_is_one():
    assert isinstance(tokenizer("llama-2"), SentencePieceTokenizer)
