"""Adapters that come and go while a server runs: vLLM's and llama.cpp's routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from herd.adapters.prefix import Prefix
from herd.checkpoint.load import load
from herd.checkpoint.peft import write_peft
from herd.checkpoint.peft_virtual import write_virtual
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings
from tests.engine.test_adapters import adapter
from tests.server.conftest import Live, serving

TOLD = 600
"""Looks at numbers that are told every second; a busy machine takes a while."""
ASKED: Any = {"messages": [{"role": "user", "content": "A dog."}], "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def serving_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """nano with a folder of adapters: `tuned`, `soft` (a prefix of 20), `huge` (as long as the context), `nothing` (no adapter),
    `away` (a link out of it)."""
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = load("nano")
    for name, place in (("tuned", folder / "tuned"), ("outside", tmp_path_factory.mktemp("outside"))):
        place.mkdir(exist_ok=True)
        write_peft(adapter(model, 1, only="attention"), place, model.config, lambda _: None)
        if name == "outside":
            (folder / "away").symlink_to(place)
    (folder / "nothing").mkdir()
    for name, count in (("soft", 20), ("huge", model.config.max_seq_len)):
        shape = model.config.n_layers, count, model.config.n_kv_heads, model.config.head_dim
        keys, values = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        (folder / name).mkdir()
        write_virtual(Prefix(keys, values), folder / name, model.config, lambda _: None)
    models = (ModelSpec(source="nano", name="nano", options=EngineOptions(max_seqs=2, seed=0)),)
    settings = ServerSettings(models=models, port=0, lazy=True, drain_seconds=1, adapter_dir=str(folder))
    yield from serving(settings)


def test_an_adapter_comes_changes_replies_and_goes(serving_adapters: Live) -> None:
    with serving_adapters.client() as http:
        client = openai.OpenAI(base_url=f"{serving_adapters.url}/v1", api_key="none", max_retries=0, timeout=60)

        def text(model: str) -> str | None:
            return client.chat.completions.create(model=model, **ASKED).choices[0].message.content

        plain = text("nano")
        with pytest.raises(openai.NotFoundError):
            text("support")
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "support", "lora_path": "tuned"})
        assert answer.status_code == 200, answer.text
        assert "support" in answer.text
        assert text("support") == text("nano@support") != plain
        assert text("nano") == plain
        assert [one.id for one in client.models.list()] == ["nano", "support"]
        vectors = [
            client.embeddings.create(model=name, input="A dog.").data[0].embedding for name in ("nano", "support")
        ]
        assert vectors[0] != pytest.approx(vectors[1], abs=1e-3)
        (row,) = http.get("/lora-adapters").json()
        assert (row["id"], row["name"], row["scale"]) == (0, "support", 0.0)
        assert http.post("/lora-adapters", json=[{"id": 0, "scale": 0}]).status_code == 200
        refused = http.post("/lora-adapters", json=[{"id": 0, "scale": 0.5}])
        assert refused.status_code == 400
        assert "model 'support'" in refused.json()["error"]["message"]
        for body in ({}, [1], [{"id": 5, "scale": 0}], [{"id": 0, "scale": "a"}], [{"id": 0}]):
            assert http.post("/lora-adapters", json=body).status_code == 400
        again = http.post("/v1/load_lora_adapter", json={"lora_name": "support", "lora_path": "tuned"})
        assert again.json()["error"]["param"] == "lora_name"
        wrong = http.post("/v1/load_lora_adapter", json={"model": "support", "lora_name": "x", "lora_path": "tuned"})
        assert wrong.json()["error"]["param"] == "model"
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "support"}).status_code == 200
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "support"}).status_code == 404
        with pytest.raises(openai.NotFoundError):
            text("support")
        client.close()


def test_virtual_tokens_are_a_model_with_less_room(serving_adapters: Live) -> None:
    """A prefix chosen per request, as a model of its own: its replies, its counts, and the same after its process began anew."""
    with serving_adapters.client() as http:

        def ask(model: str, **more: Any) -> dict[str, Any]:
            return http.post("/v1/chat/completions", json={"model": model} | ASKED | more).json()

        def contexts() -> dict[str, int]:
            return {row["id"]: row["max_model_len"] for row in http.get("/v1/models").json()["data"]}

        plain = ask("nano")
        whole = contexts()["nano"]
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "gentle", "lora_path": "soft"})
        assert answer.status_code == 200, answer.text
        assert contexts() == {"nano": whole, "gentle": whole - 20}
        soft = ask("gentle")
        assert soft["choices"][0]["message"]["content"] != plain["choices"][0]["message"]["content"]
        assert ask("nano@gentle")["choices"] == soft["choices"]
        assert ask("nano")["choices"] == plain["choices"]
        assert soft["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"], "virtual tokens are no tokens"
        prompt = {"prompt": [5] * (whole - 20), "max_tokens": 1}
        assert http.post("/v1/completions", json=prompt | {"model": "nano"}).status_code == 200
        full = http.post("/v1/completions", json=prompt | {"model": "gentle"})
        assert full.status_code == 400
        error = full.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "beside the 20 virtual tokens of adapter 'gentle'" in error["message"]
        asyncio.run_coroutine_threadsafe(serving_adapters.state.models.unload("nano"), serving_adapters.loop).result()
        assert ask("gentle")["choices"][0]["message"] == soft["choices"][0]["message"]
        assert contexts() == {"nano": whole, "gentle": whole - 20}
        for wanted in ("2.0", "0.0"):
            for _ in range(TOLD):  # a worker tells its numbers every second
                if f'herd_kv_blocks_pinned{{model_name="nano"}} {wanted}' in (told := http.get("/metrics").text):
                    break
                time.sleep(0.05)
            else:
                raise AssertionError(told)
            http.post("/v1/unload_lora_adapter", json={"lora_name": "gentle"})
        assert contexts() == {"nano": whole}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "../outside"}, "lora_path"),
        ({"lora_path": "away"}, "lora_path"),
        ({"lora_path": "/etc"}, "lora_path"),
        ({"lora_path": "."}, "lora_path"),
        ({"lora_path": "missing"}, "lora_path"),
        ({"lora_path": "a\u0000b"}, "lora_path"),
        ({"lora_path": "nothing"}, "lora_path"),
        ({"lora_path": "huge"}, "lora_path"),
        ({"lora_path": "tuned", "lora_name": "a@b"}, "lora_name"),
        ({"lora_path": "tuned", "lora_name": "nano"}, "lora_name"),
        ({"lora_path": "tuned", "lora_name": "a\nb"}, "lora_name"),
        ({"lora_path": "tuned", "load_inplace": True}, "load_inplace"),
        ({"lora_name": "x"}, "lora_path"),
    ],
)
def test_what_is_not_loaded(serving_adapters: Live, body: dict[str, Any], param: str) -> None:
    with serving_adapters.client() as http:
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "x"} | body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert [one["id"] for one in http.get("/v1/models").json()["data"]] == ["nano"]


def test_without_a_folder_nothing_changes(http: httpx.Client) -> None:
    asked = {"model": "nano", "lora_name": "x", "lora_path": "tuned"}
    for path in ("load", "unload"):
        body = asked if path == "load" else {"model": "nano", "lora_name": "x"}
        answer = http.post(f"/v1/{path}_lora_adapter", json=body)
        assert answer.status_code == 403
        assert "--adapter-dir" in answer.json()["error"]["message"]
    assert http.get("/lora-adapters?model=nano").json() == []
