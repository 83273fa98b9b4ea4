"""`/v1/files`: what clients keep here, whose it is, how much room it takes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from herd.errors import ConfigError
from herd.server import filestore
from herd.server.errors import ApiError
from herd.server.filestore import Files, plain_name
from tests.server.batching import uploaded
from tests.server.conftest import faked


def test_files_come_back_as_they_were(keeping_client: openai.OpenAI) -> None:
    data = bytes(range(256)) * 5000
    made = keeping_client.files.create(
        file=("../../etc/pass wd.jsonl", io.BytesIO(data)), purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )  # fmt: skip
    assert made.filename == "pass wd.jsonl"
    assert made.bytes == len(data)
    assert made.expires_at == made.created_at + 3600
    assert keeping_client.files.content(made.id).read() == data
    assert keeping_client.files.retrieve(made.id) == made
    assert [one.id for one in keeping_client.files.list(purpose="batch")] == [made.id]
    assert not list(keeping_client.files.list(purpose="batch_output"))
    assert keeping_client.files.delete(made.id).deleted
    for again in (keeping_client.files.retrieve, keeping_client.files.content, keeping_client.files.delete):
        with pytest.raises(openai.NotFoundError):
            again(made.id)


def test_owners_do_not_see_each_others_files(tmp_path: Path) -> None:
    files = Files(tmp_path, 1000)
    kept = files.add(io.BytesIO(b"secret"), "me", "a.jsonl", "batch")
    assert files.every("you") == []
    with pytest.raises(Exception, match="there is no file"):
        files.find(kept.id, "you")
    with pytest.raises(ConfigError, match="another server uses"):
        Files(tmp_path, 1000)
    files.close()
    (tmp_path / "files" / "file-begun").mkdir()
    again = Files(tmp_path, 1000)
    assert again.every("me") == [kept]
    assert not (tmp_path / "files" / "file-begun").exists()
    again.close()


def test_a_disk_that_takes_no_more_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    files = Files(tmp_path, 1000)
    monkeypatch.setattr("herd.server.filestore.shutil.copyfileobj", full)
    with pytest.raises(ApiError, match="No space left") as refused:
        files.add(io.BytesIO(b"x"), "me", "a", "batch")
    assert refused.value.status == 507
    assert files.every("me") == []
    assert not list((tmp_path / "files").iterdir())
    files.close()


def test_the_room_for_files_is_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path, 1500)
    both = threading.Barrier(2)
    copy = filestore.shutil.copyfileobj

    def slowly(*args: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        copy(*args)

    monkeypatch.setattr("herd.server.filestore.shutil.copyfileobj", slowly)

    def add(name: str) -> int:
        try:
            files.add(io.BytesIO(b"x" * 1000), "me", name, "batch")
        except ApiError as error:
            return error.status
        return 200

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(add, "ab")) == [200, 507]
    assert len(files.every("me")) == 1
    files.close()


def test_uploads_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"x" * 1000

    async def run() -> None:
        async with faked(state_dir=str(tmp_path), max_file=200_000, max_files=250_000) as fake:
            assert (await uploaded(fake, b"x" * 200_000)).status_code == 200
            head = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": "200000"}
            for most, status in ((16, 507), (0, 429)):
                monkeypatch.setattr("herd.server.filestore.MOST_UPLOADS", most)
                answer = await fake.client.post("/v1/files", content=body(), headers=head)
                assert answer.status_code == status, answer.text
            assert not read
            monkeypatch.setattr("herd.server.filestore.MOST_UPLOADS", 1)
            for _ in range(3):  # what is refused gives its room back
                assert (await uploaded(fake, b"x", colour="red")).status_code == 400
            assert (await uploaded(fake, b"x" * 50_000)).status_code == 200

    asyncio.run(run())


def test_names_are_only_names() -> None:
    assert plain_name("../../etc/passwd") == "passwd"
    assert plain_name("C:\\x\\y.jsonl") == "y.jsonl"
    assert plain_name('a"\r\nSet-Cookie: b\x00.txt') == "aSet-Cookie b.txt"
    assert plain_name("..") == plain_name("") == plain_name("///") == "file"
    assert len(plain_name("x" * 999)) == 255
