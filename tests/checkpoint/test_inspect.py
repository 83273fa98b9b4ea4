"""What inspect says of healthy, odd and broken checkpoints; in headers alone, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from herd.checkpoint.adapter import read_adapter
from herd.checkpoint.inspect import Inspection, inspect
from herd.errors import CheckpointError, UnknownModelError
from herd.model import shapes
from herd.model.accounting import parameters
from herd.model.presets import RELEASES
from tests.build import build
from tests.checkpoint.folders import write_hf, write_meta
from tests.checkpoint.released_shapes import hf_folder, llama3_gguf, sparse_safetensors

SECONDS = 1.0
"""Of processor time, start of the process included: what a person does not wait for."""

SMALL = replace(shapes.LLAMA_31_8B, layers=shapes.LLAMA_31_8B.layers[:2])


def q4_k_m(name: str) -> str:
    if "norm" in name:
        return "F32"
    return "Q6_K" if name == "output.weight" or "attn_v" in name or "ffn_down" in name else "Q4_K"


def codes(found: Inspection) -> set[str]:
    return {finding.code for finding in found.findings}


@pytest.fixture(scope="module")
def one_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("hub") / "Llama-3.2-1B-Instruct", shapes.LLAMA_32_1B)


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama3_gguf(tmp_path_factory.mktemp("gguf") / "q4.gguf", shapes.LLAMA_31_8B, q4_k_m)


def test_a_sharded_release_is_recognised_and_clean(one_b: Path) -> None:
    found = inspect(one_b)
    assert found.kin is not None
    assert found.kin.exact
    assert [release.id for release in found.kin.releases] == ["llama-3.2-1b"]
    assert found.types == {"BF16": (146, 1_235_814_400, 2_471_628_800)}
    assert found.shards == 2
    assert found.findings == ()
    facts = found.tokenizer
    assert facts is not None
    assert (facts.family, facts.size, facts.bos, facts.chat_format) == ("llama3", 128_256, 128_000, "llama3.1")
    assert facts.stop == (128_001, 128_008, 128_009)
    data = found.as_dict(tensors=True)
    assert data["parameters"] == 1_235_814_400
    assert data["config"]["rope_scaling"]["factor"] == 32.0
    assert data["generation_defaults"]["temperature"] == 0.6
    assert sum(t["nbytes"] for t in data["tensors"]) == 2_471_628_800
    assert json.loads(json.dumps(data))["config"] == data["config"]


def test_a_quantized_file_shows_its_mix(q4: Path) -> None:
    found = inspect(q4)
    assert found.what == "Llama 3.1 8B"
    assert found.mix == "Q4_K_M"
    assert found.roles["attention.wv.weight"] == {"Q6_K": 32}
    assert found.roles["attention.wq.weight"] == {"Q4_K": 32}
    assert sum(nbytes for _, _, nbytes in found.types.values()) < sum(found.files.values())
    assert found.tokenizer is not None
    assert found.tokenizer.templates == ("tokenizer.chat_template",)
    assert codes(found) == set()


@pytest.mark.parametrize("which", ["one_b", "q4"])
def test_it_takes_no_torch_and_less_than_a_second(which: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    code = (
        "import sys, time; from herd.cli.main import run; status = run(['inspect', sys.argv[1], '--json']);"
        "print(time.process_time(), file=sys.stderr); sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert json.loads(done.stdout)["schema"] == "herd.inspect/1"
    assert float(done.stderr) < SECONDS


def test_every_release_is_its_own_kin(tmp_path: Path) -> None:
    """By numbers; releases with equal numbers are told apart by the folder's name."""
    from herd.checkpoint.kinship import kin_of

    for release in RELEASES:
        if release.config is None or not release.runnable:
            continue
        kin = kin_of(release.config, [release.repos[0] if release.repos else release.id])
        assert kin is not None
        assert kin.exact
        assert release.config == kin.releases[0].config
        assert release in kin.releases
    assert kin_of(replace(shapes.LLAMA_31_8B, dim=64, hidden_dim=64, vocab_size=64)) is None


def test_a_missing_rope_table_and_wrong_bos_are_named(tmp_path: Path) -> None:
    found = inspect(llama3_gguf(tmp_path / "x.gguf", SMALL, q4_k_m, table=False, bos=5))
    assert {"opening", "unscaled", "special-ids", "differs"} <= codes(found)
    assert any("rope_freqs" in finding.text for finding in found.findings)


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    folder = hf_folder(
        tmp_path / "m", SMALL, dtype="F16", rope_scaling=None, auto_map={"AutoModel": "x.Y"}, eos_token_id=7
    )
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "mmproj-f16.gguf").write_bytes(b"GGUF")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    (folder / "original" / "checklist.chk").write_text("d41d8cd98f00b204e9800998ecf84271  consolidated.01.pth\n")
    (folder / "chat_template.jinja").write_text("<|nobody_knows|>")
    (folder / "config.json").chmod(0o666)
    found = inspect(folder)
    wanted = {
        "code", "pickle", "copies", "adapter", "mmproj", "checklist", "world-writable", "remote-code", "float16", "dtype",
        "unscaled", "special-ids", "templates", "template-tokens", "differs",
    }  # fmt: skip
    assert wanted <= codes(found)
    texts = " ".join(finding.text for finding in found.findings)
    for word in ("modeling_evil.py", "pytorch_model.bin", "consolidated.01.pth is missing", "<|nobody_knows|>", "[7]"):
        assert word in texts


def test_a_wrong_total_and_unused_rows(tmp_path: Path) -> None:
    config = replace(SMALL, vocab_size=128_264)
    folder = hf_folder(tmp_path / "m", config)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 2
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = inspect(folder)
    assert {"total-size", "vocabulary"} <= codes(found)
    assert any("8 rows have no token" in finding.text for finding in found.findings)


def test_meta_shards_and_tied_outputs(tmp_path: Path) -> None:
    found = inspect(write_meta(tmp_path / "meta", build("llama-3"), 2))
    assert (found.kind, found.shards, found.tokenizer) == ("meta", 2, None)
    assert found.config is not None
    assert found.as_dict()["stored_numbers"] == parameters(found.config)
    assert found.what.endswith("of no released size")


def test_a_checkpoint_that_does_not_open_is_described(tmp_path: Path) -> None:
    write_hf(tmp_path, build("llama-2"))
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"num_hidden_layers": 3}))
    found = inspect(tmp_path)
    assert found.problem is not None
    assert "model.layers.2" in found.problem
    assert found.tensors
    assert found.kind == "unreadable"


def test_vision_models_encoders_and_adapters_are_described(tmp_path: Path) -> None:
    cases = {
        "mllama": {"model_type": "mllama", "text_config": {"hidden_size": 4096, "num_hidden_layers": 40}},
        "deberta-v2-classifier": {"model_type": "deberta-v2", "hidden_size": 768, "id2label": {"0": "A", "1": "B"}},
        "other": {"model_type": "mistral", "hidden_size": 4096},
    }
    for kind, config in cases.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        sparse_safetensors(folder / "model.safetensors", {"a": (4, 4)})
        found = inspect(folder)
        assert (found.kind, len(found.tensors), found.config) == (kind, 1, None)
        assert found.foreign is not None
    assert inspect(tmp_path / "mllama").what.endswith("not runnable yet")
    assert inspect(tmp_path / "deberta-v2-classifier").as_dict()["foreign"] == {"hidden_size": 768, "labels": 2}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": "meta-llama/Llama-3.1-8B", "peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = inspect(adapter)
    assert found.kind == "adapter"
    assert "meta-llama/Llama-3.1-8B" in found.what
    assert found.as_dict()["foreign"]["rank"] == 8
    native = tmp_path / "native"
    native.mkdir()
    (native / "params.json").write_text(json.dumps({"dim": 4096, "vision_num_cross_attention_layers": 8}))
    torch.save({"text_model.x": torch.zeros(2, 2)}, native / "consolidated.00.pth")
    assert inspect(native).kind == "mllama"


@pytest.mark.parametrize(
    ("key", "value", "kind"), [("general.type", "mmproj", "mmproj"), ("general.type", "adapter", "adapter")]
)
def test_other_gguf_files_are_described(tmp_path: Path, key: str, value: str, kind: str) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "clip" if kind == "mmproj" else "llama")
    writer.add_string(key, value)
    writer.add_tensor("t", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(path)
    assert (found.kind, found.config) == (kind, None)
    assert found.types == {"F32": (1, 4, 16)}


def test_nothing_to_describe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        inspect(tmp_path)
    run = tmp_path / "run"
    for name in ("config.yaml", "log.jsonl"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    with pytest.raises(CheckpointError, match="a run that has not written its model yet"):
        inspect(run)
    for name in ("adapter", "model"):
        (run / name).mkdir()
        with pytest.raises(CheckpointError, match=f"the folder of a run: its {name} is {run / name}"):
            inspect(run)
        with pytest.raises(CheckpointError, match=f"the folder of a run: its {name} is {run / name}"):
            read_adapter(run, SMALL)
    damaged = tmp_path / "x.gguf"
    damaged.write_bytes(b"GGUF" + b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"x\.gguf, byte 4"):
        inspect(damaged)
    with pytest.raises(UnknownModelError, match="nearest"):
        inspect("lama-3.1-8x")
