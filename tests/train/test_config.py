"""Run configurations: every field documented, every mistake named, YAML there and back."""

import dataclasses
import subprocess
import sys
import typing

import pytest
import yaml

from herd.data.config import DataPart, SourcePart, StagePart
from herd.errors import ConfigError
from herd.parallel.config import ParallelPart
from herd.train import config as parts
from herd.train.config import RunConfig
from herd.train.overrides import KNOWN_ELSEWHERE, dump_config, leaves, load_config
from herd.train.typed import documents, keys

LEAST = {
    "recipe": "sft",
    "out": "runs/x",
    "model": {"source": "nano"},
    "data": {"sources": "chats.jsonl"},
    "train": {"budget": {"steps": 10}},
}
CLASSES = [
    *(value for value in vars(parts).values() if dataclasses.is_dataclass(value)),
    DataPart, SourcePart, StagePart, ParallelPart,
]  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_is_documented(cls):
    assert [name for name in keys(cls) if len(documents(cls).get(name, "")) < 10] == []


def test_the_least_configuration_has_defaults_and_short_forms():
    made = load_config(LEAST)
    assert made.data.sources == (SourcePart(path="chats.jsonl"),)
    assert (made.method.kind, made.train.optim.kind, made.parallel) == ("full", "adamw", ParallelPart())
    two = load_config({**LEAST, "data": {"sources": ["a.jsonl", {"path": "b.jsonl", "weight": 3}]}})
    assert [(source.path, source.weight) for source in two.data.sources] == [("a.jsonl", 1.0), ("b.jsonl", 3.0)]


RICH = [
    "method.kind=dora",
    "train.average={kind: tail, start: 0.5}",
    "train.evaluate.prompts=['Who are you?', 'a: b']",
    "data.stages=[{until: 0.5, weights: {chats: 1}}, {until: 1, weights: {chats: 2}}]",
    "train.checkpointing=3",
    "train.optim.betas=[0.8, 0.9]",
]


@pytest.mark.parametrize("comments", [False, True])
def test_yaml_there_and_back(tmp_path, comments):
    made = load_config(LEAST, RICH)
    text = dump_config(made, comments=comments)
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == made
    assert ("# " in text) == comments
    # PyYAML's own loader reads the same keys, in order.
    assert list(yaml.safe_load(text)) == keys(RunConfig)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.optim.lr=1e-4", "train.optim.lr", 1e-4),  # a text for YAML 1.1
        ("--train.optim.lr=3", "train.optim.lr", 3.0),
        ("train.budget.tokens=1e9", "train.budget.tokens", 10**9),
        ("train.compile=true", "train.compile", True),
        ("train.optim.clip=null", "train.optim.clip", None),
        ("train.loss_chunk=1024", "train.loss_chunk", 1024),
        ("out=1e3", "out", "1e3"),  # texts stay as they were typed
        ("out=a=b: c", "out", "a=b: c"),
        ("data.held_out=1%", "data.held_out", "1%"),
        ("train.checkpointing=full", "train.checkpointing", "full"),
        ("train.checkpointing=4", "train.checkpointing", 4),
        ("report.to=trackio", "report.to", ("trackio",)),
        ("method.targets=[wq, wv]", "method.targets", ("wq", "wv")),
        ("data.sources.0.weight=2", "data.sources.0.weight", 2.0),
        ("model.rope_scaling={factor: 8}", "model.rope_scaling", {"factor": 8}),
    ],
)
def test_overrides_are_typed(override, key, value):
    made: typing.Any = load_config(LEAST, [override])
    for part in key.split("."):
        made = made[int(part)] if part.isdigit() else getattr(made, part)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.optm.lr=1", r"^train\.optm: there is no such key; did you mean optim\?"),
        ("train.optim.lrr=1", r"train\.optim\.lrr: .* did you mean lr\?"),
        ("learning_rate=1", r"learning_rate: .* herd calls it train\.optim\.lr"),
        ("train.gradient_accumulation_steps=1", r"herd calls it train\.accumulate"),
        ("rank=8", r"did you mean method\.rank\?"),
        ("bananas=1", r"the keys here are recipe, out,"),
        ("train.optim.lr=fast", r"train\.optim\.lr: expected a number, not 'fast'"),
        ("train.compile=1", r"train\.compile: expected true or false, not '1'"),
        ("train.budget.steps=1.5", r"train\.budget\.steps: expected a whole number or null, not '?1\.5"),
        ("train.budget.steps=true", r"train\.budget\.steps: expected a whole number or null, not"),
        ("train.budget.steps=0", r"train\.budget\.steps: 0 must be positive"),
        ("train.optim.kind=adm", r"train\.optim\.kind: expected one of adamw, adamw8bit, muon, not 'adm'"),
        ("train.optim.lr=-1", r"train\.optim\.lr: -1\.0 must be at least 0"),
        ("train.optim=3", r"train\.optim: expected keys \(kind, lr"),
        ("train.optim.betas=[0.9]", r"train\.optim\.betas: expected a list of 2 numbers"),
        ("data.sources.1.path=x", r"1 is no item of a list of 1"),
        ("train.checkpointing=most", r"train\.checkpointing: expected one of none, full, attention or a whole number"),
        ("train.optim.lr", r"write KEY=VALUE"),
        ("method.targets=[wq", r"method\.targets: .* is not YAML"),
        ("recipe=dpo", r"recipe: expected one of pretrain, sft, extend, not 'dpo'"),
        ("recipe=extend", r"stages: the recipe extend needs at least one"),
        ("model.shape=1b", r"model: give source .* or shape .* not both"),
        ("method={kind: lora, qat: q4_0}", r"method\.qat: only method\.kind full"),
        ("report.to=[tensorbord]", r"report\.to\.0: expected one of trackio, wandb, mlflow"),
    ],
)
def test_mistakes_are_named_by_key(override, said):
    with pytest.raises(ConfigError, match=said):
        load_config(LEAST, [override])


def test_what_is_missing_is_named():
    for key in ("out", "data", "recipe"):
        with pytest.raises(ConfigError, match=rf"^{key} is missing: "):
            load_config({name: value for name, value in LEAST.items() if name != key})
    with pytest.raises(ConfigError, match=r"^train\.budget is missing"):
        load_config({**LEAST, "train": {}})
    with pytest.raises(ConfigError, match=r"^train\.budget: give steps, minutes or tokens"):
        load_config({**LEAST, "train": {"budget": {}}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: sft\nrecipe: pretrain\n", r"line 2: the key 'recipe' is given twice"),
        ("recipe: [sft\n", r"line 2"),
        ("- a\n", r"expected keys with values"),
        ("", r"expected keys with values"),
        ("recipe: !!python/object/apply:os.system [true]\n", r"line 1: could not determine a constructor"),
    ],
)
def test_bad_files_are_named(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"run\.yaml.*{said}"):
        load_config(path)
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "none.yaml")


def test_names_of_other_trainers_lead_to_keys_that_exist():
    known = [key for key, _, _ in leaves()]
    for name, here in KNOWN_ELSEWHERE.items():
        key = here.split(" ")[0].split("=")[0]
        assert key in {"the", "data.sources"} or key in known, (name, here)


def test_no_torch_for_a_configuration():
    code = "import sys, herd.train.overrides; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
