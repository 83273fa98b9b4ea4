"""Damaged checkpoints: each shard and tensor in turn, and every error names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.errors import CheckpointError, ConfigError
from tests.build import build
from tests.checkpoint.folders import save_bin, write_hf, write_meta

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One intact, sharded folder of each kind."""
    base = tmp_path_factory.mktemp("whole")
    model = build("llama-3")
    write_hf(base / "safetensors", model, shard_size="60KB")
    save_bin(base / "bin", model, 4)
    write_meta(base / "meta", model, 2)
    return {kind: base / kind for kind in ("safetensors", "bin", "meta")}


@pytest.fixture
def copy(wholes: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy to damage."""

    def fresh(kind: str) -> Path:
        target = tmp_path / "copy"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(wholes[kind], target))

    return fresh


def shards(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth"))
    assert len(found) > 1
    return found


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        fill(open_store(path))
    return caught.value


def truncate_one(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def truncate_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_head(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 70_000)


def grow_one(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def html(path: Path) -> None:
    path.write_text("<!doctype html><title>401</title>")


def delete(path: Path) -> None:
    path.unlink()


DAMAGE = [truncate_one, truncate_half, truncate_head, empty, zero, grow, grow_one, pointer, html, delete]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "meta"])
def test_each_shard_in_turn(copy: Callable[[str], Path], kind: str, damage: Callable[[Path], None]) -> None:
    for i in range(len(shards(copy(kind)))):
        folder = copy(kind)
        shard = shards(folder)[i]
        damage(shard)
        error = refusal(folder)
        assert shard.name in str(error)
        assert error.path == str(shard)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "meta"])
def test_swapped_shards(copy: Callable[[str], Path], kind: str) -> None:
    for i in range(len(shards(copy(kind))) - 1):
        folder = copy(kind)
        one, other = shards(folder)[i : i + 2]
        both = one.read_bytes(), other.read_bytes()
        other.write_bytes(both[0])
        one.write_bytes(both[1])
        error = refusal(folder)
        assert one.name in str(error)
        assert error.tensor is not None or "swapped" in str(error)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_repeated_shards(copy: Callable[[str], Path], kind: str) -> None:
    """One shard twice, under two names: the tensors that are in the wrong place are named."""
    folder = copy(kind)
    one, other = shards(folder)[:2]
    other.write_bytes(one.read_bytes())
    error = refusal(folder)
    assert other.name in str(error)
    assert error.tensor is not None


def test_a_shard_of_another_model(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """Right names and shapes, but the tensors that every rank holds whole are different."""
    folder = copy("meta")
    write_meta(tmp_path / "other", build("llama-3", seed=1), 2)
    shutil.copy(tmp_path / "other" / "consolidated.01.pth", folder)
    error = refusal(folder)
    assert "consolidated.01.pth" in str(error)
    assert error.tensor == "layers.0.attention_norm.weight"


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_index_disagrees(copy: Callable[[str], Path]) -> None:
    norm = "model.norm.weight"
    changes: list[tuple[Callable[[dict[str, str]], object], str]] = [
        (lambda m: m.pop(norm), "not listed"),
        (lambda m: m.update({"model.extra.weight": m[norm]}), "puts this tensor here, but it is not"),
        (lambda m: m.update({norm: next(f for f in m.values() if f != m[norm])}), "swapped or repeated"),
        (lambda m: m.update({norm: "model-00009-of-00001.safetensors"}), "missing"),
    ]
    for change, words in changes:
        folder = copy("safetensors")
        edit_index(folder, lambda m, change=change: change(m) and None)
        error = refusal(folder)
        assert words in str(error)
        assert "norm.weight" in str(error) or "model.extra.weight" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/passwd",
        "a/../../evil.safetensors",
        "..",
        "",
        "~/x.safetensors",
        "C:\\x.safetensors",
        "\\\\host\\x.safetensors",
        "x\0.safetensors",
        "x" * 4096,
        "sub/../x.safetensors",
        "NUL.safetensors",
        "config.json",
        "a//b.bin",
    ],
)
def test_shard_names_stay_in_the_folder(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("safetensors")
    (folder.parent / "evil.safetensors").write_bytes(shards(folder)[0].read_bytes())
    edit_index(folder, lambda m: m.update({"model.norm.weight": name}))
    assert len(str(refusal(folder))) < 2000


def test_links_out_of_the_folder(copy: Callable[[str], Path]) -> None:
    folder = copy("safetensors")
    shard = shards(folder)[0]
    outside = folder.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    assert "leads outside" in str(refusal(folder))


def test_the_links_of_the_hub_cache_are_followed(copy: Callable[[str], Path], tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--a--b"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in copy("safetensors").iterdir():
        file.rename(repo / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(repo / "blobs" / f"blob-{file.name}")
    assert fill(open_store(snapshot)).config.n_layers == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
    ],
)
def test_broken_index(copy: Callable[[str], Path], text: str) -> None:
    folder = copy("safetensors")
    (folder / INDEX).write_text(text)
    assert INDEX in str(refusal(folder))


def test_no_index(copy: Callable[[str], Path]) -> None:
    folder = copy("safetensors")
    (folder / INDEX).unlink()
    assert "there are shards but no index" in str(refusal(folder))


@pytest.fixture(params=["hf", "meta"])
def single(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[..., None]]:
    """A folder with one weight file, and a function that changes its tensors."""
    model = build("llama-3")
    if request.param == "hf":
        write_hf(tmp_path, model)
        file = tmp_path / "model.safetensors"
        state = load_file(file)
    else:
        write_meta(tmp_path, model)
        file = tmp_path / "consolidated.00.pth"
        state = torch.load(file, weights_only=True)

    def change(drop: str | None = None, **more: torch.Tensor) -> None:
        kept = {name: tensor.clone() for name, tensor in state.items() if name != drop} | more
        save_file(kept, file) if request.param == "hf" else torch.save(kept, file)

    return file, change


def test_missing_tensors(single: tuple[Path, Callable[..., None]]) -> None:
    file, change = single
    names = list(load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True))
    for name in names:
        if name == "rope.freqs":
            continue
        change(drop=name)
        error = refusal(file.parent)
        assert error.tensor == name
        assert error.path == str(file)


def test_extra_and_misshaped_tensors(single: tuple[Path, Callable[..., None]]) -> None:
    file, change = single
    hf = file.suffix == ".safetensors"
    norm = "model.norm.weight" if hf else "norm.weight"
    wq = "model.layers.1.self_attn.q_proj.weight" if hf else "layers.1.attention.wq.weight"
    emb = "model.embed_tokens.weight" if hf else "tok_embeddings.weight"
    bias = "model.layers.0.self_attn.q_proj.bias" if hf else "layers.0.attention.wq.bias"
    wrong = {
        bias: torch.zeros(64),
        "something.else": torch.zeros(1),
        norm: torch.zeros(65),
        wq: torch.zeros(64, 63),
        emb: torch.zeros(385, 64),
    }
    shapes = [torch.zeros(()), torch.zeros(64, 64, 1), torch.zeros(0, 64), torch.zeros(7, 64)]
    for name, tensor in [*wrong.items(), *((wq, shape) for shape in shapes)]:
        change(**{name: tensor})
        error = refusal(file.parent)
        assert error.tensor == name, str(error)
        assert error.path == str(file)


def test_dtypes_without_meaning(single: tuple[Path, Callable[..., None]]) -> None:
    file, change = single
    norm = "model.norm.weight" if file.suffix == ".safetensors" else "norm.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.bool):
        change(**{norm: torch.zeros(64).to(dtype)})
        error = refusal(file.parent)
        assert error.tensor == "norm.weight"
        assert "without scales" in str(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 128),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("intermediate_size", 200),
        ("vocab_size", 400),
        ("num_key_value_heads", 4),
        ("head_dim", 32),
        ("tie_word_embeddings", True),
    ],
)
def test_config_and_weights_disagree(tmp_path: Path, key: str, value: object) -> None:
    write_hf(tmp_path, build("llama-3"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    error = refusal(tmp_path)
    assert error.tensor is not None
    assert "config.json" in str(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dim", 128), ("n_layers", 1), ("n_layers", 3), ("multiple_of", 200), ("vocab_size", 400), ("n_kv_heads", 4)],
)
def test_params_and_weights_disagree(tmp_path: Path, key: str, value: object) -> None:
    write_meta(tmp_path, build("llama-3"), 1, **{key: value})
    error = refusal(tmp_path)
    assert error.tensor is not None


@pytest.mark.parametrize("missing", ["config.json", "params.json"])
def test_description_is_missing(tmp_path: Path, missing: str) -> None:
    write_hf(tmp_path, build("llama-3")) if missing == "config.json" else write_meta(tmp_path, build("llama-3"))
    (tmp_path / missing).unlink()
    assert f"{missing} is missing" in str(refusal(tmp_path))


def test_params_that_are_no_params(tmp_path: Path) -> None:
    write_meta(tmp_path, build("llama-3"))
    good = json.loads((tmp_path / "params.json").read_text())
    changes = [
        {"dim": 0},
        {"dim": "64"},
        {"n_heads": -1},
        {"n_heads": 7},
        {"n_layers": 10**9},
        {"n_layers": None},
        {"vocab_size": -2},
    ]
    changes += [
        {"multiple_of": 0},
        {"ffn_dim_multiplier": "x"},
        {"norm_eps": 0},
        {"rope_theta": []},
        {"use_scaled_rope": "yes"},
    ]
    changes += [
        {"vision_chunk_size": 448},
        {"quantization_args": {"scheme": "x"}},
        {"lora_args": {"rank": 16}},
        {"multiple_of": 10**15},
        {"ffn_dim_multiplier": 1e299},
        {"norm_eps": 1e308},
        {"n_kv_heads": 3},
    ]
    for change in changes:
        (tmp_path / "params.json").write_text(json.dumps(good | change))
        with pytest.raises((ConfigError, CheckpointError), match=r"params\.json"):
            open_store(tmp_path)
    for text in ("", "[]", "{", "NaN", "[" * 10_000):
        (tmp_path / "params.json").write_text(text)
        with pytest.raises(ConfigError, match=r"params\.json"):
            open_store(tmp_path)


def test_ranks_of_different_dtypes(tmp_path: Path) -> None:
    """One shard in another dtype, where key/value heads are as many as ranks: compared as bytes, named when refused."""
    write_meta(tmp_path, build("llama-3"), 2)
    second = tmp_path / "consolidated.01.pth"
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        state = torch.load(second, weights_only=True)
        torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, second)
        error = refusal(tmp_path)
        assert error.path == str(second)
        assert error.tensor is not None


def test_nan_weights_load(tmp_path: Path) -> None:
    """A diverged model is a bad model, not a damaged file."""
    model = build("llama-3")
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    assert fill(open_store(write_meta(tmp_path, model, 2))).norm.weight[0].isnan()
