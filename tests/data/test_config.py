import pytest

from herd.data.config import DataPart, SourcePart, StagePart
from herd.errors import ConfigError

A, B = SourcePart(path="a.jsonl"), SourcePart(path="texts/b.jsonl.zst", weight=3)


def test_names_come_from_paths():
    assert [SourcePart(path=path).name for path in ("x/books.jsonl.gz", "folder/", "notes.txt", "d/*.jsonl")] == [
        "books",
        "folder",
        "notes",
        "*",
    ]
    assert SourcePart(path="a.jsonl", name="mine").name == "mine"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourcePart(path=""), "needs a path"),
        (lambda: SourcePart(path="a", weight=-1), "weight is -1"),
        (lambda: SourcePart(path="a", weight=float("nan")), "weight is nan"),
        (lambda: SourcePart(path="a", kind="image"), "kind is 'image'"),
        (lambda: SourcePart(path="a", max_epochs=0), "max_epochs is 0"),
        (lambda: StagePart(until=0, weights={"a": 1}), "until is 0"),
        (lambda: StagePart(until=1, weights={"a": 0}), "no source has a weight"),
        (lambda: StagePart(until=1, weights={"a": -1}), "the weight of a is -1"),
        (lambda: DataPart(sources=()), "sources is empty"),
        (lambda: DataPart(sources=(A, A)), "two sources are called a"),
        (lambda: DataPart(sources=(SourcePart(path="a", weight=0),)), "every weight is 0"),
        (lambda: DataPart(sources=(A,), length=1), "length is 1"),
        (lambda: DataPart(sources=(A,), rows=0), "rows is 0"),
        (lambda: DataPart(sources=(A,), pack="tight"), "pack is 'tight'; choose one of best-fit"),
        (lambda: DataPart(sources=(A,), bad_rows="drop"), "bad_rows is 'drop'"),
        (lambda: DataPart(sources=(A,), long_rows="cut"), "long_rows is 'cut'"),
        (lambda: DataPart(sources=(A,), workers=-1), "workers -1"),
        (lambda: DataPart(sources=(A,), held_out="60%"), "between 0 % and 50 %"),
        (lambda: DataPart(sources=(A,), held_out="0.02"), "held_out is 0.02: a share has a percent sign, as in 2%"),
        (lambda: DataPart(sources=(A,), stages=(StagePart(until=0.5, weights={"a": 1}),)), "end at 0.5"),
        (lambda: DataPart(sources=(A,), stages=(StagePart(until=1, weights={"c": 1}),)), "no source c"),
        (
            lambda: DataPart(
                sources=(A,), stages=(StagePart(until=1, weights={"a": 1}), StagePart(until=0.5, weights={"a": 1}))
            ),
            "comes after",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_held_out_is_a_share_or_a_path():
    assert DataPart(sources=(A, B), held_out="1.5%").held_out_share == 0.015
    assert DataPart(sources=(A, B), held_out="valid.jsonl").held_out_share is None
    assert DataPart(sources=(A, B)).held_out_share is None
