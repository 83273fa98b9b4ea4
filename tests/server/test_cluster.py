"""Copies of the server: what they cannot do is refused, the manifest is what Kubernetes and Ray read, and two of them serve."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from herd.cli.main import run
from herd.errors import ConfigError
from herd.server import cluster
from herd.server.app import create_app
from herd.server.cluster import as_json, check_replicas, from_json, replica, serve_replicas
from herd.server.kuberay import kuberay, service
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings
from tests.server.fakes import Scripted, saying

START_SECONDS = 240.0
"""Ray starts a dozen processes, and each copy loads a model."""

RICH = ServerSettings(
    models=(
        ModelSpec(source="llama3.2:1b", name="a", aliases=("b",), adapters=(("s", "hf.co/x/y"),), keep_alive=3.5),
        ModelSpec(source="nano", name="n", options=EngineOptions(kv="int8", memory="1 GiB", seed=0), beginning=(("user", "x"),)),
    ),
    engine=EngineOptions(device="cuda", max_len=512),
    port=8123,
    lazy=True,
    max_queue=7,
    guard="n",
)  # fmt: skip


def test_settings_survive_json() -> None:
    assert from_json(json.loads(json.dumps(as_json(RICH)))) == RICH
    assert as_json(ServerSettings()) == {}


def test_keys_come_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    told = replace(RICH, api_keys=("very-secret-key", "another-secret"))
    said = json.dumps(as_json(told)) + kuberay(told, 2, "image")
    assert "secret-key" not in said
    assert not any(key in said for key in told.api_keys)  # nor their hashes
    monkeypatch.setenv("HERD_API_KEY", "very-secret-key another-secret")
    assert from_json(as_json(told)) == told


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="no setting 'max_cue'"):
        from_json({"max_cue": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state_dir", "/somewhere"),
        ("adapter_dir", "/somewhere"),
        ("rate_requests", 5),
        ("max_concurrent", 5),
        ("send_seconds", 5.0),
    ],
)
def test_what_copies_cannot_honour_is_refused(name: str, value: Any) -> None:
    check_replicas(RICH)
    with pytest.raises(ConfigError, match=f"{name}: "):
        check_replicas(replace(RICH, **{name: value}))


def test_tls_is_not_for_ray() -> None:
    with pytest.raises(ConfigError, match="plain HTTP"):
        check_replicas(replace(RICH, ssl_certfile="c", ssl_keyfile="k"))


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'herd\[ray\]'"):
        serve_replicas(RICH, 2)
    assert run(["serve", "nano", "--replicas", "2"]) == 1
    assert "herd[ray]" in capsys.readouterr().err


def test_tensor_parallel_that_the_heads_do_not_allow(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "nano", "--tensor-parallel-size", "3"]) == 1
    assert "tp 3: must be a multiple of the 2 key/value heads" in capsys.readouterr().err


def test_the_manifest_is_a_ray_service(capsys: pytest.CaptureFixture[str]) -> None:
    """As `kubectl` reads it: KubeRay's fields, and inside them Ray Serve's configuration."""
    assert run(["serve", "llama3.2:1b", "--print-kuberay", "reg/herd:1", "--replicas", "3", "--device", "cuda"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayService")
    cluster_config = made["spec"]["rayClusterConfig"]
    (workers,) = cluster_config["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 3
    for group in (cluster_config["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # the API takes texts only
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "reg/herd:1"
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", container["name"])
        assert container["resources"]["limits"]["cpu"].isdecimal()
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {port["name"] for port in cluster_config["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]} >= {
        "gcs-server", "dashboard", "serve",
    }  # fmt: skip
    (serving,) = yaml.safe_load(made["spec"]["serveConfigV2"])["applications"]
    module, name = serving["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert from_json(serving["args"]).models[0].source == "llama3.2:1b"
    assert (serving["args"]["replicas"], serving["args"]["gpus"]) == (3, 1)


def test_ray_takes_the_configuration() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed")
    made = service(RICH, 2, "image")["spec"]["serveConfigV2"]
    schema.ServeDeploySchema.model_validate(yaml.safe_load(made))


def test_models_of_this_machine_are_not_in_a_manifest(tmp_path: Path) -> None:
    spec = ModelSpec(source=str(tmp_path), name="here")
    with pytest.raises(ConfigError, match="the cluster does not see it"):
        kuberay(ServerSettings(models=(spec,)), 1, "image")


async def _starts(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = asyncio.Event()
    told = ServerSettings(models=(ModelSpec(source="fake", name="fake"),))
    fake = Scripted(told.models[0], lambda call: saying("Hi"), wait=loaded)
    monkeypatch.setattr(cluster, "create_app", lambda told: create_app(told, launch=lambda spec: fake))
    app = replica(told)
    up = asyncio.ensure_future(app.router.lifespan_context(app).__aenter__())
    await asyncio.sleep(0.1)
    assert not up.done()  # Ray would send it requests
    loaded.set()
    await asyncio.wait_for(up, 10)


def test_a_copy_is_ready_when_its_models_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(_starts(monkeypatch))


@pytest.mark.slow
def test_two_copies_serve() -> None:
    """On a Ray of this machine: both copies have a worker, clients see one server, and a signal ends all of it."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'herd[ray]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    words = ["serve", "nano", "--replicas", "2", "--port", str(port), "-np", "4", "--device", "cpu", "--drain", "5"]
    server = subprocess.Popen([sys.executable, "-m", "herd", *words], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    pids: set[int] = set()
    try:
        until = time.monotonic() + START_SECONDS
        lines = []
        while not (lines and "herd serves at" in lines[-1]):
            lines.append(server.stderr.readline())
            assert lines[-1], "".join(lines)
            assert time.monotonic() < until
        load = ["--url", url, "--concurrency", "8", "--requests", "32", "--output-tokens", "8", "--prompt-tokens", "16"]
        done = subprocess.run(
            [sys.executable, "-m", "herd", "bench", "serve", *load, "--json"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["rows"][0]["failed"] == 0
        for _ in range(40):
            shown = httpx.get(f"{url}/api/ps", timeout=10)
            assert shown.status_code == 200
            refused = httpx.post(
                f"{url}/v1/chat/completions", json={"model": "nano", "messages": [], "foo": 1}, timeout=10
            )
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "foo")
            pids |= workers()
        assert len(pids) >= 2
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(90)
        server.stderr.close()
    assert status == 0
    until = time.monotonic() + 30
    while pids & workers() and time.monotonic() < until:
        time.sleep(0.2)
    assert not pids & workers()


def workers() -> set[int]:
    """Processes of models whose parent is a copy on Ray."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"herd.server.worker" in words and b"ray" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found
