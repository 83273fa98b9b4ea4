"""How well vocabularies fit a text: counts by hand, Llama's own beside them, what is missing by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.cli.main import run
from herd.data.report import RowReport
from herd.errors import ConfigError, DataError
from herd.tokenizer.files import load_tokenizer
from herd.train.compression import Fit, broken_ids, draw, measure, together
from herd.train.tokenizer import learn, write_vocabulary
from tests.conftest import shared_path

TEXT = "the cat sat on the mat, the cat ran on the mat. " * 40


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_vocabulary(learn([TEXT.encode()], "tiktoken", 280), folder)
    return folder


def test_counts_are_those_of_encoding_by_hand(vocabulary: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the cat 漢\n")
    made = load_tokenizer(vocabulary)
    (fit,), whole = measure([str(path)], {"mine": made}, 10**6, report=RowReport())
    text = path.read_text()
    assert (fit.size, fit.words, fit.tokens) == (len(text.encode()), 3, len(made.encode(text)))
    assert whole
    assert fit.broken == 3, "the three bytes of a letter that was never learned"
    assert fit.bytes_per_token == fit.size / fit.tokens
    assert fit.broken_share == 3 / fit.tokens


def test_broken_tokens_are_unknown_or_parts_of_characters(vocabulary: Path) -> None:
    made = load_tokenizer(vocabulary)
    assert broken_ids(made) >= {id for id in range(256) if made.bytes_of(id) >= b"\x80"}
    assert not broken_ids(made) & {*made.encode("the cat"), *made.special.ids.values()}
    llama2 = load_tokenizer(shared_path("data/tokenizers/llama2.tokenizer.model"))
    assert broken_ids(llama2) == {0, *range(3 + 128, 3 + 256)}, "<unk> and the bytes that are no ASCII character"


def test_sums_are_of_all_files() -> None:
    fits = [
        Fit("a", "x", 10, 2, 5, 1),
        Fit("b", "x", 20, 4, 5, 0),
        Fit("a", "y", 10, 2, 10, 0),
        Fit("b", "y", 20, 4, 10, 0),
    ]
    assert together(fits) == [Fit("all", "x", 30, 6, 10, 1), Fit("all", "y", 30, 6, 20, 0)]


def test_the_command_shows_mine_beside_llamas(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_path("data/tokenizers/llama2.tokenizer.model")
    monkeypatch.setenv("HERD_SHARED", str(shared_path("data").parent))
    path, picture = tmp_path / "a.txt", tmp_path / "fit.png"
    path.write_text(TEXT)
    pytest.importorskip("matplotlib")
    args = ["tokenizer", "compare", str(path), "--tokenizer", str(vocabulary)]
    assert run([*args, "--json", "--plot", str(picture)]) == 0
    told = json.loads(capsys.readouterr().out)
    by_name = {fit["tokenizer"]: fit for fit in told["files"]}
    llama2 = by_name["Llama 1/2, 32K"]
    own = load_tokenizer(shared_path("data/tokenizers/llama2.tokenizer.model"))
    assert llama2["tokens"] == len(own.encode(TEXT))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_said_by_name(
    vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herd.cli.tokenizer_compare._released", lambda family: None)
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert run(["tokenizer", "compare", str(path), "--tokenizer", str(vocabulary), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["missing"] == ["Llama 1/2, 32K", "Llama 3, 128K", "Llama 4, 202K"]
    assert "Llama 3, 128K: not on this machine" in told.err
    assert run(["tokenizer", "compare", str(path), "--tokenizer", str(vocabulary)]) == 0
    assert "bytes/token" in capsys.readouterr().out
    assert run(["tokenizer", "compare", str(path)]) == 1
    assert "--tokenizer" in capsys.readouterr().err


def test_bad_input_is_refused(vocabulary: Path, tmp_path: Path) -> None:
    made = {"mine": load_tokenizer(vocabulary)}
    path = tmp_path / "a.txt"
    path.write_text(" \n")
    with pytest.raises(DataError, match="no row"):
        measure([str(path)], made, 100, report=RowReport())
    with pytest.raises(DataError, match="named twice"):
        measure([str(path), str(path)], made, 100, report=RowReport())
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw([Fit("a", "x", 1, 1, 1, 0)], tmp_path / "nowhere" / "a.png")
