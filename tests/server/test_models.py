"""Models on demand, over doubles: when they are loaded, unloaded, tried again, and what `ps` and `/health` say meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path

import pytest

from herd.errors import ConfigError, UnknownModelError
from herd.hub.found import Found
from herd.server import models as module
from herd.server.errors import ApiError
from herd.server.here import pathless
from herd.server.models import Models
from herd.server.process import WorkerError
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings
from tests.server.conftest import faked
from tests.server.fakes import Scripted, saying

A = ModelSpec(source="a", name="a", aliases=("also-a",), adapters=(("lora", "path"),))
B = ModelSpec(source="b", name="b", keep_alive=0.05)

LONG = 5.0
"""Seconds after which whoever has not gone stays for ever."""


class Made(list[Scripted]):
    """Makes doubles, and keeps them. `error` is why the next ones cannot be loaded; `wait` is what loading waits for."""

    error: WorkerError | None = None
    wait: asyncio.Event | None = None

    def __call__(self, spec: ModelSpec) -> Scripted:
        made = Scripted(spec, lambda call: saying("x"), wait=self.wait)
        made.error = self.error
        self.append(made)
        return made


def test_loaded_once_when_first_asked_for() -> None:
    async def run() -> None:
        made = Made()
        made.wait = asyncio.Event()
        models = Models(ServerSettings(models=(A, B)), made)
        users = [asyncio.create_task(models.load(name)) for name in ("a", "also-a", "lora", "a@lora", "also-a@lora")]
        await asyncio.sleep(0.01)
        assert len(made) == 1
        assert models.slots["a"].state == "loading"
        assert models.rows()[0]["progress"] == {"phase": "reading weights", "share": 0.5}
        made.wait.set()
        await asyncio.gather(*users)
        assert models.slots["a"].state == "ready"
        assert models.slots["b"].state == "unloaded"
        assert [row["name"] for row in models.rows()] == ["a"]
        assert models.rows()[0]["memory"] == 1 << 20
        assert models.find("a@lora")[1] == "lora"
        for wrong in ("c", "a@other", "@lora", "b@lora", ""):
            with pytest.raises(UnknownModelError):
                models.find(wrong)
        await models.close()
        assert made[0].error is not None

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(12))
def test_a_user_who_goes_in_any_moment_has_gone(turns: int) -> None:
    """Also in the one in which the process becomes ready: `asyncio.wait_for` of Python 3.11 forgot who left then."""

    async def run() -> None:
        models = Models(ServerSettings(models=(A,)), Made())

        async def use() -> None:
            async with models.use("a"):
                await asyncio.Event().wait()

        user = asyncio.create_task(use())
        for _ in range(turns):
            await asyncio.sleep(0)
        user.cancel()
        await asyncio.wait({user}, timeout=LONG)
        assert user.cancelled()
        assert not models.slots["a"].users
        await models.close()

    asyncio.run(run())


def test_idle_models_are_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_LOOK_SECONDS", 0.01)

    async def run() -> None:
        made = Made()
        models = Models(ServerSettings(models=(A, B), lazy=True), made)
        await models.start()
        await models.load("a")
        async with models.use("b") as (slot, _, _):
            await asyncio.sleep(0.15)
            assert slot.state == "ready", "somebody uses it"
        left = next(row["expires_in"] for row in models.rows() if row["name"] == "b")
        assert 0 <= left <= 0.05
        await asyncio.sleep(0.2)
        assert [slot.state for slot in models.slots.values()] == ["ready", "unloaded"]
        await models.load("b")
        assert len(made) == 3
        await models.close()

    asyncio.run(run())


def test_room_is_made_for_another_model() -> None:
    async def run() -> None:
        made = Made()
        specs = tuple(ModelSpec(source=name, name=name) for name in "abc")
        models = Models(ServerSettings(models=specs, max_loaded=2, lazy=True), made)
        await models.load("a")
        await models.load("b")
        await models.load("a")
        await models.load("c")
        assert [slot.state for slot in models.slots.values()] == ["ready", "unloaded", "ready"], (
            "b was not used for longest"
        )
        async with models.use("a"), models.use("c"):
            with pytest.raises(ApiError) as caught:
                await models.load("b")
            assert caught.value.status == 503
        await models.close()

    asyncio.run(run())


def test_what_could_not_be_loaded_is_kept_and_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        made = Made()
        made.error = WorkerError("the file is damaged", kind="CheckpointError")
        models = Models(ServerSettings(models=(A,), lazy=True), made)
        for _ in range(2):
            with pytest.raises(WorkerError, match="a cannot be loaded: the file is damaged") as caught:
                await models.load("a")
            assert caught.value.kind == "NotLoaded"
        assert len(made) == 1
        assert models.health() == (False, [{"model": "a", "state": "failed"}])
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
        made.error = None
        await models.load("a")
        assert len(made) == 2
        made[-1].error = WorkerError("it is gone", kind="Crashed")
        assert models.slots["a"].state == "failed"
        await models.load("a")
        assert len(made) == 3, "after a crash it is started again at once"
        await models.close()

    asyncio.run(run())


def test_health_follows_loading() -> None:
    async def run() -> None:
        made = Made()
        made.wait = asyncio.Event()
        models = Models(ServerSettings(models=(A,)), made)
        assert models.health()[0] is False, "nothing has been loaded yet"
        await models.start()
        await asyncio.sleep(0.01)
        good, rows = models.health()
        assert (good, rows[0]["phase"], rows[0]["share"]) == (False, "reading weights", 0.5)
        made.wait.set()
        await asyncio.sleep(0.01)
        assert models.health() == (True, [{"model": "a", "state": "ready"}])
        await models.close()

    asyncio.run(run())


def test_health_over_http() -> None:
    async def run() -> None:
        async with faked() as fake:
            assert (await fake.client.get("/health")).status_code == 200
            assert (await fake.client.get("/version")).json()["version"]
            await fake.client.post("/v1/completions", json={"model": "fake", "prompt": "x"})
            fake.model.error = WorkerError("/srv/models/a: it broke", kind="Crashed")
            response = await fake.client.get("/health")
            assert (response.status_code, response.json()["status"]) == (503, "failed")
            assert response.json()["models"] == [{"model": "fake", "state": "failed"}], "why is not for everybody"
            [row] = (await fake.client.get("/v1/engine")).json()["models"]
            assert row["error"] == "a: it broke"
            fake.state.draining = True
            assert (await fake.client.get("/health")).json()["status"] == "draining"

    asyncio.run(run())


def test_any_model_means_names_and_never_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")

    async def run() -> None:
        models = Models(ServerSettings(any_model=True, keep_alive=5), Made())
        await models.meet("nano")
        assert models.find("nano")[0].keep_alive == 5
        for wrong in (str(tmp_path), ".", "..", "/etc", "~", "nope", "", str(tmp_path / "config.json")):
            await models.meet(wrong)
            with pytest.raises(UnknownModelError):
                models.find(wrong)

    asyncio.run(run())


def test_the_disk_is_read_beside_the_event_loop_and_not_for_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def slow() -> list[Found]:
        threads.append(threading.current_thread())
        return [Found("org/model", Path("/srv/models/org"), "hub", "safetensors", "BF16", 1, 0.0)]

    monkeypatch.setattr(module, "here", slow)
    monkeypatch.setattr("herd.server.here.here", slow)

    async def run() -> None:
        async with faked(any_model=True, models=()) as fake:
            for number in range(30):
                body = {"model": f"none-{number}", "messages": [{"role": "user", "content": "x"}]}
                answer = await fake.client.post("/v1/chat/completions", json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
                assert "org/model" in answer.text, "what there is, is told"
            assert (await fake.client.get("/v1/models/other")).status_code == 404
            answer = await fake.client.post("/v1/completions", json={"model": "org/model:latest", "prompt": "x"})
            assert answer.status_code == 200
            assert fake.model.spec.source == "/srv/models/org"
        assert threads
        assert threading.main_thread() not in threads, "the event loop waits for no disk"
        assert len(threads) <= 3, "a second passes between two looks, whatever is asked for"

    asyncio.run(run())


def test_spellings_of_a_name_become_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A created model is found in capitals, too: each of 2^n spellings was an alias for good, and listed."""
    monkeypatch.setattr(module, "MOST_SPELLED", 20)
    monkeypatch.setattr(module, "here", list)
    spec = ModelSpec(source="mine", name="mine")
    monkeypatch.setattr(module, "spec_of", lambda name, *_: spec if name.lower() == "mine" else None)

    async def run() -> None:
        models = Models(ServerSettings(any_model=True), Made())
        spellings = ["".join(one) for one in itertools.product(*("mM", "iI", "nN", "eE"))] * 3
        for name in spellings:
            await models.meet(name)
            assert models.find(name)[0] is models.slots["mine"]
        for number in range(100):
            await models.meet(f"other-{number}")
        assert [name for name, _, _ in models.names()] == ["mine"]
        assert len(models._spelled) <= 20
        await models.forget("mine")
        assert models.known("MINE") is None

    asyncio.run(run())


LOAD = "/srv/some models/llama/model-00001.safetensors: the header is damaged (see /home/me/.cache/x.json)"


def test_clients_hear_why_a_model_cannot_be_loaded_and_not_where_it_lies(caplog: pytest.LogCaptureFixture) -> None:
    spec = ModelSpec(source="/srv/some models/llama", name="fake", adapters=(("a", "/opt/secret/a"),))

    class Damaged(Scripted):
        async def start(self) -> None:
            self.error = WorkerError(LOAD, kind="CheckpointFileError")

    async def run() -> None:
        settings = ServerSettings(models=(spec,), lazy=True)
        models = Models(settings, lambda spec: Damaged(spec, lambda call: saying("x")))
        with pytest.raises(WorkerError) as caught:
            await models.load("fake")
        said = str(caught.value)
        assert said == "fake cannot be loaded: llama/model-00001.safetensors: the header is damaged (see x.json)"

    with caplog.at_level("ERROR", "herd.server"):
        asyncio.run(run())
    assert LOAD in caplog.text, "whoever runs the server reads all of it"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no file /a/b/c.gguf here", "no file c.gguf here"),
        ("'/a/b/c': x", "'c': x"),
        ("~/models/x.gguf", "x.gguf"),
        ("C:\\models\\x.gguf is cut", "x.gguf is cut"),
        ("ask http://host/v1/models or try 1/2 of a/b", "ask http://host/v1/models or try 1/2 of a/b"),
        ("nothing of that kind", "nothing of that kind"),
    ],
)
def test_paths_are_cut_out_of_texts(text: str, left: str) -> None:
    assert pathless(text) == left


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="two models"):
        ServerSettings(models=(A, ModelSpec(source="x", name="also-a")))
    with pytest.raises(ConfigError, match="port"):
        ServerSettings(port=70000)
    with pytest.raises(ConfigError, match="max_queue"):
        ServerSettings(max_queue=0)
    with pytest.raises(ConfigError, match="prompt format"):
        EngineOptions(format="nope")
    for name in ("", "a@b", "a\nb", "x" * 300):
        with pytest.raises(ConfigError, match="called"):
            ModelSpec(source="a", name=name)
