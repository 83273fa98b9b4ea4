"""Other tools' stores: their models are listed where they lie, and what is damaged or hostile opens nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.errors import CheckpointError
from herd.hub import ollama
from herd.hub.folders import lm_studio_models, meta_model
from herd.hub.found import found
from herd.hub.pull import pull
from tests.hub.mirror import COMMIT, Mirror
from tests.hub.repos import GGUF, REPOS, TINY
from tests.hub.stores import IMAGE, folder, put
from tests.hub.stores import ollama as make

LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def store(home: Path) -> Path:
    return home / "home/.ollama/models"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("llama3.2:1b", f"{LIBRARY}/llama3.2/1b"),
        ("llama3.2", f"{LIBRARY}/llama3.2/latest"),
        ("me/mine:q4", "registry.ollama.ai/me/mine/q4"),
        ("hf.co/ORG/NAME-GGUF:Q4_K_M", "hf.co/ORG/NAME-GGUF/Q4_K_M"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b/c"),
    ],
)
def test_names(store: Path, name: str, path: str) -> None:
    assert ollama.find(name) is None
    assert ollama.find(name) is None
    blob = make(store, path)
    assert ollama.find(name) == blob


def test_the_folder_of_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = make(home / "elsewhere", f"{LIBRARY}/llama3.2/1b")
    assert ollama.find("llama3.2:1b") is None
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    assert ollama.find("llama3.2:1b") == blob


@pytest.mark.parametrize(
    "name", ["../../x", "a/../b", "a:../../b", "/etc/passwd", "a\0", "a:b:c", "a/b/c/d", "", ".", "..", "a:", "~/x"]
)
def test_hostile_names(store: Path, home: Path, name: str) -> None:
    make(store, f"{LIBRARY}/x/latest")
    (home / "home/.ollama/x").write_text("{}")
    assert ollama.find(name) is None


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../secret",
        "sha256-" + "0" * 63 + "/",
        "sha256:" + "g" * 64,
        "md5:" + "0" * 64,
        "sha256:" + "0" * 64 + "\n",
        "sha256:" + "0" * 65,
        "",
        None,
        7,
    ],
)
def test_hostile_digests(store: Path, home: Path, digest: object) -> None:
    make(store, f"{LIBRARY}/x/latest")
    (home / "home/.ollama/secret").write_text("GGUF")
    manifest = store / "manifests" / LIBRARY / "x/latest"
    manifest.write_text(json.dumps({"layers": [{"mediaType": IMAGE + "model", "digest": digest, "size": 4}]}))
    with pytest.raises(CheckpointError, match=r"is no digest|has no type, digest and size") as caught:
        ollama.find("x")
    assert str(manifest) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"layers": 3}', '{"layers": [1]}', '{"layers": []}', "\xff", "[" * 10_000]
)
def test_damaged_manifests(store: Path, text: str) -> None:
    make(store, f"{LIBRARY}/good/latest")
    make(store, f"{LIBRARY}/bad/latest")
    (store / "manifests" / LIBRARY / "bad/latest").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"bad/latest"):
        ollama.find("bad")
    listed = {model.name: model for model in found(Path("nowhere"))}
    assert listed["bad/latest"].problem
    assert listed["good:latest"].problem is None, "one damaged manifest hides no other model"


def test_layers_that_herd_does_not_apply(store: Path) -> None:
    make(store, f"{LIBRARY}/tuned/latest", extra=[{"mediaType": IMAGE + "adapter", **put(store, b"lora")}])
    with pytest.raises(CheckpointError, match=r"has a layer \(adapter\) that herd does not apply"):
        ollama.find("tuned")


def test_missing_blobs_and_links_out(store: Path, home: Path) -> None:
    blob = make(store, f"{LIBRARY}/x/latest")
    blob.unlink()
    with pytest.raises(CheckpointError, match=r"is missing: ollama pull gets it again"):
        ollama.find("x")
    (home / "secret").write_text("GGUF")
    blob.symlink_to(home / "secret")
    with pytest.raises(CheckpointError, match="link that leads outside"):
        ollama.find("x")
    assert ollama.find("y") is None
    (store / "manifests" / LIBRARY / "y").mkdir()
    (store / "manifests" / LIBRARY / "y/latest").symlink_to(home / "secret")
    assert ollama.find("y") is None


def test_everything_is_listed(hub: str, store: Path, home: Path, cache: Path, mirror: Mirror) -> None:
    snapshot, gguf = pull(TINY), pull(f"{GGUF}:Q8_0")
    mirror.commit = "f" * 40
    mirror.repos[TINY]["config.json"] = b'{"torch_dtype": "float16"}'
    pull(TINY)
    blob = make(store, f"{LIBRARY}/llama3.2/1b", b"GGUF" * 100)
    lm = folder(home / "home/.lmstudio/models/pub/Some-GGUF", "Some-Q4_K_M.gguf", "mmproj-Some.gguf")
    meta = folder(home / "home/.llama/checkpoints/Llama3.2-1B", "params.json", "consolidated.00.pth")
    (cache / "models--half--way/blobs").mkdir(parents=True)
    (cache / "models--half--way/blobs/abc.incomplete").write_bytes(b"12345")
    (cache / "datasets--a--b/snapshots/x").mkdir(parents=True)
    listed = {(m.where, m.name): m for m in found(cache)}
    assert set(listed) == {
        ("hub", GGUF),
        ("hub", TINY),
        ("hub", f"{TINY}@{COMMIT[:12]}"),
        ("hub", "half/way"),
        ("ollama", "llama3.2:1b"),
        ("lmstudio", "pub/Some-GGUF"),
        ("meta", "Llama3.2-1B"),
    }
    old = listed["hub", f"{TINY}@{COMMIT[:12]}"]
    assert (old.path, old.format, old.quant, old.problem) == (snapshot, "safetensors", "bfloat16", None)
    assert old.size == sum(len(data) for name, data in REPOS[TINY].items() if (snapshot / name).exists())
    assert listed["hub", TINY].quant == "float16"
    assert (listed["hub", GGUF].path, listed["hub", GGUF].format, listed["hub", GGUF].quant) == (gguf, "gguf", "Q8_0")
    assert "unfinished" in (listed["hub", "half/way"].problem or "")
    assert (listed["ollama", "llama3.2:1b"].path, listed["ollama", "llama3.2:1b"].quant) == (blob, "Q8_0")
    assert listed["lmstudio", "pub/Some-GGUF"].path == lm / "Some-Q4_K_M.gguf"
    assert (listed["meta", "Llama3.2-1B"].path, listed["meta", "Llama3.2-1B"].format) == (meta, "meta")


def test_lm_studio(home: Path) -> None:
    one = folder(home / "home/.lmstudio/models/pub/One-GGUF", "One-Q4_K_M.gguf", "mmproj-One.gguf")
    two = folder(home / "home/.cache/lm-studio/models/pub/Two-GGUF", "Two-Q4_K_M.gguf", "Two-Q8_0.gguf")
    assert list(lm_studio_models("pub/One-GGUF")) == [one / "One-Q4_K_M.gguf"]
    assert list(lm_studio_models("pub/Two-GGUF")) == [two]
    assert list(lm_studio_models("pub/Two-GGUF", "Q8_0")) == [two / "Two-Q8_0.gguf"]
    for name in ("../../x", "pub/../pub", "pub", "/pub/One-GGUF", "pub/None"):
        assert list(lm_studio_models(name)) == []


def test_meta(home: Path) -> None:
    at = folder(home / "home/.llama/checkpoints/Llama3.2-1B", "params.json")
    folder(home / "home/.llama/evil", "params.json")
    assert meta_model("Llama3.2-1B") == at
    assert meta_model("../evil") is None
    assert meta_model("..") is None
