"""herd-nano from a collection to the folder that ships: files, vocabulary, two runs that `herd train` knows, a card."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import herd
from herd.chat.formats import detect, format_named
from herd.checkpoint.fill import fill
from herd.checkpoint.load import load
from herd.checkpoint.open import open_store
from herd.checkpoint.vocabulary import load_tokenizer
from herd.cli.train import configured
from herd.data.adapt import kind_of, records
from herd.data.encode import IGNORE, check_prompts, encode
from herd.data.records import ChatRecord
from herd.train.measure import bits_per_byte
from herd.train.overrides import dump_config
from herd.train.recipes import nano, nano_check, nano_data
from herd.train.recipes.nano_data import make_vocabulary, write_data
from herd.train.state import latest, read_state

SHIPPED = Path(herd.__file__).parent / "embedded" / "nano"
SENTENCE = "The {} ran over the hill and saw a little {} by the river. It was glad, and they went home together. "
ANIMALS = ("dog", "cat", "fox", "hen", "cow", "bear", "frog", "duck")


def story(one: str, two: str) -> str:
    return "\n\n".join(SENTENCE.format(one, two) * 2 for _ in range(6))


def zstd(path: Path, data: bytes) -> None:
    path.write_bytes(pytest.importorskip("zstandard").compress(data))


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data collection of the form that the recipe reads, with a few kilobytes of our own sentences."""
    folder = tmp_path_factory.mktemp("collection")
    for name in ("pretrain", "sft", "eval"):
        (folder / name).mkdir()
    kinds: list[dict[str, Any]] = [
        {"source": "a book", "license": "public domain"},
        {"source": "global-asp/asp-source", "license": "CC BY 4.0", "author": "A. Writer"},
        {"source": "nishkalavallabhi/OneStopEnglishCorpus", "license": "CC BY-SA 4.0", "level": "Ele"},
        {"source": "nishkalavallabhi/OneStopEnglishCorpus", "license": "CC BY-SA 4.0", "level": "Adv"},
    ]
    rows = [
        {"text": story(one, two), "title": f"The {one} and the {two}", **kind}
        for kind in kinds for one in ANIMALS for two in ANIMALS if one != two
    ]  # fmt: skip
    zstd(folder / "pretrain" / "en_children.jsonl.zst", lines(rows))
    other = {"text": story("ant", "bee"), "title": "Not This One", "license": "public domain"}
    zstd(folder / "pretrain" / "en_books.jsonl.zst", lines([other]))
    asked = {"messages": [{"role": "user", "content": "Who invented the paper clip?"}]}
    (folder / "sft" / "dolly_subset.jsonl.gz").write_bytes(gzip.compress(lines([asked, asked])))
    valid = [{"set": "en_children", "text": story("owl", "crow")}, {"set": "code", "text": "x = 1"}]
    (folder / "eval" / "lm_valid.jsonl.gz").write_bytes(gzip.compress(lines(valid)))
    return folder


@pytest.fixture(scope="module")
def made(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first step writes, and the shipped vocabulary in place of one of its own."""
    out = tmp_path_factory.mktemp("nano")
    write_data(collection, out / "data", lambda text: None)
    (out / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, out / "tokenizer")
    return out


@pytest.fixture
def short(made: Path, tmp_path: Path) -> Path:
    """The same with some conversations: encoding all of them takes longer than training."""
    out = tmp_path / "nano"
    shutil.copytree(made, out)
    for name in ("stories", "talk"):
        path = out / "data" / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[::40]))
    return out


def test_texts_are_sorted_by_kind_and_what_is_too_hard_is_left_out(made: Path) -> None:
    count = {path.stem: len(path.read_text().splitlines()) for path in (made / "data").iterdir()}
    pairs = len(ANIMALS) * (len(ANIMALS) - 1)
    assert {name: count[name] for name in ("books", "pictures", "news", "held-out")} == {
        "books": pairs, "pictures": pairs, "news": pairs, "held-out": 1,
    }  # fmt: skip
    assert count["stories"] > 1000
    assert count["talk"] > 10_000
    assert not (set((made / "data" / "books.jsonl").read_text()) & set("<>|"))


def test_conversations_are_learned_as_they_are_served(made: Path) -> None:
    tokenizer = load_tokenizer(SHIPPED)
    form = format_named("llama3", tokenizer)
    assert detect(tokenizer).name == form.name
    for name in ("stories", "talk"):
        path = made / "data" / f"{name}.jsonl"
        assert kind_of(path) == "messages"
        found = list(islice(records(path), 2000))
        for record in found[::40]:
            assert isinstance(record, ChatRecord)
            check_prompts(record, form)
            example = encode(record, tokenizer, form)
            learned = tokenizer.decode([label for label in example.labels if label != IGNORE], skip_special=False)
            said = [turn.text for turn in record.messages if turn.role == "assistant"]
            assert learned == "".join(f"{text}<|eot_id|>" for text in said)


def test_the_same_collection_gives_the_same_files(made: Path, collection: Path, tmp_path: Path) -> None:
    write_data(collection, tmp_path / "data", lambda text: None)
    for path in (made / "data").iterdir():
        assert (tmp_path / "data" / path.name).read_bytes() == path.read_bytes()


def test_the_vocabulary_is_in_llama_3s_layout(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano_data, "VOCAB_SIZE", 320)
    make_vocabulary(made / "data", tmp_path / "tokenizer", lambda text: None)
    small, shipped = load_tokenizer(tmp_path / "tokenizer"), load_tokenizer(SHIPPED)
    assert small.vocab_size == 320
    shift = {name: id - 288 for name, id in small.special.ids.items()}
    assert shift == {name: id - 4064 for name, id in shipped.special.ids.items()}
    assert (small.special.eos, small.special.pad) == (289, 292)


def test_the_runs_are_those_that_herd_train_takes(made: Path, tmp_path: Path) -> None:
    """Word for word: written down and read again, and of the size that ships."""
    for make in (nano.pretrain, nano.chat):
        config = make(made, nano.TOKENS, ["threads=1"])
        assert config.train.budget.tokens == round(nano.TOKENS * nano.SHARE[make.__name__])
        place = tmp_path / f"{make.__name__}.yaml"
        place.write_text(dump_config(config))
        assert configured(str(place), []) == config
    assert sum(nano.SHARE.values()) == pytest.approx(1)


def test_from_texts_to_the_folder_that_ships_and_nothing_twice(
    short: Path, collection: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = short
    few = {"questions": 2, "stories": 1, "limit": 16}
    monkeypatch.setattr(nano_check, "SHOWN", ("hello",))
    monkeypatch.setattr(nano, "check", lambda *args: nano_check.check(*args, **few))
    quick = ["train.compile=false", "data.rows=1", "data.workers=0", "data.processes=1", "train.evaluate.max_tokens=4"]
    quick += ["train.evaluate.prompts=[hello]"]
    args = ["--data", str(collection), "--out", str(made), "--tokens", "4000"]
    nano.main([*args, *quick])
    said = capsys.readouterr().out
    assert "bits_per_byte" in said
    assert "before the chat stage" in said
    places = [latest(made / name) for name in ("pretrain", "chat")]
    assert all(read_state(place)["counters"]["step"] >= 1 for place in places if place is not None)
    assert (made / "pretrain" / "config.yaml").exists()
    assert (made / "pretrain" / "log.jsonl").exists()

    model, tokenizer = load(made / "export", dtype=torch.float32)
    assert sum(weight.numel() for weight in model.parameters()) == 5_475_584
    assert (model.config.max_seq_len, model.config.vocab_size, detect(tokenizer).name) == (512, 4096, "llama3")
    assert json.loads((made / "export" / "generation_config.json").read_text())["temperature"] == 0.6
    store = open_store(made / "chat" / "model")
    kept = fill(store, dtype=torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), kept.parameters(), strict=True))
    card = (made / "export" / "README.md").read_text()
    text = story("owl", "crow")
    bits = bits_per_byte(model, [(tokenizer.encode(text), len(text.encode()))], tokenizer.special.bos, 511)
    assert f"as shipped | {bits:.3f} |" in card
    assert "| pretrain |" in card
    assert "5,475,584" in card
    assert not re.search(r"\{[a-z_]+\}", card.split("## Sample replies")[0])
    credits = (made / "export" / "ATTRIBUTION.md").read_text()
    assert "The dog and the cat, by A. Writer" in credits
    assert "Not This One" not in credits

    before = {
        path: path.stat().st_mtime_ns for name in ("data", "pretrain", "chat") for path in (made / name).rglob("*")
    }
    nano.main([*args, *quick])
    assert {path: path.stat().st_mtime_ns for path in before} == before
