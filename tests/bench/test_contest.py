"""Measuring itself, on a shape that takes no time: what comes out is complete, and what cannot be measured is said."""

import json
from importlib import import_module

import pytest

from herd.bench.contest import Plan, contest
from herd.bench.material import RandomStore, gguf_file, hf_folder, step_bytes
from herd.bench.players.base import Setup
from herd.bench.process import Process
from herd.bench.subject import kind_of, prompts, subject
from herd.bench.table import tables
from herd.bench.worker import PLAYERS, answer
from herd.checkpoint.open import open_store
from herd.cli.main import run
from herd.errors import BenchError, CheckpointError, ConfigError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def report(cache):
    plan = Plan(
        task="batch",
        subject=subject("tiny"),
        kinds=["Q4_0"],
        threads=1,
        folder=cache,
        prompt=20,
        tokens=4,
        batches=(1, 3),
        runs=2,
    )
    return contest(plan)


class Here:
    """A player without a process: what processes are for is no question where this is used."""

    def __init__(self, player, setup):
        self.player, self._playing = player, import_module(PLAYERS[player]).open_player(setup)
        self.facts = self._playing.facts()

    def ask(self, verb, **given):
        return json.loads(json.dumps(answer(self._playing, verb, given)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_rows_have_every_sample(report):
    assert json.loads(json.dumps(report)) == report  # plain data
    assert [(row["who"], row["weights"], row["batch"]) for row in report["rows"]] == [
        ("herd", "Q4_0", 1),
        ("herd", "Q4_0", 3),
    ]
    for row in report["rows"]:
        assert len(row["samples"]) == 2
        values = [sample["tokens_per_s"] for sample in row["samples"]]
        assert row["min"] <= row["tokens_per_s"] <= row["max"]
        assert (row["min"], row["max"]) == (pytest.approx(min(values), abs=0.01), pytest.approx(max(values), abs=0.01))
        assert row["share"] > 0
        assert row["times"] is None
    assert {"cpu", "cores", "versions", "commit", "date", "command", "load", "load_after"} <= report["machine"].keys()
    assert report["limits"]["Q4_0"]["gb_per_s"] > 0
    assert set(report["limits"]["Q4_0"]["gop_per_s"]) == {"int8", "bfloat16", "float32"}


def test_bytes_and_rates_by_hand(report, cache):
    """Weights of a step and bytes of keys and values, counted here; GB/s follow from tokens per second."""
    config = subject("tiny").config
    layer = config.dim * (2 * 4 * 64 + 2 * 2 * 64) + 3 * config.dim * config.hidden_dim
    blocks = 18 / 32  # bytes per value of Q4_0; the tied embedding is Q6_K, norms are float32
    weights = config.n_layers * layer * blocks + config.vocab_size * config.dim * 210 / 256 + 5 * config.dim * 4
    assert step_bytes(gguf_file(subject("tiny"), "Q4_0", cache)) == weights
    for row in report["rows"]:
        moved = weights + row["batch"] * 2 * config.n_layers * 2 * 64 * 2 * (20 + 2)
        assert row["step_bytes"] == moved
        assert row["gb_per_s"] == pytest.approx(row["tokens_per_s"] / row["batch"] * moved / 1e9, abs=0.01)


def test_table_fits_a_terminal(report):
    text = tables(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "herd" in text
    assert "processor's last cache" in text or report["machine"]["last_level_cache"] is None


def test_a_player_that_cannot_start_says_why(cache):
    setup = Setup(str(cache / "nothing.gguf"), 1, 1, 8)
    with pytest.raises(BenchError, match="nobody could not be measured: KeyError: 'nobody'"):
        Process("nobody", setup)
    with pytest.raises(CheckpointError, match="there is no such file"):
        Here("herd", setup)


def test_more_positions_than_the_model_has():
    with pytest.raises(ConfigError, match="shorten --prompt or --tokens"):
        contest(Plan(task="decode", subject=subject("nano"), kinds=[None], threads=1, folder=None, prompt=10**6))


def test_random_weights_are_the_same_in_every_file(cache):
    what = subject("tiny")
    store = RandomStore(what)
    gguf, folder = open_store(gguf_file(what, "BF16", cache)), open_store(hf_folder(what, cache))
    assert gguf.config == folder.config == what.config
    for name in store.names():
        made = store.read(name)
        assert made.float().abs().min() > 0 or made.float().std() > 0
        assert (gguf.read(name).float() == made.float()).all()
        assert (folder.read(name) == made).all()


def test_files_are_written_once(cache):
    file = gguf_file(subject("tiny"), "BF16", cache)
    stamp = file.stat().st_mtime_ns
    assert gguf_file(subject("tiny"), "BF16", cache).stat().st_mtime_ns == stamp
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_names_of_models_and_weights():
    assert subject("8b").config == subject("llama-3.1-8b").config
    assert subject("llama3.2:1b").path is None
    assert subject("nano").path is not None
    assert [kind_of(word) for word in ("int4", "INT8", "bf16", "q4_k_m")] == ["Q4_0", "Q8_0", "BF16", "Q4_K_M"]
    with pytest.raises(ConfigError, match=r"choose one of .*q4_0.*int4"):
        kind_of("int3")
    with pytest.raises(ConfigError, match="cannot be measured"):
        subject("prompt-guard-86m")


def test_prompts_are_ids_of_the_vocabulary():
    config = subject("tiny").config
    given = prompts(config, 50, 2)
    assert given == prompts(config, 50, 2)
    assert given[0] != given[1]
    assert all(0 <= token < config.vocab_size for token in given[0])


def cli(capsys, *words):
    status = run(["bench", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_json_and_plot(capsys, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("herd.bench.contest.Process", Here)
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    picture = tmp_path / "speed.png"
    small = ("--model", "tiny", "--cache", cache, "--threads", 1, "--prompt", 16, "--runs", 1)
    status, out, err = cli(capsys, "prefill", *small, "--weights", "int4", "--json", "--plot", picture)
    assert status == 0, err
    found = json.loads(out)
    assert found["plan"]["task"] == "prefill"
    assert found["rows"][0]["limit"] == "int8"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_cold_start(capsys, cache):
    small = ("--model", "tiny", "--cache", cache, "--threads", 1, "--prompt", 8, "--runs", 1)
    status, out, err = cli(capsys, "cold-start", *small, "--json")
    assert status == 0, err
    (row,) = json.loads(out)["rows"]
    assert row["seconds"] >= sum(row["parts"].values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["decode", "--batch", "2"], "--batch says nothing to herd bench decode"),
        (["prefill", "--tokens", "3", "--batch", "1,2"], "--tokens, --batch say nothing to herd bench prefill"),
        (["tokenizer", "--weights", "int4"], "--weights says nothing to herd bench tokenizer"),
        (["decode", "--shared", "x"], "--shared says nothing"),
        (["batch", "--batch", "1,x"], "not a list such as 1,4,16"),
        (["batch", "--batch", "0"], "not a list such as"),
        (["decode", "--threads", "0"], "0 is not in the range"),
        (["dekode"], "is not one of"),
    ],
)
def test_flags_that_make_no_sense(capsys, words, said):
    status, out, err = cli(capsys, *words)
    assert (status, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "int3"], "no quantization is called 'int3'"),
        (["--peers", "vllm"], "no peer is called 'vllm': choose llama.cpp or transformers"),
        (["--model", "llama9:1b"], "no model called 'llama9:1b'"),
        (["--plot", "speed.bmp"], "a plot is a .png, .svg or .pdf file"),
        (["--plot", "missing/folder/speed.png"], "there is no folder"),
    ],
)
def test_what_cannot_be_measured(capsys, tmp_path, words, said):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    status, out, err = cli(capsys, "decode", *words, "--cache", tmp_path)
    assert (status, out) == (1, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_peer_that_is_not_installed(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("herd.bench.process.NEEDS", {"llama.cpp": ("no_such_module", "llama-cpp-python")})
    status, _, err = cli(capsys, "decode", "--model", "tiny", "--peers", "llama.cpp", "--cache", tmp_path)
    assert status == 1
    assert "llama.cpp is not installed, so it cannot be measured beside herd: pip install llama-cpp-python" in err
    assert not list(tmp_path.iterdir())  # said before anything was written


def test_a_plot_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = cli(capsys, "decode", "--model", "tiny", "--plot", tmp_path / "a.png", "--cache", tmp_path)
    assert status == 1
    assert "--plot needs matplotlib: pip install 'herd[plot]'" in err
