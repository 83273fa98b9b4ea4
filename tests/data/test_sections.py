import os

import numpy as np
import pytest

from herd.data.sections import BLOCK, Sections, write_sections
from herd.errors import DataError

ARRAYS = {
    "ids": np.arange(100_000, dtype=np.uint32),
    "none": np.zeros(0, np.int64),
    "bits": np.arange(13, dtype=np.uint8),
}


@pytest.fixture
def path(tmp_path):
    write_sections(tmp_path / "a.rows", {"made of": "numbers"}, ARRAYS)
    return tmp_path / "a.rows"


def test_arrays_come_back(path):
    file = Sections(path)
    assert file.about == {"made of": "numbers"}
    assert file.counts == {"ids": 100_000, "none": 0, "bits": 13}
    for name, array in ARRAYS.items():
        assert file.read(name).dtype == array.dtype
        assert (file.read(name) == array).all()
    assert file.read("ids", 40_000, 40_003).tolist() == [40_000, 40_001, 40_002]
    file.verify()
    with pytest.raises(IndexError):
        file.read("ids", 5, 100_001)


def test_the_same_arrays_are_the_same_bytes(path, tmp_path):
    write_sections(tmp_path / "b.rows", {"made of": "numbers"}, dict(reversed(ARRAYS.items())))
    write_sections(tmp_path / "c.rows", {"made of": "numbers"}, ARRAYS)
    assert path.read_bytes() == (tmp_path / "c.rows").read_bytes()
    assert Sections(path).content == Sections(tmp_path / "b.rows").content
    assert sorted(os.listdir(tmp_path)) == ["a.rows", "b.rows", "c.rows"]  # nothing is left beside them


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_damage_is_found_where_it_is_when_it_is_read(path):
    size = path.stat().st_size
    flip(path, size - 200_000)  # inside of the ids, far from their head
    file = Sections(path)
    assert file.read("ids", 0, 100).tolist() == list(range(100))
    with pytest.raises(DataError, match=r"a\.rows, byte (\d+): the checksum of this block \(ids\) differs") as caught:
        file.read("ids")
    block = int(str(caught.value).split("byte ")[1].split(":")[0])
    assert block <= size - 200_000 < block + BLOCK
    with pytest.raises(DataError):
        file.verify()


@pytest.mark.parametrize("at", [0, 9, 13, 17, 40, 100])
def test_a_damaged_head_is_refused(path, at):
    flip(path, at)
    with pytest.raises(DataError, match=r"a\.rows, byte \d+: .*build it again"):
        Sections(path)


def test_every_cut_is_refused(path):
    data = path.read_bytes()
    for size in (0, 5, 31, 32, 100, 300, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="byte"):
            Sections(path)
    path.write_bytes(data + b"x")
    with pytest.raises(DataError, match="bytes where"):
        Sections(path)


def test_the_list_of_checksums_is_checked(path):
    flip(path, path.stat().st_size - 2)
    with pytest.raises(DataError, match="list of checksums"):
        Sections(path)


def test_no_file_and_no_room(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be read"):
        Sections(tmp_path / "none.rows")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"full\.rows: needs \d+ bytes, but only 1000 are free"):
        write_sections(tmp_path / "full.rows", {}, ARRAYS)
    assert os.listdir(tmp_path) == []
