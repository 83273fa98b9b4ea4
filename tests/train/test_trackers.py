"""Trackers against fakes with the public signatures of trackio 0.43, wandb 0.31 and mlflow 3.17."""

import importlib.util
import sys
import types

import pytest

from herd.errors import ConfigError
from herd.train.overrides import load_config
from herd.train.trackers import check_trackers, trackers_of
from tests.train.test_metrics import begin, figures, step


class Said(list):
    """What a fake was told, in order."""

    def tell(self, kind, /, **facts):
        self.append((kind, facts))


def fake_trackio(said):
    api = types.ModuleType("trackio")

    def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
             resume="never", settings=None, private=None, embed=True):  # fmt: skip
        assert isinstance(config, dict)
        said.tell("init", project=project, name=name, resume=resume)

    def log(metrics, step=None):
        said.tell("log", metrics=metrics, step=step)

    api.init, api.log, api.finish = init, log, lambda: said.tell("finish")  # type: ignore[attr-defined]
    return api


def fake_wandb(said):
    api = types.ModuleType("wandb")

    class Run:
        id = "abc123"

        def log(self, data, step=None, commit=None):
            said.tell("log", metrics=data, step=step)

        def finish(self, exit_code=None):
            said.tell("finish")

    def init(
        entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, *, resume=None
    ):
        said.tell("init", project=project, name=name, id=id, resume=resume)
        return Run()

    api.init, api.Html = init, lambda text: text  # type: ignore[attr-defined]
    return api


def fake_mlflow(said):
    api = types.ModuleType("mlflow")

    def start_run(run_id=None, experiment_id=None, run_name=None, nested=False):
        said.tell("init", id=run_id, name=run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc123"))

    api.set_experiment = lambda experiment_name=None, experiment_id=None: said.tell("experiment", name=experiment_name)  # type: ignore[attr-defined]
    api.start_run = start_run  # type: ignore[attr-defined]
    api.log_params = lambda params, synchronous=None, run_id=None: said.tell("params", **params)  # type: ignore[attr-defined]
    api.log_metrics = lambda metrics, step=None: said.tell("log", metrics=metrics, step=step)  # type: ignore[attr-defined]
    api.log_text = lambda text, artifact_file, run_id=None: said.tell("text", file=artifact_file)  # type: ignore[attr-defined]
    api.end_run = lambda status="FINISHED": said.tell("finish")  # type: ignore[attr-defined]
    return api


FAKES = {"trackio": fake_trackio, "wandb": fake_wandb, "mlflow": fake_mlflow}


def config(name, out):
    return load_config(
        {"recipe": "sft", "out": str(out), "model": {"source": "nano"}, "data": {"sources": "a.jsonl"},
         "train": {"budget": {"steps": 9}}, "report": {"to": name, "project": "llamas"}}
    )  # fmt: skip


@pytest.mark.parametrize("name", FAKES)
def test_a_tracker_is_told_the_run_and_goes_on_with_it(name, tmp_path, monkeypatch):
    said = Said()
    monkeypatch.setitem(sys.modules, name, FAKES[name](said))
    (tracker,) = trackers_of(config(name, tmp_path / "run-1"), tmp_path / "run-1", figures())
    tracker.on_begin(begin())
    tracker.on_step(step(1))
    tracker.on_evaluation(1, {"bits_per_byte": 1.25})
    tracker.on_text(1, "Hi <b>", "<i>")
    tracker.on_end({})
    kinds = [kind for kind, _ in said]
    assert kinds.count("init") == kinds.count("finish") == 1
    first = dict(said)["init"]
    assert first["name"] == "run-1"
    logged = [facts for kind, facts in said if kind == "log"]
    assert logged[0]["step"] == 1
    assert logged[0]["metrics"]["train/loss"] == 1.0
    assert logged[1]["metrics"] == {"eval/bits_per_byte": 1.25}
    if name != "trackio":
        assert first["id"] is None
    if name == "wandb":
        assert list(logged[2]["metrics"].values()) == ["<pre>&lt;i&gt;</pre>"]
    del said[:]
    (again,) = trackers_of(config(name, tmp_path / "run-1"), tmp_path / "run-1", figures())
    again.on_begin(begin(step=1))
    second = dict(said)["init"]
    assert second["resume"] == "allow" if name == "trackio" else second["id"] == "abc123"


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r'wandb is not installed: pip install "herd\[wandb\]"'):
        trackers_of(config("wandb", tmp_path), tmp_path, figures())
    monkeypatch.delitem(sys.modules, "wandb")
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ConfigError, match=r"herd\[wandb\]"):
            check_trackers(config("wandb", tmp_path).report)
