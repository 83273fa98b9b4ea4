"""Shards by many machines: the bytes of one, parts that fail tried again and named, and a real Ray where there is one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from herd.data import build as building
from herd.data import cluster
from herd.data.build import Build, Built
from herd.data.cluster import ATTEMPTS, build_on_ray
from herd.errors import ConfigError, DataError
from tests.data.corpus import chats, completions, texts, write
from tests.data.test_build import SIZE, encoder, written


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "in/texts.jsonl", texts(330)),
        write(tmp_path / "in/chats.jsonl", chats(120)),
        write(tmp_path / "in/completions.jsonl", completions(60)),
    ]


class RayError(Exception):
    """What Ray raises for a task whose process or machine is gone."""


class Reference:
    """What Ray gives for a task: known by itself, not by what it stands for."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Ray:
    """Ray's words, by one process: a task runs when it is asked for, and `doom` may end it first."""

    def __init__(self, *cores: int) -> None:
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.cores, self.doom = cores, list[Callable[[int], None]]()
        self.begun: list[int] = []
        self.given: dict[str, Any] = {}
        self.open = False

    def is_initialized(self) -> bool:
        return self.open

    def init(self, **given: Any) -> None:
        self.given, self.open = given, True
        if given["address"] == "10.0.0.9:6379":
            raise ConnectionError("Failed to connect")

    def shutdown(self) -> None:
        self.open = False

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 64.0}}
        return [gone, *({"Alive": True, "Resources": {"CPU": float(n)} if n else {}} for n in self.cores)]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, made: Any) -> Any:
        def actor() -> Any:
            own = made()
            names = [name for name in vars(made) if callable(getattr(made, name)) and not name.startswith("_")]
            return SimpleNamespace(**{name: SimpleNamespace(remote=self._task(getattr(own, name))) for name in names})

        def task(asked: Any, number: int, of: int, board: Any) -> Any:
            self.begun.append(number)
            for doom in self.doom:
                try:
                    doom(number)
                except RayError as error:
                    return Reference(error)
            return self._task(made)(asked, number, of, board)

        call = actor if isinstance(made, type) else task
        return SimpleNamespace(options=lambda **given: SimpleNamespace(remote=call))

    @staticmethod
    def _task(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: Reference(call(*args))

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        if isinstance(reference.value, RayError):
            raise reference.value
        return reference.value

    def cancel(self, reference: Any, force: bool) -> None: ...
    def kill(self, actor: Any) -> None: ...


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    """A cluster of machines with 3, 1 and no cores, and one that is gone."""
    made = Ray(3, 0, 1)
    monkeypatch.setitem(sys.modules, "ray", made)  # type: ignore[arg-type]
    monkeypatch.setattr(cluster.util, "find_spec", lambda name: object())
    return made


def build(root: Path, files: list[Path], **given: Any) -> list[Built]:
    return build_on_ray(root, encoder(), [(file, None) for file in files], size=SIZE, **given)


@pytest.mark.parametrize(("processes", "parts"), [(1, 4), (2, 1), (None, 4), (16, 1)])
def test_machines_make_the_bytes_of_one(
    processes: int | None, parts: int, ray: Ray, tmp_path: Path, sources: list[Path]
) -> None:
    Build(tmp_path / "one", encoder(), size=SIZE, processes=1)([(file, None) for file in sources])
    told: list[Any] = []
    built = build(tmp_path / "many", sources, processes=processes, tick=told.append)
    assert sorted(ray.begun) == list(range(1, parts + 1))
    assert written(tmp_path / "many") == written(tmp_path / "one")
    assert not list((tmp_path / "many").glob(".ray*"))
    assert [(one.file, one.documents) for one in built] == list(zip(sources, (330, 120, 60), strict=True))
    assert sum(one.made for one in built) == sum(len(one.shards) for one in built)
    last = [progress for progress in told if progress.doing == "tokenizing"][-1]
    assert last.done == last.total
    assert (last.documents, last.tokens) == (510, sum(one.tokens for one in built))
    assert not ray.open
    ray.begun.clear()
    again = build(tmp_path / "many", sources, processes=processes)
    assert [one.made for one in again] == [0, 0, 0]


def test_files_are_shared_out_whole_where_there_are_enough(ray: Ray, tmp_path: Path) -> None:
    files = [write(tmp_path / f"in/{i}.jsonl", texts(20, seed=i)) for i in range(9)]
    Build(tmp_path / "one", encoder(), size=SIZE, processes=1)([(file, None) for file in files])
    assert [one.made > 0 for one in build(tmp_path / "many", files, processes=1)] == [True] * 9
    assert written(tmp_path / "many") == written(tmp_path / "one")


def test_a_lost_part_is_begun_again_and_at_last_named(ray: Ray, tmp_path: Path, sources: list[Path]) -> None:
    def lost(number: int) -> None:
        if number == 2 and ray.begun.count(2) < 3:
            raise RayError("the worker died:\n out of memory")

    ray.doom = [lost]
    told: list[str] = []
    built = build(tmp_path / "out", sources, processes=1, tell=told.append)
    assert ray.begun.count(2) == 3
    assert [line for line in told if "begun again" in line] == [
        f"part 2 of 4 failed (the worker died: out of memory), {n} of {ATTEMPTS} times: it is begun again"
        for n in (1, 2)
    ]
    assert [one.documents for one in built] == [330, 120, 60]

    def always(number: int) -> None:
        if number == 3:
            error = RayError("ray::_part() a traceback of many lines")
            error.cause = MemoryError("no\n room")  # type: ignore[attr-defined]
            raise error

    ray.doom = [always]
    with pytest.raises(
        DataError, match=r"part 3 of 4 failed 3 of 3 times: MemoryError: no room. .*the same command goes on"
    ):
        build(tmp_path / "other", sources, processes=1)
    assert not ray.open
    ray.doom = []
    assert build(tmp_path / "other", sources, processes=1)[0].documents == 330


def test_a_disk_is_asked_again_and_a_row_is_not(
    ray: Ray, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, failures = building.write_shard, [OSError(5, "I/O error")]

    def failing(*args: Any) -> None:
        if failures:
            raise DataError("00000.rows: I/O error") from failures.pop()
        honest(*args)

    monkeypatch.setattr(building, "write_shard", failing)
    assert build(tmp_path / "out", sources, processes=1)[0].documents == 330
    assert len(ray.begun) == 5
    ray.begun.clear()
    sources[0].write_text(sources[0].read_text() + "{\n")
    with pytest.raises(DataError, match=r"texts\.jsonl:331: not JSON"):
        build(tmp_path / "out", sources, processes=1)
    assert len(set(ray.begun)) == len(ray.begun)
    built = build(tmp_path / "out", sources, processes=1, bad="skip")
    assert [(row.line, one.documents) for one in built for row in one.report.bad] == [(331, 330)]


def test_a_folder_that_is_not_shared_is_told(
    ray: Ray, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.doom = [lambda number: [mark.unlink() for mark in (tmp_path / "out").glob(".ray-*")]]  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"out is another folder there: shards go into one that all machines share"):
        build(tmp_path / "out", sources)


def test_what_is_missing_is_named(
    ray: Ray, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--ray 10\.0\.0\.9:6379: no Ray cluster answers \(Failed to connect\)"):
        build(tmp_path / "out", sources, address="10.0.0.9:6379")
    ray.open, ray.cores = False, (0,)
    with pytest.raises(ConfigError, match="no machine of the cluster has a processor"):
        build(tmp_path / "out", sources)
    monkeypatch.setattr(cluster.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray: pip install 'herd\[ray\]'"):
        build(tmp_path / "out", sources)


@pytest.mark.slow
def test_a_real_cluster(tmp_path: Path, sources: list[Path]) -> None:
    """Two parts in processes of Ray's own."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'herd[ray]'")
    Build(tmp_path / "one", encoder(), size=SIZE, processes=1)([(file, None) for file in sources])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        told: list[str] = []
        built = build(tmp_path / "many", sources, processes=1, tell=told.append)
        assert told[0] == "2 parts on 1 machines, 1 processes each"
        assert written(tmp_path / "many") == written(tmp_path / "one")
        assert [one.documents for one in built] == [330, 120, 60]
        sources[0].write_text(sources[0].read_text() + "{\n")
        with pytest.raises(DataError, match=r"texts\.jsonl:331: not JSON"):
            build(tmp_path / "many", sources, processes=1)
    finally:
        ray.shutdown()
