import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from herd.chat.formats import format_named
from herd.data.adapt import records
from herd.data.config import DataPart, SourcePart, StagePart
from herd.data.encode import IGNORE, encode
from herd.data.open import open_data
from herd.errors import DataError, PromptError
from herd.model.attend import packed
from herd.model.config import ModelConfig, plain
from tests.data.corpus import chat_format, chats, completions, texts, tokenizer, write

LENGTH = 64


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "in/texts.jsonl", texts(200))
    write(tmp_path / "in/chats.jsonl", chats(80))
    write(tmp_path / "in/completions.jsonl", completions(40))
    return tmp_path


def part(folder: Path, *names: str, **changes) -> DataPart:
    sources = tuple(
        SourcePart(path=str(folder / f"in/{name}.jsonl")) for name in names or ("texts", "chats", "completions")
    )
    fields = {
        "sources": sources,
        "length": LENGTH,
        "rows": 4,
        "shards": str(folder / "shards"),
        "long_rows": "skip",
        "workers": 0,
    }
    return DataPart(**(fields | {"processes": 1} | changes))


def open_(folder: Path, *names: str, total=None, rank=0, world=1, **changes):
    return open_data(part(folder, *names, **changes), tokenizer(), chat_format(), rank, world, total=total)


def documents_of(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and labels between the places where positions are 0, but for padding."""
    found = []
    for tokens, labels, positions in zip(
        batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist(), strict=True
    ):
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(positions)]
        for start, end in pairwise(starts):
            assert positions[start:end] == list(range(end - start))
            if any(label != IGNORE for label in labels[start:end]):
                found.append((tuple(tokens[start:end]), tuple(labels[start:end])))
    return found


@pytest.mark.parametrize("pack", ["best-fit", "none"])
@pytest.mark.parametrize("name", ["chats", "completions"])
def test_an_epoch_is_every_conversation_once_as_it_was_encoded(folder, name, pack):
    loader, _, report = open_(folder, name, rows=1, pack=pack)
    rows = report.sources[0].rows
    found = [document for _ in range(rows) for document in documents_of(loader.draw())]
    examples = [encode(record, tokenizer(), chat_format()) for record in records(folder / f"in/{name}.jsonl")]
    assert sorted(found) == sorted((e.tokens, e.labels) for e in examples if len(e) <= LENGTH)
    assert report.sources[0].too_long == sum(len(e) > LENGTH for e in examples)


@pytest.mark.parametrize("pack", ["best-fit", "concat", "none"])
def test_of_text_every_token_is_learned_once_however_long_the_document(folder, pack):
    write(folder / "in/texts.jsonl", texts(60, most=400))
    loader, _, report = open_(folder, "texts", rows=1, pack=pack)
    examples = [encode(record, tokenizer(), None) for record in records(folder / "in/texts.jsonl")]
    learned = np.zeros(tokenizer().vocab_size, int)
    tokens = 0
    for _ in range(report.sources[0].rows):
        batch = loader.draw()
        labels = batch.labels[batch.labels != IGNORE].numpy()
        learned += np.bincount(labels, minlength=len(learned))
        tokens += batch.seen or 0
    expected = np.bincount([label for e in examples for label in e.labels if label != IGNORE], minlength=len(learned))
    assert (learned == expected).all()
    assert tokens == sum(map(len, examples)) == report.tokens
    assert report.sources[0].split == sum(len(e) > LENGTH for e in examples) > 5


def test_conversations_are_whole_also_where_text_is_cut(folder):
    loader, _, report = open_(folder, "chats", rows=1, pack="concat")
    found = [document for _ in range(report.sources[0].rows) for document in documents_of(loader.draw())]
    examples = [encode(record, tokenizer(), chat_format()) for record in records(folder / "in/chats.jsonl")]
    assert sorted(found) == sorted((e.tokens, e.labels) for e in examples if len(e) <= LENGTH)


def row_stream(loaders, draws: int) -> str:
    digest = hashlib.sha256()
    for _ in range(draws):
        for row in [row for loader in loaders for row in _rows(loader.draw())]:
            digest.update(row)
    return digest.hexdigest()


def _rows(batch) -> list[bytes]:
    return [
        torch.stack([batch.tokens[i], batch.labels[i], batch.positions[i]]).numpy().tobytes()
        for i in range(len(batch.tokens))
    ]


STAGES = (
    StagePart(until=0.5, weights={"texts": 1}),
    StagePart(until=1, weights={"texts": 1, "chats": 2, "completions": 1}),
)


def test_the_bytes_of_a_run_depend_on_nothing_but_its_description(folder):
    """Workers, ranks, processes that tokenized, interruptions."""
    whole = row_stream([open_(folder, total=160, stages=STAGES)[0]], 40)
    again = part(folder, stages=STAGES, shards=str(folder / "other"), processes=2, workers=2)
    assert whole == row_stream([open_data(again, tokenizer(), chat_format(), total=160)[0]], 40)
    for workers in (0, 1, 2):
        ranks = [open_(folder, total=160, stages=STAGES, rows=2, rank=r, world=2, workers=workers)[0] for r in range(2)]
        assert whole == row_stream(ranks, 40)
    first = open_(folder, total=160, stages=STAGES, workers=2)[0]
    digest = hashlib.sha256()
    for _ in range(23):
        for row in _rows(first.draw()):
            digest.update(row)
    second = open_(folder, total=160, stages=STAGES)[0]
    second.restore(json.loads(json.dumps(first.state)))
    for _ in range(17):
        for row in _rows(second.draw()):
            digest.update(row)
    assert digest.hexdigest() == whole
    assert whole != row_stream([open_(folder, total=160, stages=STAGES, seed=1)[0]], 40)


def test_packed_documents_do_not_see_each_other(folder):
    """The mask that the model makes of the positions: one block for each document, and causal."""
    loader, _, _ = open_(folder, "texts", rows=2)
    batch = loader.draw()
    config = ModelConfig(dim=8, n_heads=1, n_kv_heads=1, head_dim=8, hidden_dim=8, vocab_size=16, layers=plain(1))
    mask = packed(config, batch.positions)[0].mask(None)[:, 0]
    document = (batch.positions == 0).cumsum(-1)
    expected = (document[:, :, None] == document[:, None, :]) & torch.ones(LENGTH, LENGTH).tril().bool()
    assert (mask == expected).all()
    assert int(document.max()) > 2


def test_conversations_that_are_too_long_stop_or_are_named(folder):
    with pytest.raises(
        DataError, match=r"of 80 documents are longer than a row of 64 tokens, .*chats\.jsonl:\d+ \(\d+ tokens\)"
    ):
        open_(folder, "chats", long_rows="stop")
    _, _, report = open_(folder, "chats", long_rows="skip")
    assert report.sources[0].too_long
    assert any("are longer than a row and left out: " in line and "chats.jsonl:" in line for line in report.lines())


def test_a_share_is_held_out_and_never_trained_on(folder):
    loader, held, report = open_(folder, "texts", "chats", held_out="20%", rows=1)
    assert held is not None
    assert report.held_out is not None
    trained = set()
    rows = report.sources[0].rows + report.sources[1].rows
    for _ in range(4 * rows):
        trained |= {document[0] for document in documents_of(loader.draw())}
    kept = [document[0] for batch in held.batches() for document in documents_of(batch)]
    assert not trained & set(kept)
    assert 0.1 < report.held_out[0] / 280 < 0.3
    assert held.learned == sum(int((batch.labels != IGNORE).sum()) for batch in held.batches())
    assert [b.tokens.tolist() for b in held.batches()] == [b.tokens.tolist() for b in held.batches()]
    halves = [document for rank in range(2) for b in held.batches(rank=rank, world=2) for document in documents_of(b)]
    assert sorted(document[0] for document in halves) == sorted(kept)


def test_copies_of_a_document_are_on_the_same_side(folder):
    rows = texts(60)
    write(folder / "in/texts.jsonl", rows + rows + rows)
    loader, held, report = open_(folder, "texts", held_out="30%", rows=1)
    kept = [document[0] for batch in held.batches() for document in documents_of(batch)]
    assert all(kept.count(document) % 3 == 0 for document in kept)
    for _ in range(report.sources[0].rows):
        assert not {document[0] for document in documents_of(loader.draw())} & set(kept)


def test_bytes_of_held_out_text_are_those_of_the_text(folder):
    write(folder / "in/valid.jsonl", texts(30, seed=9, most=200))
    _, held, report = open_(folder, "texts", held_out=str(folder / "in/valid.jsonl"))
    assert held.size == sum(len(row["text"].encode()) for row in texts(30, seed=9, most=200))
    assert report.held_out[0] == 30
    write(folder / "in/valid.jsonl", texts(30, seed=9) + texts(200)[:5])
    _, _, report = open_(folder, "texts", held_out=str(folder / "in/valid.jsonl"))
    assert "held out: 5 of its 35 documents are in texts, too, and trained on" in report.notes


def test_a_share_of_so_little_that_it_is_nothing_is_said(folder):
    _, held, report = open_(folder, "completions", held_out="0.0001%")
    assert held is None
    assert any("0.0001% of 40 documents are none" in note for note in report.notes)


def test_epochs_are_told_before_the_run(folder):
    _, _, report = open_(folder, "texts", total=10_000)
    told = [line for line in report.lines() if "times (max_epochs says how often is fine)" in line]
    assert [line.partition(":")[0] for line in told] == ["texts"]
    assert report.sources[0].epochs == pytest.approx(10_000 / report.sources[0].rows)
    _, _, report = open_(folder, "texts", total=report.sources[0].rows)
    assert not any("max_epochs" in line for line in report.lines())
    assert report.sources[0].epochs == 1


def test_bad_rows_stop_or_are_in_the_report(folder):
    path = folder / "in/texts.jsonl"
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(DataError, match=r"texts\.jsonl:201: not JSON"):
        open_(folder, "texts")
    _, _, report = open_(folder, "texts", bad_rows="skip")
    assert report.sources[0].reading.bad_count == 1
    assert any("texts.jsonl:201" in line for line in report.lines())


def test_plans_are_kept_and_made_again_when_they_are_damaged(folder):
    first = open_(folder, "texts")[0].mixture.content
    plans = list((folder / "shards/plans").iterdir())
    assert len(plans) == 1
    before = plans[0].stat().st_mtime_ns
    assert open_(folder, "texts")[0].mixture.content == first
    assert plans[0].stat().st_mtime_ns == before
    plans[0].write_bytes(plans[0].read_bytes()[:100])
    assert open_(folder, "texts")[0].mixture.content == first


def test_shards_in_a_folder_that_is_read_only_are_used(folder, monkeypatch):
    first = open_(folder, "texts")[0].mixture.content
    for plan in (folder / "shards/plans").iterdir():
        plan.unlink()
    os.utime(folder / "in/texts.jsonl", (1e9, 1e9))  # so old that its content would be remembered

    def refused(*arguments):
        raise DataError("cannot be written: Read-only file system")

    monkeypatch.setattr("herd.data.arrange.write_sections", refused)
    monkeypatch.setattr("herd.data.content.write_json", refused)
    assert open_(folder, "texts")[0].mixture.content == first


def test_a_damaged_shard_is_named_when_it_is_drawn(folder):
    loader, _, _ = open_(folder, "texts", rows=1)
    shard = next((folder / "shards").glob("texts-*/*.rows"))
    data = bytearray(shard.read_bytes())
    data[600] ^= 1  # among the tokens
    shard.write_bytes(data)
    loader = open_(folder, "texts", rows=1)[0]
    with pytest.raises(DataError, match=r"00000\.rows, byte \d+: the checksum"):
        for _ in range(100):
            loader.draw()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chat_format": "llama9"}, PromptError, "no prompt format 'llama9'"),
        ({"sources": (SourcePart(path="nowhere.jsonl"),)}, DataError, "nowhere"),
        ({"sources": (SourcePart(path="in/prefer.jsonl"),)}, DataError, "PreferenceRecord is not for next-token"),
    ],
)
def test_what_cannot_be_opened_is_refused(folder, monkeypatch, change, error, message):
    monkeypatch.chdir(folder)
    write(folder / "in/prefer.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(error, match=message):
        open_data(part(folder, **change), tokenizer(), chat_format())


@pytest.mark.parametrize("bad", ["stop", "skip"])
def test_conversations_without_a_format_ask_for_one_and_are_not_skipped(folder, bad):
    config = part(folder, sources=(SourcePart(path=str(folder / "in"), name="all"),), bad_rows=bad)
    with pytest.raises(DataError, match=r"chats\.jsonl:1: a conversation needs a prompt format: .*data\.chat_format"):
        open_data(config, tokenizer(), format_named("base", tokenizer()))


def test_sources_may_be_folders_with_files_of_several_kinds(folder):
    config = part(folder, sources=(SourcePart(path=str(folder / "in"), name="all"),))
    loader, _, report = open_data(config, tokenizer(), chat_format())
    told = report.sources[0]
    assert told.files == 3
    assert told.kinds == ("completion", "messages", "text")
    assert told.documents == 320
    where = loader.where(0)
    assert where.startswith("all (")
    assert ".jsonl:" in where
