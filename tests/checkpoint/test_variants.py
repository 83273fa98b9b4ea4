"""A name that asks for a variant or a quantization gets that one or an error, never another model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from herd.chat.formats import detect
from herd.checkpoint.load import open_checkpoint
from herd.checkpoint.resolve import resolve, tuned_release
from herd.checkpoint.vocabulary import load_tokenizer
from herd.errors import CheckpointError
from herd.model.config import plain
from herd.model.presets import RELEASES, find, wanted
from tests.build import build, tiny
from tests.checkpoint.folders import write_meta
from tests.cli.tiny import write_folder

BASE, TUNED = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without models."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "LLAMA_MODELS_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hub(home: Path, repo: str, *files: str) -> Path:
    """A snapshot in the Hugging Face cache."""
    folder = home / ".cache/huggingface/hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for file in files or ("model.safetensors",):
        (folder / file).touch()
    return folder


def native(home: Path, name: str) -> Path:
    """A folder of Meta's own download."""
    folder = home / ".llama/checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "params.json").touch()
    return folder


ASKS_TUNED = ["llama3.1:8b-instruct", "Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct", TUNED, "Llama3.1-8B-Instruct"]
ASKS_BASE = ["llama3.1:8b-text", "llama3.1:8b-base", "Llama-3.1-8B", BASE, "Llama3.1-8B", BASE.lower()]
ASKS_ANY = ["llama3.1", "llama3.1:8b", "llama-3.1-8b", "LLAMA-3.1-8b", "Llama 3.1 8B"]


def test_each_variant_by_its_names(home: Path) -> None:
    base, tuned = hub(home, BASE), hub(home, TUNED)
    for names, place in ((ASKS_TUNED, tuned), (ASKS_BASE, base), (ASKS_ANY, tuned)):
        for name in names:
            assert resolve(name) == place, name


@pytest.mark.parametrize("name", ASKS_TUNED)
def test_only_the_base_model_is_here(name: str, home: Path) -> None:
    hub(home, BASE)
    with pytest.raises(CheckpointError, match=rf"only {BASE} is here: name it to use it"):
        resolve(name)


@pytest.mark.parametrize("name", ASKS_BASE)
def test_only_the_tuned_model_is_here(name: str, home: Path) -> None:
    native(home, "Llama3.1-8B-Instruct")
    with pytest.raises(CheckpointError, match=r"only Llama3\.1-8B-Instruct is here: name it to use it"):
        resolve(name)


def test_an_open_name_takes_what_there_is(home: Path) -> None:
    place = hub(home, BASE)
    assert {resolve(name) for name in ASKS_ANY} == {place}


def test_one_variant_in_either_format(home: Path) -> None:
    """Meta's folder and Hugging Face's hold the same model; the form that was named comes first."""
    meta = native(home, "Llama3.1-8B-Instruct")
    assert resolve(TUNED) == resolve("llama3.1:8b-instruct") == meta
    hf = hub(home, TUNED)
    assert (resolve(TUNED), resolve("Llama3.1-8B-Instruct")) == (hf, meta)
    original = hub(home, "meta-llama/Llama-2-7b-chat", "consolidated.00.pth")
    assert resolve("llama2:7b-chat") == resolve("meta-llama/Llama-2-7b-chat") == original


def test_packed_releases_are_not_the_plain_ones(home: Path) -> None:
    repo = "meta-llama/Llama-3.2-1B-Instruct-SpinQuant_INT4_EO8"
    place = hub(home, repo)
    assert resolve(repo) == place
    with pytest.raises(CheckpointError, match=f"only {repo} is here"):
        resolve("llama3.2:1b-instruct")


def test_a_quantization_is_a_gguf_file_of_that_name(home: Path) -> None:
    files = ["x-Q4_K_S.gguf", "x-Q4_K_M.gguf", "x-Q8_0-00001-of-00002.gguf", "x-Q8_0-00002-of-00002.gguf", "x-F16.gguf"]
    place = hub(home, TUNED, *files)
    for tag, file in (("q4_K_M", files[1]), ("q4_K_S", files[0]), ("q8_0", files[2]), ("fp16", files[4])):
        assert resolve(f"llama3.1:8b-instruct-{tag}") == resolve(f"llama3.1:8b-{tag}") == place / file
    for tag in ("q4_K", "q4_0", "q5_K_M", "q8", "bf16"):
        with pytest.raises(
            CheckpointError,
            match=rf"8b-instruct-{tag}' is not on this machine, only {TUNED} \(.*Q4_K_M\.gguf.*\) is here",
        ):
            resolve(f"llama3.1:8b-instruct-{tag}")
    with pytest.raises(CheckpointError, match="only"):
        resolve("llama3.1:8b-text-q4_K_M")


def test_every_released_name_asks_for_itself() -> None:
    for release in RELEASES:
        for name in release.repos + release.native:
            asked = wanted(name)
            assert asked.release is find(name) is release
            if name != release.id:  # Meta's folder of the base model is called like the catalog's entry
                assert asked.names[0] == name
                assert {release.is_tuned(n) for n in asked.names} == {asked.tuned} == {release.is_tuned(name)}
        for name in (release.id, release.name, *release.tags):
            assert set(wanted(name).names) <= {*release.repos, *release.native}


def test_tuned_releases_by_their_folders(home: Path) -> None:
    snapshot = hub(home, TUNED)
    (snapshot / "original").mkdir()
    (home / "Llama-2-7b-chat").mkdir()
    places = {
        "llama3.1": [
            snapshot,
            snapshot / "original",
            snapshot / "model.safetensors",
            native(home, "Llama3.1-8B-Instruct"),
        ],
        "llama2": [Path("Llama-2-7b-chat")],
        "llama-guard-3": [native(home, "Llama-Guard-3-8B")],
        "codellama": [native(home, "CodeLlama-7b-Instruct")],
    }
    for chat_format, paths in places.items():
        for path in paths:
            release = tuned_release(path)
            assert release is not None, path
            assert release.chat_format == chat_format
    for path in (
        hub(home, BASE),
        native(home, "Llama3.1-8B"),
        native(home, "CodeLlama-7b"),
        native(home, "llama-2-7b"),
        home,
    ):
        assert tuned_release(path) is None, path


def test_metas_own_folders_chat(home: Path) -> None:
    """Meta's files never say whether they hold a chat model: the catalog does, by the folder's name."""
    config = replace(tiny("llama-3.1"), vocab_size=128_256, layers=plain(1))
    folder = home / ".llama/checkpoints/Llama3.1-8B-Instruct"
    write_meta(folder, build(config))
    shutil.copy(str(files("llama_models") / "llama3" / "tokenizer.model"), folder)
    for name in ("Llama3.1-8B-Instruct", "llama3.1:8b", folder, folder / "params.json"):
        checkpoint = open_checkpoint(name)
        assert detect(checkpoint.tokenizer).name == "llama3.1"
        assert checkpoint.chat_format_from == "catalog"
        assert load_tokenizer(name).chat_format == "llama3.1"
    base = folder.rename(folder.with_name("Llama3.1-8B"))
    checkpoint = open_checkpoint(base)
    assert checkpoint.tokenizer.chat_format is checkpoint.chat_format_from is None
    (base / "tokenizer.model").unlink()
    assert open_checkpoint(base).chat_format_from is None


def test_what_the_files_say_is_never_overridden(home: Path) -> None:
    """Llama 3's template in a folder that is called Llama 3.1."""
    folder = write_folder(home / "Llama-3.1-8B-Instruct")
    checkpoint = open_checkpoint(folder)
    assert (detect(checkpoint.tokenizer).name, checkpoint.chat_format_from) == ("llama3", "files")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["chat_template"]
    file.write_text(json.dumps(settings | {"chat_format": "llama3.2"}))
    checkpoint = open_checkpoint(folder)
    assert (detect(checkpoint.tokenizer).name, checkpoint.chat_format_from) == ("llama3.2", "files")
    file.write_text(json.dumps(settings))
    checkpoint = open_checkpoint(folder)
    assert (detect(checkpoint.tokenizer).name, checkpoint.chat_format_from) == ("llama3.1", "catalog")
