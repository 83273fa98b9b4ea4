"""Trackers against fakes with the public signatures of trackio 0.43, wandb 0.31 and mlflow 3.17, and the packages themselves
where they are installed (each of them is an extra; a process of its own keeps their threads and files out of other tests)."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

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
    notes = []
    (tracker,) = trackers_of(config(name, tmp_path / "run-1"), tmp_path / "run-1", figures(), notes.append)
    tracker.on_begin(begin())
    tracker.on_step(step(1))
    tracker.on_evaluation(1, {"bits_per_byte": 1.25})
    tracker.on_text(1, "Hi <b>", "<i>")
    tracker.on_end({})
    assert notes == []
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
    (again,) = trackers_of(config(name, tmp_path / "run-1"), tmp_path / "run-1", figures(), notes.append)
    again.on_begin(begin(step=1))
    second = dict(said)["init"]
    assert second["resume"] == "allow" if name == "trackio" else second["id"] == "abc123"


def test_a_tracker_that_fails_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    said, notes = Said(), []
    api = fake_mlflow(said)
    monkeypatch.setitem(sys.modules, "mlflow", api)
    (tracker,) = trackers_of(config("mlflow", tmp_path), tmp_path, figures(), notes.append)
    honest = api.log_metrics

    def failing(metrics, step=None):
        raise ConnectionError("the server\n is away")

    tracker.on_begin(begin())
    tracker.on_step(step(1))
    api.log_metrics = failing
    tracker.on_step(step(2))
    tracker.on_step(step(3))
    api.log_metrics = honest
    tracker.on_step(step(4))
    tracker.on_end({})
    assert notes == [
        "mlflow did not take a report (ConnectionError: the server is away): the run goes on, log.jsonl has all",
        "mlflow did not take 2 of 5 reports: log.jsonl has all of them",
    ]
    assert [facts["step"] for kind, facts in said if kind == "log"] == [1, 4]


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    api = fake_mlflow(Said())

    def refusing(experiment_name=None, experiment_id=None):
        raise RuntimeError("no such place:\n  look at https://example.org")

    api.set_experiment = refusing
    monkeypatch.setitem(sys.modules, "mlflow", api)
    (tracker,) = trackers_of(config("mlflow", tmp_path), tmp_path, figures(), print)
    with pytest.raises(
        ConfigError, match=r"report\.to: mlflow cannot begin: RuntimeError: no such place: look at .* out of"
    ):
        tracker.on_begin(begin())


REAL = """
import sys
from pathlib import Path
from tests.train.test_metrics import begin, figures, step
from tests.train.test_trackers import config, trackers_of

name, out = sys.argv[1], Path(sys.argv[2])
for done in (0, 2):  # a run, and that run again
    notes = []
    (tracker,) = trackers_of(config(name, out), out, figures(), notes.append)
    tracker.on_begin(begin(step=done))
    for number in (done + 1, done + 2):
        tracker.on_step(step(number, loss=number / 8))
    tracker.on_evaluation(done + 2, {"bits_per_byte": done + 1.25})
    tracker.on_text(done + 2, "Hi <b>", "<i>")
    tracker.on_end({})
    assert notes == [], notes
"""


def kept_by_trackio(place: Path) -> tuple[int, list[tuple[int, str, float]]]:
    with sqlite3.connect(place / "trackio/llamas.db") as base:
        lines = base.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {line[1] for line in lines} == {"run-1"}
    found = [(step, key, value) for _, _, step, metrics in lines for key, value in json.loads(metrics).items()]
    return len({line[0] for line in lines}), found


def kept_by_mlflow(place: Path) -> tuple[int, list[tuple[int, str, float]]]:
    with sqlite3.connect(place / "mlflow.db") as base:
        (status,) = base.execute("SELECT name || ' ' || status FROM runs").fetchone()
        lines = base.execute("SELECT step, key, value, run_uuid FROM metrics ORDER BY step").fetchall()
        params = dict(base.execute("SELECT key, value FROM params").fetchall())
    assert status == "run-1 FINISHED"
    assert params["model.source"] == "nano"
    assert params["train.budget.steps"] == "9"
    return len({line[3] for line in lines}), [line[:3] for line in lines]


def kept_by_wandb(place: Path) -> tuple[int, list[tuple[int, str, float]]]:
    """It has no reader for its own files without its server: words stand in them as they are."""
    written = sorted(place.glob("run-1/wandb/offline-run-*/run-*.wandb"))
    assert len(written) == 2, "offline each part has a file, which `wandb sync` puts together by the run's name"
    for file in written:
        assert all(word in file.read_bytes() for word in (b"run-1", b"llamas", b"train/loss", b"samples/Hi <b>"))
    found = [
        (step, "train/loss", step / 8)
        for step in range(1, 5)
        if json.dumps(step / 8).encode() in written[step > 2].read_bytes()
    ]
    evaluated = [(step, "eval/bits_per_byte", step - 0.75) for step in (2, 4)]
    assert all(str(value).encode() in written[step > 2].read_bytes() for step, _, value in evaluated)
    return len({file.name for file in written}), [*found, *evaluated]


KEPT = {"trackio": kept_by_trackio, "wandb": kept_by_wandb, "mlflow": kept_by_mlflow}


@pytest.mark.parametrize("name", KEPT)
def test_the_package_itself_keeps_one_run_of_both_parts(name, tmp_path):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'herd[{name}]'")
    root = Path(__file__).parents[2]
    places = {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    places |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}", "PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "-c", REAL, name, str(tmp_path / "run-1")],
        env=os.environ | places,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    runs, found = KEPT[name](tmp_path)
    assert runs == 1
    assert [one for one in found if one[1] == "train/loss"] == [(n, "train/loss", n / 8) for n in range(1, 5)]
    evaluated = [(2, "eval/bits_per_byte", 1.25), (4, "eval/bits_per_byte", 3.25)]
    assert [one for one in found if one[1] == "eval/bits_per_byte"] == evaluated


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r'wandb is not installed: pip install "herd\[wandb\]"'):
        trackers_of(config("wandb", tmp_path), tmp_path, figures(), print)
    monkeypatch.delitem(sys.modules, "wandb")
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ConfigError, match=r"herd\[wandb\]"):
            check_trackers(config("wandb", tmp_path).report)
