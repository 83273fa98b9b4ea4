"""Models on demand, over doubles: when they are loaded, unloaded, tried again, and what `ps` and `/health` say meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from herd.errors import ConfigError, UnknownModelError
from herd.server import models as module
from herd.server.errors import ApiError
from herd.server.models import Models
from herd.server.process import WorkerError
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings
from tests.server.conftest import faked
from tests.server.fakes import Scripted, saying

A = ModelSpec(source="a", name="a", aliases=("also-a",), adapters=(("lora", "path"),))
B = ModelSpec(source="b", name="b", keep_alive=0.05)


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
            assert row["error"] == "/srv/models/a: it broke"
            fake.state.draining = True
            assert (await fake.client.get("/health")).json()["status"] == "draining"

    asyncio.run(run())


def test_any_model_means_names_and_never_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")

    async def run() -> None:
        models = Models(ServerSettings(any_model=True, keep_alive=5), Made())
        assert models.find("nano")[0].keep_alive == 5
        for wrong in (str(tmp_path), ".", "..", "/etc", "~", "nope", str(tmp_path / "config.json")):
            with pytest.raises(UnknownModelError):
                models.find(wrong)

    asyncio.run(run())


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
