"""A server of all models of a machine: those of `herd create`, loading, unloading, and the terminal's ps, stop and chat --url."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ollama
import pytest

from herd.adapters.lora import LoraAdapter
from herd.checkpoint.peft import write_peft
from herd.cli.main import run
from herd.hub.created import find
from herd.server.settings import EngineOptions, ServerSettings
from tests.build import build
from tests.cli.conftest import piped as piped  # a fixture
from tests.cli.tiny import tiny_config, write_folder
from tests.engine.test_adapters import adapter
from tests.server.conftest import Live, serving

PATIENCE = 300
"""Seconds: models are loaded on the way, and a busy machine takes a while."""
Captured = pytest.CaptureFixture[str]
HI = [{"role": "user", "content": "Who are you?"}]
MODELFILE = """\
FROM {base}
PARAMETER temperature 0
PARAMETER num_predict 5
PARAMETER num_ctx 300
SYSTEM Be brief.
MESSAGE user Hello
MESSAGE assistant Hi
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of a machine that has nano, "mine" (made from nano) and "tuned" (a tiny model with an adapter)."""
    folder = tmp_path_factory.mktemp("machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERD_HOME", str(folder / "home"))
        patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OLLAMA_MODELS", str(folder / "ollama"))
        patch.setenv("OMP_NUM_THREADS", "1")
        write_folder(folder / "tiny")
        model = build(tiny_config())
        change: LoraAdapter = adapter(model, 1, only="layers")
        (folder / "lora").mkdir()
        write_peft(change, folder / "lora", model.config, lambda _: None)
        for name, text in (
            ("mine", MODELFILE.format(base="nano")),
            ("tuned", f"FROM {folder / 'tiny'}\nADAPTER {folder / 'lora'}\nPARAMETER temperature 0\n"),
            ("plain", f"FROM {folder / 'tiny'}\nPARAMETER temperature 0\n"),
        ):
            (folder / "Modelfile").write_text(text)
            assert run(["create", name, "-f", str(folder / "Modelfile")]) == 0
        settings = ServerSettings(
            any_model=True, port=0, max_loaded=2, keep_alive=300, drain_seconds=1, engine=EngineOptions(device="cpu")
        )
        yield from serving(settings)


def test_a_created_model_says_what_it_was_created_with(machine: Live) -> None:
    with ollama.Client(host=machine.url, timeout=PATIENCE) as client:
        made = client.chat("mine", HI)
        assert (made.eval_count, made.done_reason) == (5, "length"), "num_predict"
        whole = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            *HI,
        ]
        same = client.chat("nano", whole, options={"temperature": 0, "num_predict": 5})
        assert made.message.content == same.message.content
        assert made.prompt_eval_count == same.prompt_eval_count
        other = client.chat("mine", [{"role": "system", "content": "Be very very very long indeed, always."}, *HI])
        assert (other.prompt_eval_count or 0) > (made.prompt_eval_count or 0), "a request's own system prompt"
        shown = client.show("mine")
        assert shown.modelfile == MODELFILE.format(base="nano")
        assert "num_predict" in (shown.parameters or "")
        with pytest.raises(ollama.ResponseError, match="300"):
            client.chat("mine", [{"role": "user", "content": "word " * 400}])
        names = [model.model for model in client.list().models]
        assert {"nano", "mine:latest", "tuned:latest"} <= set(names)
        assert len(names) == len(set(names))
        listed = {model.model: model for model in client.list().models}
        [loaded] = [model for model in client.ps().models if model.model == "nano"]
        assert loaded.digest == listed["nano"].digest
        details = listed["nano"].details
        assert details is not None
        assert (details.format, details.parameter_size) == ("safetensors", "5.5M")


def test_its_adapter_lies_on_top(machine: Live) -> None:
    with machine.client() as client:
        client.timeout = PATIENCE

        def said(model: str) -> str:
            body = {"model": model, "messages": HI, "max_tokens": 12}
            return client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]["message"]

        assert said("tuned") != said("plain")
        assert said("tuned") == said("tuned:latest")
        listed = {row["id"] for row in client.get("/v1/models").json()["data"]}
        assert not any("@" in name for name in listed), "its adapter is no model of its own"


def test_no_client_says_a_path(machine: Live, tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny")
    with machine.client() as client:
        client.timeout = PATIENCE
        for name in (str(tmp_path / "tiny"), "./tiny", "~/tiny", "nano/../nano", "README.md"):
            answer = client.post("/api/generate", json={"model": name})
            assert answer.status_code == 404, name
        said = client.post("/api/generate", json={"model": "nano2"}).json()["error"]
        assert "mine:latest" in said
        assert "nano" in said


def test_room_is_made_and_memory_is_given_back(machine: Live, capsys: Captured) -> None:
    url = ["--url", machine.url]
    with machine.client() as client:
        client.timeout = PATIENCE
        for name in ("plain", "tuned"):  # the test before has loaded them: each load is seconds
            assert client.post("/api/generate", json={"model": name}).json()["done_reason"] == "load"
        assert run(["ps", *url, "--json"]) == 0
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
        assert set(rows) == {"plain:latest", "tuned:latest"}, "two at once"
        pids = {name: _pid(machine, name) for name in rows}
        for name, row in rows.items():
            assert abs(row["size"] - _resident(pids[name])) < 0.2 * row["size"], "measured"
        client.post("/api/generate", json={"model": "nano"})
        assert machine.state.models.slots["plain:latest"].state == "unloaded", "the longest unused makes room"
        assert not Path(f"/proc/{pids['plain:latest']}").exists()
        assert run(["ps", *url]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0].split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
        assert any(line.startswith("nano") and "100% CPU" in line and "5 minutes from now" in line for line in out)
        before = _resident(pids["tuned:latest"])
        assert before > 50e6, "torch alone is more"
        assert run(["stop", "tuned", *url]) == 0
        assert not Path(f"/proc/{pids['tuned:latest']}").exists(), "all of it is free when stop returns"
        capsys.readouterr()
        assert run(["stop", "tuned", *url]) == 1
        assert "is not loaded" in capsys.readouterr().err
        assert run(["stop", "--all", *url]) == 0
        assert client.get("/api/ps").json() == {"models": []}
        assert client.get("/health").status_code == 200, "models are loaded on demand"


def test_copy_and_delete(machine: Live) -> None:
    with ollama.Client(host=machine.url, timeout=PATIENCE) as client:
        client.copy("mine", "ours")
        assert find("ours") is not None
        assert client.show("ours").modelfile == client.show("mine").modelfile == MODELFILE.format(base="nano")
        client.delete("ours")
        assert find("ours") is None
        for name, status in (("ours", 404), ("nano", 400)):
            with pytest.raises(ollama.ResponseError) as caught:
                client.delete(name)
            assert caught.value.status_code == status
        with pytest.raises(ollama.ResponseError, match="exists"):
            client.copy("nano", "mine")


def test_a_chat_with_a_server(
    machine: Live, capsys: Captured, piped: Callable[[str | bytes], None], tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    piped(f"Who are you?\n/set max_tokens 7\nAnd me?\n/show\n/save {saved}\n/undo\n")
    command = ["chat", "--url", f"{machine.url}/v1", "--model", "mine", "--temp", "0", "--verbose"]
    assert run(command) == 0
    out, err = capsys.readouterr()
    with ollama.Client(host=machine.url, timeout=PATIENCE) as client:
        first = client.chat("mine", HI, options={"temperature": 0}).message.content
    assert out.startswith(f"{first}\n")
    assert "[5 tokens" in err
    assert "[7 tokens" in err
    assert "of 300 used" in err
    assert "max_tokens          7" in err
    assert len(json.loads(saved.read_text())["messages"]) == 4
    piped("Hello\n")
    assert run(["chat", "--url", machine.url, "-m", "nobody"]) == 1
    assert "there is no model 'nobody'" in capsys.readouterr().err
    assert run(["chat", "--url", machine.url]) == 1
    assert "say which with --model" in capsys.readouterr().err


def test_chat_says_what_it_cannot(capsys: Captured, piped: Callable[[str | bytes], None]) -> None:
    piped("")
    assert run(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert run(["chat", "--url", "ftp://x"]) == 1
    assert "expected http://HOST:PORT" in capsys.readouterr().err
    assert run(["chat", "--url", "http://127.0.0.1:9", "--dtype", "float32"]) == 2
    assert "dtype" in capsys.readouterr().err
    assert run(["ps", "--url", "http://127.0.0.1:9"]) == 1


def _pid(machine: Live, name: str) -> int:
    process = machine.state.models.slots[name].process
    assert process is not None
    assert process.pid is not None
    return process.pid


def _resident(pid: int) -> int:
    """Bytes of memory of a process, as the kernel counts them."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
