"""Names become paths: paths first, then the embedded model, then what other tools have downloaded."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest

import herd
from herd.checkpoint.load import load, load_model, open_checkpoint
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.vocabulary import check_vocabulary, load_tokenizer
from herd.errors import CheckpointError, ConfigError, UnknownModelError
from tests.build import build, tokens
from tests.checkpoint.folders import write_hf, write_meta


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, so that nothing of this machine is found."""
    for name in (
        "HF_HUB_CACHE",
        "HF_HOME",
        "XDG_CACHE_HOME",
        "LLAMA_MODELS_CONFIG_DIR",
        "OLLAMA_MODELS",
        "LMSTUDIO_HOME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cached(root: Path, repo: str, commits: dict[str, bool], main: str | None = None) -> Path:
    """A repository in a hub cache; commits that are True have weights."""
    folder = root / f"models--{repo.replace('/', '--')}"
    for commit, weights in commits.items():
        (folder / "snapshots" / commit).mkdir(parents=True)
        if weights:
            (folder / "snapshots" / commit / "model.safetensors").touch()
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)
    return folder / "snapshots"


def test_paths_come_first(places: Path) -> None:
    (places / "nano").mkdir()
    assert resolve("nano") == Path("nano")
    assert resolve(places) == places


def test_the_embedded_model() -> None:
    folder = resolve("nano")
    assert (folder / "model.safetensors").is_file()


def test_hub_cache(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = "meta-llama/Llama-3.2-1B-Instruct"
    default = cached(places / "home/.cache/huggingface/hub", repo, {"aaa": True, "bbb": True, "ccc": False}, main="bbb")
    for name in (repo, "llama-3.2-1b", "llama3.2:1b", "Llama-3.2-1B-Instruct", repo.lower()):
        assert resolve(name) == default / "bbb", name
    only = r"only meta-llama/Llama-3\.2-1B-Instruct is here: name it to use it"
    with pytest.raises(CheckpointError, match=only):
        resolve("meta-llama/Llama-3.2-1B")  # the base model is another one
    with pytest.raises(
        CheckpointError,
        match=r"herd pull llama-3\.1-405b\. Looked for 8 names in .*huggingface/hub and .*checkpoints, ",
    ) as caught:
        resolve("llama-3.1-405b")
    assert len(str(caught.value)) < 300 + 2 * len(str(places))
    for variable, folder in (("HF_HUB_CACHE", "a"), ("HF_HOME", "b/hub"), ("XDG_CACHE_HOME", "c/huggingface/hub")):
        found = cached(places / folder, repo, {"ddd": True})
        with monkeypatch.context() as here:
            here.setenv(variable, str(places / folder.split("/")[0]))
            assert resolve(repo) == found / "ddd"


def test_any_cached_repository(places: Path) -> None:
    """Community models are not in the catalog, but their files say what they are."""
    found = cached(places / "home/.cache/huggingface/hub", "someone/Their-Llama", {"aaa": True})
    assert resolve("someone/Their-Llama") == found / "aaa"


def test_native_folders(places: Path) -> None:
    folder = places / "home/.llama/checkpoints/Llama3.1-8B-Instruct"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="not on this machine"):
        resolve("Llama3.1-8B-Instruct")
    (folder / "params.json").touch()
    for name in ("Llama3.1-8B-Instruct", "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"):
        assert resolve(name) == folder or "meta-llama/" in name


@pytest.mark.parametrize(
    "name", ["lama-3.2-1b", "llama3.2:1", "no such thing", "", "a/b", "x" * 5000, "a\0b", "~nobody/x", "\ud800"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises((UnknownModelError, CheckpointError)) as caught:
        resolve(name)
    assert len(str(caught.value)) < 1500
    if name == "lama-3.2-1b":
        assert isinstance(caught.value, UnknownModelError)
        assert "llama-3.2-1b" in caught.value.near


@pytest.mark.parametrize("name", ["model.gguf", "./x", "/no/such/place", "../x", "weights.safetensors"])
def test_wrong_paths(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(name)


def test_not_runnable_yet() -> None:
    for name in ("llama-3.2-11b-vision", "prompt-guard-2-86m"):
        with pytest.raises(ConfigError, match="cannot be run yet"):
            resolve(name)


def test_folders_that_hold_no_checkpoint(places: Path) -> None:
    with pytest.raises(CheckpointError, match="it is empty; expected a Hugging Face folder"):
        open_store(places)
    (places / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"it holds 'notes\.txt'; expected"):
        open_store(places)
    with pytest.raises(CheckpointError, match="not a checkpoint file"):
        open_store(places / "notes.txt")
    with pytest.raises(CheckpointError, match="no such file"):
        open_store(places / "nothing")
    for name in ("a.gguf", "b.gguf"):
        (places / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="several GGUF files"):
        open_store(places)


def test_formats_are_told_apart(places: Path) -> None:
    model = build("llama-3")
    write_hf(places / "hf", model)
    write_meta(places / "meta", model)
    for path, kind in ((places / "hf", "hf"), (places / "hf/model.safetensors", "hf"), (places / "meta", "meta")):
        assert open_store(path).kind == kind
    for file in ("params.json", "consolidated.00.pth"):
        assert open_store(places / "meta" / file).kind == "meta"
    ids = tokens(model.config, 9)
    assert load_model(places / "meta")(ids).equal(load_model(places / "hf")(ids))


def test_the_public_way_in() -> None:
    """herd.load and its parts, on the embedded model."""
    model, tokenizer = load("nano")
    assert tokenizer.vocab_size <= model.config.vocab_size
    text = "Once upon a time"
    assert load_tokenizer("nano").encode(text) == tokenizer.encode(text)
    checkpoint = open_checkpoint("nano")
    assert checkpoint.store.kind == "hf"
    assert checkpoint.defaults.stop_ids
    assert herd.load is load


def test_a_checkpoint_without_a_tokenizer(places: Path) -> None:
    """The model is there to be used; the tokenizer says what is missing when it is."""
    whole = build("llama-3")
    write_hf(places / "hf", whole)
    model, tokenizer = load(places / "hf")
    ids = tokens(whole.config, 9)
    assert (model(ids) - whole(ids)).abs().max() < 1e-5
    with pytest.raises(CheckpointError, match="came without a tokenizer"):
        tokenizer.encode("x")
    assert copy.copy(tokenizer) is not tokenizer
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model"):
        load_tokenizer(places / "hf")
    (places / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load(places / "hf")


def test_a_tokenizer_of_another_model(places: Path) -> None:
    write_hf(places, build("llama-3"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("herd-nano") / file, places)
    with pytest.raises(CheckpointError, match="not from the same checkpoint"):
        load(places)


def test_pipes_are_not_waited_for(places: Path) -> None:
    for name in ("model.gguf", "model.safetensors", "consolidated.00.pth", "config.json"):
        folder = places / name.replace(".", "-")
        folder.mkdir()
        os.mkfifo(folder / name)
        for path in (folder, folder / name):
            with pytest.raises(CheckpointError):
                open_store(path)


def test_vocabulary_must_fit() -> None:
    _, tokenizer = load("nano")
    size = tokenizer.vocab_size
    check_vocabulary(tokenizer, size, "x")
    check_vocabulary(tokenizer, size + 64, "x")
    for rows in (size - 1, size // 2, size + 100_000):
        with pytest.raises(CheckpointError, match=f"the tokenizer has {size} tokens"):
            check_vocabulary(tokenizer, rows, "x")
