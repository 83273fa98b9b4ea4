import gzip
import io
import json

import pytest

from herd.data.read import DataError, RowReport, read_rows


def test_lines_are_split_on_newline_only(tmp_path):
    text = "one\u2028two\x85three\rfour"
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
    assert [row["text"] for row in read_rows(path)] == [text]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_plain_gzip_and_zstandard_give_the_same_rows(tmp_path, suffix):
    data = b"".join(json.dumps({"n": n, "text": "x" * n}).encode() + b"\n" for n in range(50))
    path = tmp_path / f"rows.jsonl{suffix}"
    if suffix == ".gz":
        data = gzip.compress(data)
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        stream = io.BytesIO()
        with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as writer:
            writer.write(data)
        data = stream.getvalue()
    path.write_bytes(data)
    assert [row["n"] for row in read_rows(path)] == list(range(50))


def test_bad_rows_are_named_and_good_ones_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\nnot json\n[1]\n\n{"other": 1}\n{"text": "\xff"}\n{"text": "b"}')
    report = RowReport()
    rows = list(read_rows(path, report, require=("text",)))
    assert [row["text"] for row in rows] == ["a", "b"]
    assert report.good == 2
    assert [(bad.line, bad.reason.split(":")[0].split(" at ")[0]) for bad in report.bad] == [
        (2, "not JSON"),
        (3, "an object was expected, found list"),
        (5, "missing text"),
        (6, "not UTF-8"),
    ]
    assert str(path) in str(report.bad[0])
    with pytest.raises(DataError, match="4 bad rows"):
        report.check()
    report.check(allowed=4)


def test_without_a_report_the_first_bad_row_stops(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        list(read_rows(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such data file"):
        list(read_rows(tmp_path / "none.jsonl"))
