import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from herd.data import build as building
from herd.data.adapt import records
from herd.data.build import Build, Part, ShardSize
from herd.data.encode import IGNORE, encode
from herd.data.shards import Documents
from herd.data.tokenworker import Encoder, Job, in_order
from herd.errors import DataError
from tests.data.corpus import chat_format, chats, completions, texts, tokenizer, write

SIZE = ShardSize(rows=50, characters=6000, job_rows=7, job_characters=900)


@pytest.fixture(autouse=True)
def _processes_even_for_small_files(monkeypatch):
    monkeypatch.setattr(building, "SMALL", 0)


def encoder() -> Encoder:
    return Encoder(tokenizer(), chat_format())


def build(root: Path, *files: Path, **options) -> list[building.Built]:
    options.setdefault("processes", 1)
    return Build(root, encoder(), size=options.pop("size", SIZE), **options)([(file, None) for file in files])


def written(root: Path) -> dict[str, str]:
    """Every shard and index by name, as SHA-256."""
    found = [
        path
        for path in root.rglob("*")
        if path.is_file() and "locks" not in path.parts and "contents" not in path.parts
    ]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


@pytest.fixture
def sources(tmp_path):
    return [
        write(tmp_path / "in/texts.jsonl", texts(330)),
        write(tmp_path / "in/chats.jsonl", chats(120)),
        write(tmp_path / "in/completions.jsonl", completions(60)),
    ]


def test_shards_hold_what_encode_gives(tmp_path, sources):
    for one, file in zip(build(tmp_path / "out", *sources), sources, strict=True):
        expected = list(records(file))
        documents = Documents(one.open())
        assert len(documents) == one.documents == len(expected)
        assert len(one.shards) > 1
        learned = 0
        for i, record in enumerate(expected):
            example = encode(record, tokenizer(), chat_format())
            shard, inside = documents.find(i)
            ids, mask = shard.read(inside, 0, len(example))
            assert ids.tolist() == list(example.tokens)
            labels = [*ids[1:].tolist(), IGNORE] if mask is None else np.where(mask, [*ids[1:], 0], IGNORE).tolist()
            assert labels == list(example.labels)
            assert documents.where(i) == record.where
            learned += example.learned
        assert one.learned == learned
        assert one.tokens == documents.tokens == int(documents.sizes().sum())
    assert [one.kind for one in build(tmp_path / "out", *sources)] == ["text", "messages", "completion"]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path, sources, processes):
    build(tmp_path / "one", *sources)
    build(tmp_path / "many", *sources, processes=processes)
    assert written(tmp_path / "one") == written(tmp_path / "many")
    assert len(written(tmp_path / "one")) > 10


def test_what_is_unchanged_is_found_again_and_what_is_changed_is_not(tmp_path, sources):
    first = build(tmp_path / "out", *sources)
    assert all(one.made for one in first)
    again = build(tmp_path / "out", *sources)
    assert not any(one.made for one in again)
    assert [one.folder for one in again] == [one.folder for one in first]
    assert [(one.documents, one.tokens, one.learned) for one in again] == [
        (one.documents, one.tokens, one.learned) for one in first
    ]
    # Same content, another name: nothing to do but to name it.
    moved = sources[0].rename(sources[0].with_name("moved.jsonl"))
    assert build(tmp_path / "out", moved)[0].tokens == first[0].tokens
    write(sources[1], chats(121))
    changed = build(tmp_path / "out", sources[1])[0]
    assert changed.made
    assert changed.folder != first[1].folder


def test_a_change_within_the_clocks_step_is_noticed(tmp_path):
    """Same size, same time: the content counts, because a file so young is not taken for what it was."""
    path = write(tmp_path / "a.jsonl", [{"text": "one cat ran home"}])
    first = build(tmp_path / "out", path)[0]
    stat = path.stat()
    write(path, [{"text": "two cat ran home"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert build(tmp_path / "out", path)[0].folder != first.folder


def test_the_content_of_a_file_that_rests_is_remembered(tmp_path, sources):
    told = []
    for file in sources:
        os.utime(file, (1e9, 1e9))
    build(tmp_path / "out", *sources, tick=told.append)
    assert {progress.doing for progress in told} == {"reading", "tokenizing"}
    told.clear()
    assert not any(one.made for one in build(tmp_path / "out", *sources, tick=told.append))
    assert told == []
    write(sources[0], texts(331))
    os.utime(sources[0], (1e9, 1e9))  # another size at the same time is another content
    assert build(tmp_path / "out", sources[0])[0].documents == 331


def test_another_vocabulary_or_format_is_another_folder_but_not_for_text(tmp_path, sources):
    base = build(tmp_path / "out", *sources)
    plain = Build(tmp_path / "out", Encoder(tokenizer(), None), size=SIZE, processes=1)([(sources[0], None)])
    assert plain[0].folder == base[0].folder
    assert not plain[0].made
    from herd.chat.formats import format_named

    other = Encoder(tokenizer(), format_named("llama3.1-hf", tokenizer()))
    hf = Build(tmp_path / "out", other, size=SIZE, processes=1)([(sources[1], None)])
    assert hf[0].folder != base[1].folder
    with pytest.raises(DataError, match=r"chats\.jsonl:1: a conversation needs a prompt format"):
        Build(tmp_path / "out", Encoder(tokenizer(), None), size=SIZE, processes=1, bad="skip")([(sources[1], None)])


def test_a_build_that_was_interrupted_goes_on(tmp_path, sources, monkeypatch):
    build(tmp_path / "whole", *sources)
    count = 0
    true = building.write_shard

    def failing(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        true(*arguments)

    monkeypatch.setattr(building, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", *sources)
    kept = written(tmp_path / "out")
    assert len(kept) == 3
    made = sum(one.made for one in build(tmp_path / "out", *sources))
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert made == len([name for name in written(tmp_path / "out") if name.endswith(".rows")]) - 3


PROGRAM = """
import sys
from pathlib import Path
from herd.data import build as building
from tests.data.test_build import SIZE, encoder
building.SMALL = 0
made = building.Build(Path(sys.argv[1]), encoder(), size=SIZE, processes=2)([(Path(sys.argv[2]), None)])
"""


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def kill_and_go_on(tmp_path: Path, count: int, kills: tuple[int, ...]) -> None:
    """Start a build of `count` rows again and again, killing it when so many shards are there; then finish it."""
    source = write(tmp_path / "texts.jsonl", texts(count, most=200))
    build(tmp_path / "whole", source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    workers: set[int] = set()
    for wanted in kills:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "out"), str(source)], env=environment)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            workers |= set(children(process.pid))
            if len(list((tmp_path / "out").rglob("*.rows"))) >= wanted:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
    end = time.monotonic() + 20
    while any(b"tokenworker" in _command(pid) for pid in workers):
        assert time.monotonic() < end, "workers outlive the program"
        time.sleep(0.05)
    build(tmp_path / "out", source)
    found = {name: hash for name, hash in written(tmp_path / "out").items() if not name.endswith(".part")}
    assert found == written(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_killed_it_goes_on_and_leaves_no_process(tmp_path):
    kill_and_go_on(tmp_path, 700, (3,))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_killed_at_any_moment_it_goes_on(tmp_path):
    kill_and_go_on(tmp_path, 4000, (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 70))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("of", [2, 3, 5])
def test_parts_make_the_same_shards(tmp_path, sources, of):
    build(tmp_path / "whole", *sources)
    for number in range(of, 0, -1):
        built = build(tmp_path / "out", *sources, part=Part(number, of))
        assert any(one.missing for one in built) == (number > 1 and of > len(sources)) or of <= len(sources)
    joined = build(tmp_path / "out", *sources)
    assert not any(one.made for one in joined)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_part_of_whole_files_reads_no_other(tmp_path, sources):
    """Damage in another part's file is that part's to find: here it is not even opened."""
    sources[1].write_bytes(b"\xff not rows")
    told = []
    (one, other) = build(tmp_path / "out", *sources, part=Part(1, 2), tick=told.append)
    assert [one.file, other.file] == [sources[0], sources[2]]
    assert max(progress.total for progress in told) == sources[0].stat().st_size + sources[2].stat().st_size
    assert not one.missing
    assert one.documents == 330
    with pytest.raises(DataError, match=r"chats\.jsonl"):
        build(tmp_path / "out", *sources, part=Part(2, 2))


def test_parts_share_the_work(tmp_path, sources):
    counts = [sum(one.made for one in build(tmp_path / f"{n}", *sources, part=Part(n, 4))) for n in range(1, 5)]
    assert sum(counts) == len([name for name in _whole(tmp_path, sources) if name.endswith(".rows")])
    assert min(counts) > 0
    with pytest.raises(DataError, match="part 3/2"):
        Part(3, 2)


def _whole(tmp_path, sources):
    build(tmp_path / "whole", *sources)
    return written(tmp_path / "whole")


BAD = {17: "not json", 30: '{"text": ""}', 41: '{"text": 5}', 300: "[1]"}


@pytest.fixture
def bad_source(tmp_path):
    path = write(tmp_path / "bad.jsonl", texts(330))
    lines = path.read_text().splitlines()
    for number, line in BAD.items():
        lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("processes", [1, 3])
def test_bad_rows_stop_or_are_named(tmp_path, bad_source, processes):
    with pytest.raises(DataError, match=r"bad\.jsonl:17: not JSON"):
        build(tmp_path / "out", bad_source, processes=processes)
    built = build(tmp_path / "out", bad_source, processes=processes, bad="skip")[0]
    assert [row.line for row in built.report.bad] == list(BAD)
    assert built.report.bad_count == len(BAD)
    assert built.documents == 330 - len(BAD)
    again = build(tmp_path / "out", bad_source, bad="skip")[0]
    assert again.report == built.report
    # Strict again: shards that are there do not hide them.
    with pytest.raises(DataError, match=r"bad\.jsonl:17: .*\(4 such rows"):
        build(tmp_path / "out", bad_source)


def test_rows_with_nothing_to_learn_are_named(tmp_path):
    rows = chats(5)
    rows[2]["messages"] = rows[2]["messages"][:1]
    path = write(tmp_path / "c.jsonl", rows)
    with pytest.raises(DataError, match=r"c\.jsonl:3: "):
        build(tmp_path / "out", path)
    assert build(tmp_path / "out", path, bad="skip")[0].documents == 4
    nothing = write(tmp_path / "n.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 3)
    with pytest.raises(DataError, match=r"none of the rows can be used"):
        build(tmp_path / "out", nothing, bad="skip")


def test_a_damaged_shard_is_built_again_and_a_hidden_damage_is_found_on_request(tmp_path, sources):
    whole = _whole(tmp_path, sources)
    built = build(tmp_path / "out", *sources)
    victim, other = built[0].shards[1], built[1].shards[0]
    victim.write_bytes(victim.read_bytes()[:-5])
    told: list[str] = []
    again = build(tmp_path / "out", *sources, tell=told.append)
    assert [one.made for one in again] == [1, 0, 0]
    assert len(told) == 1
    assert f"{victim}, byte" in told[0]
    data = bytearray(other.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    assert not any(one.made for one in build(tmp_path / "out", *sources))  # its head is fine
    with pytest.raises(DataError, match=r"00000\.rows, byte \d+: the checksum"):
        shard = Documents(build(tmp_path / "out", sources[1])[0].open()).shards[0]
        shard.read(0, 0, int(shard.ends[1]))
        for document in range(shard.documents):
            shard.read(document, 0, int(np.diff(shard.ends)[document]))
    assert [one.made for one in build(tmp_path / "out", *sources, check=True)] == [0, 1, 0]
    assert written(tmp_path / "out") == whole


def test_a_process_that_dies_is_an_error_and_not_a_wait(tmp_path, sources, monkeypatch):
    import herd.data.tokenworker as worker

    true = worker._send

    def deadly(file, value):
        if isinstance(value, Job) and value.tag[1] >= 1:
            file.close()
            raise BrokenPipeError
        true(file, value)

    monkeypatch.setattr(worker, "_send", deadly)
    with pytest.raises(DataError, match="a process that tokenizes has ended by itself"):
        build(tmp_path / "out", *sources, processes=2)
    monkeypatch.setattr(worker, "_send", true)
    build(tmp_path / "out", *sources, processes=2)
    assert written(tmp_path / "out") == _whole(tmp_path, sources)


def test_outcomes_come_in_the_order_of_jobs_and_errors_in_their_place(tmp_path):
    from herd.data.read import RowReport, read_file

    rows = list(read_file(write(tmp_path / "t.jsonl", texts(40, most=300)), RowReport()))

    def jobs():
        for i, row in enumerate(rows):
            yield Job(i, "text", [row])
        raise DataError("t.jsonl:41: the end of the world")

    seen = []
    with pytest.raises(DataError, match="the end of the world"):
        for outcome in in_order(encoder(), jobs(), 3):
            seen.append(outcome.tag)
    assert seen == list(range(40))


def test_progress_ends_at_all_of_it(tmp_path, sources):
    told = []
    build(tmp_path / "out", *sources, tick=told.append)
    assert {progress.doing for progress in told} == {"reading", "tokenizing"}
    assert told[-1].done == told[-1].total
    last = told[-1]
    assert last.done == last.total == sum(file.stat().st_size for file in sources)
    assert last.documents == 510
    assert [p.done for p in told if p.doing == "tokenizing"] == sorted(p.done for p in told if p.doing == "tokenizing")


def test_what_killed_runs_left_is_cleared_away(tmp_path, sources):
    folder = build(tmp_path / "out", sources[0])[0].folder
    (folder / "index.json").unlink()
    old, young = folder / ".00000.rows.x.part", folder / ".00000.rows.y.part"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    build(tmp_path / "out", sources[0])
    assert not old.exists()
    assert young.exists()  # may be another process's


def test_two_at_once_build_once(tmp_path):
    """As the ranks of a run on one machine do."""
    source = write(tmp_path / "texts.jsonl", texts(1500, most=200))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [
        sys.executable,
        "-c",
        PROGRAM + "print(sum(one.made for one in made))",
        str(tmp_path / "out"),
        str(source),
    ]
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    made = sorted(int(rank.communicate()[0]) for rank in ranks)
    assert made[0] == 0
    assert made[1] == len(list((tmp_path / "out").rglob("*.rows")))


def test_a_file_that_is_not_there_and_a_full_disk(tmp_path, sources, monkeypatch):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        build(tmp_path / "out", tmp_path / "none.jsonl")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match="only 10 are free"):
        build(tmp_path / "full", *sources)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: shards cannot be written here"):
        build(tmp_path / "file", *sources)
