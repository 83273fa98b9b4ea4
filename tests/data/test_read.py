import gzip
import io
import json
import os
import random

import pytest

from herd.data.files import find_files
from herd.data.read import MAX_ROW, DataError, RowReport, open_rows, read_rows


def _zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    stream = io.BytesIO()
    with zstandard.ZstdCompressor(write_checksum=True).stream_writer(stream, closefd=False) as writer:
        writer.write(data)
    return stream.getvalue()


def test_lines_are_split_on_newline_only(tmp_path):
    text = "one\u2028two\x85three\rfour"
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
    assert [row["text"] for row in read_rows(path)] == [text]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_plain_gzip_and_zstandard_give_the_same_rows(tmp_path, suffix):
    data = b"".join(json.dumps({"n": n, "text": "x" * n}).encode() + b"\n" for n in range(50))
    path = tmp_path / f"rows.jsonl{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": _zst}[suffix]
    path.write_bytes(pack(data) if not suffix else pack(data[:400]) + pack(data[400:]))  # members may follow each other
    assert [row["n"] for row in read_rows(path)] == list(range(50))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("bad", ["stop", "skip"])
def test_a_packed_file_that_is_cut_or_damaged_always_ends_the_reading(tmp_path, suffix, bad):
    data = b"".join(json.dumps({"text": os.urandom(40).hex()}).encode() + b"\n" for _ in range(20_000))
    packed = gzip.compress(data) if suffix == ".gz" else _zst(data)
    path = tmp_path / f"rows.jsonl{suffix}"
    for damaged in (packed[:-5], packed[: len(packed) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.jsonl\.\w+:\d+: the file is damaged or cut here"):
            list(open_rows(path, bad=bad))
    path.write_bytes(packed[:5000] + bytes(40) + packed[5040:])  # may show as a bad row before it is noticed
    with pytest.raises(DataError, match=r"rows\.jsonl\.\w+:\d+: "):
        list(open_rows(path, bad=bad))


def test_bad_rows_are_named_and_good_ones_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\nnot json\n[1]\n\n{"other": 1}\n{"text": "\xff"}\n{"text": "b"}')
    report = RowReport()
    rows = list(read_rows(path, report, bad="skip", require=("text",)))
    assert [row["text"] for row in rows] == ["a", "b"]
    assert report.good == 2
    assert [(bad.line, bad.reason.split(":")[0].split(" at ")[0]) for bad in report.bad] == [
        (2, "not JSON"),
        (3, "an object was expected, found an array"),
        (5, "missing text"),
        (6, "not UTF-8"),
    ]
    assert str(path) in str(report.bad[0])
    with pytest.raises(DataError, match="4 bad rows"):
        report.check()
    report.check(allowed=4)


def test_without_skip_the_first_bad_row_stops(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        list(read_rows(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such data file"):
        list(read_rows(tmp_path / "none.jsonl"))


def test_a_row_without_end_is_passed_over_without_being_held(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    huge = b'{"text": "' + b"x" * (3 * MAX_ROW) + b'"}\n'
    path.write_bytes(gzip.compress(b'{"n": 1}\n' + huge + b'{"n": 2}\n', 1))
    report = RowReport()
    rows = [(row.line, row.fields["n"]) for row in open_rows(path, report, bad="skip")]
    assert rows == [(1, 1), (3, 2)]
    assert report.bad[0].line == 2
    assert f"{len(huge):,} bytes" in report.bad[0].reason


def test_a_row_of_exactly_the_limit_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    frame = len(b'{"text": ""}')
    path.write_bytes(b'{"text": "' + b"x" * (MAX_ROW - frame) + b'"}\n{"text": "y"}\n')
    assert [len(row["text"]) for row in read_rows(path)] == [MAX_ROW - frame, 1]


def test_reports_of_endless_bad_rows_stay_small(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("no\n" * 12_000 + '{"a": 1}\n')
    report = RowReport()
    assert len(list(open_rows(path, report, bad="skip"))) == 1
    assert report.bad_count == 12_000
    assert len(report.bad) == 10_000
    assert sum(report.reasons.values()) == 12_000
    assert len(report.reasons) == 1


def test_byte_order_marks(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n{"n": 2}\r\n')
    report = RowReport()
    assert [row.fields["n"] for row in open_rows(path, report)] == [1, 2]
    assert "byte order mark" in report.notes[0]
    path.write_bytes('{"n": 1}\n'.encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        list(open_rows(path))


def test_a_json_array_gives_its_elements_with_their_lines(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text('[\n  {"n": 1},\n\n  {"n": 2,\n   "m": 0}, [3],\n  {"n": 4}, {"n": NaN, "t": "\\u00e9"}\n]\n')
    report = RowReport()
    rows = list(open_rows(path, report, bad="skip"))
    assert [(row.line, row.fields["n"]) for row in rows] == [(2, 1), (4, 2), (6, 4)]
    assert str(report.bad[0]).endswith("alpaca.json:5: an object was expected, found an array")
    assert str(report.bad[1]).endswith("alpaca.json:6: not JSON: NaN is no number")
    path.write_text(json.dumps([{"n": n} for n in range(5)]))
    assert [row.fields["n"] for row in open_rows(path)] == list(range(5))
    path.write_text("[]")
    assert list(open_rows(path, report, bad="skip")) == []
    assert str(report.bad[0]).endswith("alpaca.json:1: the file holds no row")


def test_rows_of_an_array_on_one_line_are_told_by_their_number(tmp_path):
    path = tmp_path / "alpaca.json"
    for space in ("", "\n", " \n\n"):
        path.write_text(space + '[{"n": 1}, {"n": 2}, 3, {"n": 4}]' + space)
        report = RowReport()
        assert [row.line for row in open_rows(path, report, bad="skip")] == [1, 2, 4], repr(space)
        assert str(report.bad[0]).endswith("alpaca.json:3: an object was expected, found a number")


def test_empty_lines_are_passed_over_and_said(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n  \n{"n": 2}\n\n')
    report = RowReport()
    assert [row.line for row in open_rows(path, report)] == [1, 4]
    assert report.notes == [f"{path}: 3 empty lines are passed over"]
    path.write_text('{"n": 1}\n\n')
    assert len(list(open_rows(path, report))) == 1
    assert report.notes[1:] == [f"{path}: 1 empty line is passed over"]


@pytest.mark.parametrize("text", ['[{"n": 1},\n{"n":', '[{"n": 1}\n{"n": 2}]', '[{"n": 1}]\n{}', '[{"n": 1},]', "["])
def test_a_broken_array_ends_the_reading(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows\.json:\d: not JSON"):
        list(open_rows(path, bad="skip"))


def test_a_number_of_too_many_digits_is_told_without_advice_for_programmers(tmp_path):
    for name, text in (("rows.jsonl", '{"n": %s}\n'), ("rows.json", '[{"n": %s}]')):
        (tmp_path / name).write_text(text % ("1" * 5000))
        with pytest.raises(DataError, match=rf"{name}:1: a number of more than 4,300 digits$"):
            list(open_rows(tmp_path / name))


def test_one_object_over_several_lines_is_no_array_and_no_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [1, 2]}, indent=2))
    for bad in ("stop", "skip"):
        with pytest.raises(
            DataError, match=r"rows\.json:1: one object over several lines.*an array of rows, or one row a line"
        ):
            list(open_rows(path, bad=bad))


def test_lines_that_end_in_carriage_returns_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\r{"n": 2}\r')
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: not JSON: .* \(lines end in a carriage return alone: .*line feeds\)"
    ):
        list(open_rows(path))


def test_json_lines_that_are_called_json(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert [row.fields["n"] for row in open_rows(path)] == [1, 2]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("\n\nOnce upon\n\na time.\n")
    assert [(row.line, row.fields["text"]) for row in open_rows(path)] == [(3, "Once upon\n\na time.\n")]
    path.write_text("one\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n")
    assert [(row.line, row.fields["text"]) for row in open_rows(path)] == [(1, "one\ntwo\n"), (5, "three\n")]
    path.write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"story\.txt:1: holds a NUL"):
        list(open_rows(path))


def test_a_long_text_is_cut_at_empty_lines_and_said(tmp_path):
    path = tmp_path / "book.txt"
    paragraph = b"word " * 199_999 + b"end.\n\n"
    path.write_bytes(paragraph * 20)
    report = RowReport()
    texts = [row.fields["text"] for row in open_rows(path, report)]
    assert len(texts) == 3
    assert "".join(texts).encode().replace(b"\n", b"") == (paragraph * 20).replace(b"\n", b"")
    assert all(len(text) <= MAX_ROW and text.rstrip().endswith("end.") for text in texts)
    assert "cut 2 times" in report.notes[0]
    path.write_bytes(b"x" * (MAX_ROW + 1))
    with pytest.raises(DataError, match="no text with lines"):
        list(open_rows(path))


def test_folders_and_patterns_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.jsonl", "b/a.jsonl.gz", "B.jsonl", ".hidden.jsonl", "notes.doc"):
        data = json.dumps({"name": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    report = RowReport()
    assert [row.fields["name"] for row in open_rows(tmp_path, report)] == ["B.jsonl", "b/a.jsonl.gz", "z.jsonl"]
    assert report.notes == [f"{tmp_path}: files that are no data by their names are passed over: notes.doc"]
    assert [row.fields["name"] for row in open_rows(f"{tmp_path}/**/*.jsonl*")] == [
        "B.jsonl",
        "b/a.jsonl.gz",
        "z.jsonl",
    ]
    for n in range(6):
        (tmp_path / f"table{n}.csv").touch()
    find_files(tmp_path, report.note)
    assert report.notes[-1].endswith(
        "are passed over: notes.doc, table0.csv, table1.csv, table2.csv, table3.csv, and 2 more"
    )
    with pytest.raises(DataError, match="no data file matches"):
        find_files(f"{tmp_path}/*.parquet")
    with pytest.raises(DataError, match="by the end of their names"):
        find_files(tmp_path / "notes.doc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        find_files(tmp_path / "empty")


@pytest.mark.parametrize(
    ("train", "test"),
    [("train.jsonl", "test.jsonl"), ("train-00000-of-2.parquet", "dev.json"), ("train/a.txt", "val/a.txt")],
)
def test_a_folder_of_training_and_test_data_is_refused(tmp_path, train, test):
    for name in (train, test):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="name the file or pattern that is meant"):
        find_files(tmp_path)


def test_parquet_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    messages = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}] for n in range(200)]
    pq.write_table(pyarrow.table({"messages": messages, "none": [None] * 200}), path, row_group_size=50)
    rows = list(open_rows(path))
    assert [row.line for row in rows] == list(range(1, 201))
    assert rows[150].fields == {"messages": messages[150]}
    data = path.read_bytes()
    for damaged in (data[:-20], data[:100] + b"\xff" * 300 + data[400:], b"PAR1" + b"x" * 50):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.parquet:\d+: the table is damaged"):
            list(open_rows(path, bad="skip"))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    import sys

    for name, package in (("rows.parquet", "pyarrow"), ("rows.jsonl.zst", "zstandard")):
        (tmp_path / name).touch()
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=r"pip install 'herd\[data\]'"):
            list(open_rows(tmp_path / name))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_data_errors_or_rows(tmp_path, seed):
    """Bytes changed, cut out, put in and cut off anywhere: rows, bad rows or one DataError that names the file."""
    rng = random.Random(seed)
    rows = [
        {"messages": [{"role": "user", "content": f"{n} \u00e9"}, {"role": "assistant", "content": "b"}]}
        for n in range(40)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.zst": _zst(lines),
        "d.json": json.dumps(rows, indent=1).encode(),
        "e.txt": b"one\n\ntwo\n" * 40,
    }
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=16)
    files["f.parquet"] = table.getvalue()
    for _ in range(120):
        name = rng.choice(list(files))
        damaged = bytearray(files[name])
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(damaged)) if damaged else 0
            how = rng.random()
            if how < 0.5:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            elif how < 0.7:
                del damaged[at : at + rng.randrange(1, 40)]
            elif how < 0.9:
                damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
            else:
                del damaged[at:]
        path = tmp_path / name
        path.write_bytes(damaged)
        try:
            for row in open_rows(path, bad="skip"):
                assert row.line >= 1
        except DataError as error:
            assert str(error).startswith(f"{path}:")  # noqa: PT017  # most damage is no error at all
