import json

import pytest
from click.testing import CliRunner

from herd.cli.data_build import command
from herd.errors import DataError
from tests.data.corpus import chats, texts, write


def run(*arguments, code=0):
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "in/texts.jsonl", texts(50)), write(tmp_path / "in/chats.jsonl", chats(20))


def test_files_become_shards_once(files, tmp_path):
    out = tmp_path / "out"
    first = run(tmp_path / "in", "--model", "nano", "--out", out).stdout
    assert "texts.jsonl: text, 50 documents, " in first
    assert "chats.jsonl: messages, 20 documents, " in first
    assert "1 of 1 new" in first
    assert "nothing new" in run(*files, "--model", "nano", "--out", out).stdout
    told = json.loads(run(files[0], "--model", "nano", "--out", out, "--json").stdout)["files"][0]
    assert (told["documents"], told["kind"], told["shards"], told["made"], told["bad"]) == (50, "text", 1, 0, 0)


def test_parts_are_joined(files, tmp_path):
    out = tmp_path / "out"
    options = ("--model", "nano", "--out", out)
    said = run(files[0], *options, "--part", "1/2")
    with_shard = "1 shards made" in said.stderr or "new" in said.stdout
    assert with_shard
    run(files[0], *options, "--part", "2/2")
    assert "50 documents" in run(files[0], *options, "--join").stdout
    with pytest.raises(DataError, match="1 of 1 shards are missing"):
        run(files[1], *options, "--join")


def test_what_cannot_be_meant_is_refused(files, tmp_path):
    assert "as in 3/16" in run(files[0], "--model", "nano", "--part", "3of4", code=2).output
    assert "as in 3/16" in run(files[0], "--model", "nano", "--part", "5/4", code=2).output
    assert "leave out --part" in run(files[0], "--model", "nano", "--part", "1/4", "--join", code=2).output
    assert "leave out --part" in run(files[0], "--model", "nano", "--ray", "--part", "1/4", code=2).output
    assert "put paths before --ray" in run(files[0], "--model", "nano", "--ray", files[1], code=2).output
    with pytest.raises(DataError, match="no such data file"):
        run(tmp_path / "none.jsonl", "--model", "nano")


def test_ray_is_asked_for_with_or_without_an_address(files, tmp_path, monkeypatch):
    asked = []

    def build(root, encoder, files, *, address, **given):
        asked.append((root, address, [file.name for file, _ in files], given["bad"], given["processes"]))
        return []

    monkeypatch.setattr("herd.data.cluster.build_on_ray", build)
    run(files[0], "--model", "nano", "--out", tmp_path / "o", "--ray")
    for address in ("auto", "local", "10.0.0.1:6379", "ray://head:10001"):
        run(files[0], "--ray", address, "--model", "nano", "--out", tmp_path / "o", "--bad", "skip", "--processes", "4")
    assert asked[0] == (tmp_path / "o", None, ["texts.jsonl"], "stop", None)
    assert [one[1] for one in asked[1:]] == ["auto", "local", "10.0.0.1:6379", "ray://head:10001"]
    assert asked[1][3:] == ("skip", 4)


def test_parts_of_whole_files_say_how_many_are_for_others(files, tmp_path):
    said = run(*files, "--model", "nano", "--out", tmp_path / "o", "--part", "1/2")
    assert "50 documents" in said.stdout
    assert "1 of 2 files are for other parts; --join in the end" in said.stderr
    run(*files, "--model", "nano", "--out", tmp_path / "o", "--part", "2/2")
    joined = run(*files, "--model", "nano", "--out", tmp_path / "o", "--join").stdout
    assert "chats.jsonl: messages, 20 documents" in joined


def test_bad_rows_are_named(files, tmp_path):
    files[0].write_text(files[0].read_text() + "[]\n")
    with pytest.raises(DataError, match=r"texts\.jsonl:51: "):
        run(files[0], "--model", "nano", "--out", tmp_path / "out")
    said = run(files[0], "--model", "nano", "--out", tmp_path / "out", "--bad", "skip")
    assert "texts.jsonl:51: " in said.stderr


def test_many_files_are_summed_up(tmp_path):
    for i in range(20):
        write(tmp_path / f"in/{i:02d}.jsonl", texts(3, seed=i))
    said = run(tmp_path / "in", "--model", "nano", "--out", tmp_path / "out").stdout
    assert len(said.splitlines()) < 20
    assert "20 files in all: 60 documents, " in said
    assert "20 shards new, 0 bad rows" in said
