"""`/v1/files` and `/v1/batches` with the real client on a live server, and what becomes of them when it ends in between."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from herd.errors import ConfigError
from herd.server import batches, filestore
from herd.server.errors import ApiError
from herd.server.filestore import Files, plain_name
from herd.server.process import WorkerError
from herd.server.settings import EngineOptions, ModelSpec, ServerSettings
from tests.server.conftest import Fake, Live, faked, serving
from tests.server.fakes import saying

SECONDS = 60.0
"""A worker has to start; a busy machine takes a while."""
CHAT = "/v1/chat/completions"


def line(id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"model": "fake", "messages": [{"role": "user", "content": id}]} | body
    return {"custom_id": id, "method": "POST", "url": url, "body": asked}


def jsonl(*lines: Any) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    models = (ModelSpec(source="nano", name="nano", options=EngineOptions(max_seqs=4, seed=0)),)
    folder = str(tmp_path_factory.mktemp("state"))
    yield from serving(ServerSettings(models=models, port=0, lazy=True, drain_seconds=1, state_dir=folder))


@pytest.fixture
def client(keeping: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{keeping.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_files_come_back_as_they_were(client: openai.OpenAI) -> None:
    data = bytes(range(256)) * 5000
    made = client.files.create(
        file=("../../etc/pass wd.jsonl", io.BytesIO(data)), purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )  # fmt: skip
    assert made.filename == "pass wd.jsonl"
    assert made.bytes == len(data)
    assert made.expires_at == made.created_at + 3600
    assert client.files.content(made.id).read() == data
    assert client.files.retrieve(made.id) == made
    assert [one.id for one in client.files.list(purpose="batch")] == [made.id]
    assert not list(client.files.list(purpose="batch_output"))
    assert client.files.delete(made.id).deleted
    for again in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            again(made.id)


def test_a_batch_of_several_endpoints(client: openai.OpenAI) -> None:
    """Chats that are right and wrong; the answers are those that a client gets."""
    asked = {"model": "nano", "max_tokens": 6, "temperature": 0}
    good = [line(f"good-{i}", **asked) for i in range(12)]
    source = client.files.create(
        file=("in.jsonl", jsonl(*good, line("bad", **asked, n=0), line("streamed", **asked, stream=True), b"")),
        purpose="batch",
    )
    batch = client.batches.create(
        input_file_id=source.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"},
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )  # fmt: skip
    assert batch.status in ("validating", "in_progress")
    batch = ended(client, batch.id)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (14, 12, 2)
    assert batch.usage is not None
    assert batch.usage.output_tokens == 12 * 6
    assert (batch.model, batch.metadata) == ("nano", {"a": "b"})
    assert batch.output_file_id
    assert batch.error_file_id
    out = {one["custom_id"]: one for one in map(json.loads, client.files.content(batch.output_file_id).iter_lines())}
    assert set(out) == {f"good-{i}" for i in range(12)}
    response = out["good-3"]["response"]
    assert response["status_code"] == 200
    direct = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "good-3"}], max_tokens=6, temperature=0
    )
    assert response["body"]["choices"][0]["message"]["content"] == direct.choices[0].message.content
    wrong = {one["custom_id"]: one for one in map(json.loads, client.files.content(batch.error_file_id).iter_lines())}
    assert wrong["bad"]["response"]["body"]["error"]["param"] == "n"
    assert wrong["streamed"]["response"]["status_code"] == 400
    kept = client.files.retrieve(batch.output_file_id)
    assert kept.expires_at == kept.created_at + 7200
    assert kept.purpose == "batch_output"
    assert batch.id in [one.id for one in client.batches.list(limit=1)]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)

    one = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": "nano", "input": "A dog."}}
    source = client.files.create(file=("in.jsonl", jsonl(one)), purpose="batch")
    made = client.batches.create(input_file_id=source.id, endpoint="/v1/embeddings", completion_window="24h")
    made = ended(client, made.id)
    assert made.output_file_id
    vector = json.loads(client.files.content(made.output_file_id).read())["response"]["body"]["data"][0]["embedding"]
    expected = client.embeddings.create(model="nano", input="A dog.").data[0].embedding
    assert vector == pytest.approx(expected, abs=1e-5)


def ended(client: openai.OpenAI, id: str) -> Any:
    until = time.monotonic() + SECONDS
    while (batch := client.batches.retrieve(id)).status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < until, batch
        time.sleep(0.05)
    return batch


async def uploaded(fake: Fake, data: bytes, **fields: str) -> httpx.Response:
    fields = {"purpose": "batch"} | fields
    return await fake.client.post("/v1/files", files={"file": ("in.jsonl", data)}, data=fields)


async def begun(fake: Fake, *lines: Any, endpoint: str = CHAT) -> str:
    file = (await uploaded(fake, jsonl(*lines))).json()["id"]
    asked = {"input_file_id": file, "endpoint": endpoint, "completion_window": "24h"}
    answer = await fake.client.post("/v1/batches", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def over(fake: Fake, id: str) -> dict[str, Any]:
    for _ in range(1000):
        batch = (await fake.client.get(f"/v1/batches/{id}")).json()
        if batch["status"] in ("completed", "failed", "cancelled", "expired"):
            return batch
        await asyncio.sleep(0.01)
    raise AssertionError(batch)


async def lines_of(fake: Fake, file: str) -> list[dict[str, Any]]:
    return [json.loads(one) for one in (await fake.client.get(f"/v1/files/{file}/content")).text.splitlines()]


def test_a_server_that_is_started_again_goes_on(tmp_path: Path) -> None:
    """Nothing is run twice that has an answer, nothing is lost, and a line that was cut off is run again."""

    async def run() -> None:
        stuck = [30.0]

        def script(call: Any) -> Any:
            text = call.prompt.messages[0]["content"]
            return [*saying(text)[:1], *(stuck if int(text) >= 5 else []), *saying(text)[1:]]

        async with faked(script, state_dir=str(tmp_path)) as fake:
            id = await begun(fake, *(line(str(i)) for i in range(20)))
            while (await fake.client.get(f"/v1/batches/{id}")).json()["request_counts"]["completed"] < 5:
                await asyncio.sleep(0.01)
        output = tmp_path / "batches" / f"{id}.output.jsonl"
        whole = output.read_bytes().splitlines(keepends=True)
        assert len(whole) == 5
        output.write_bytes(b"".join(whole[:4]) + whole[4][:30])
        stuck.clear()
        async with faked(script, state_dir=str(tmp_path)) as fake:
            batch = await over(fake, id)
            assert batch["status"] == "completed"
            assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
            told = await lines_of(fake, batch["output_file_id"])
            assert sorted(int(one["custom_id"]) for one in told) == list(range(20))
            assert [json.dumps(one) for one in told[:4]] == [json.dumps(json.loads(one)) for one in whole[:4]]
            assert len(fake.model.seen) == 16
            assert not list((tmp_path / "batches").glob("*.jsonl"))
        async with faked(script, state_dir=str(tmp_path)) as fake:
            assert (await fake.client.get(f"/v1/batches/{id}")).json() == batch
            assert not fake.made

    asyncio.run(run())


def test_cancelled_batches_keep_what_there_is(tmp_path: Path) -> None:
    async def run() -> None:
        def script(call: Any) -> Any:
            text = call.prompt.messages[0]["content"]
            return [*saying(text)[:1], *([30.0] if text != "0" else []), *saying(text)[1:]]

        async with faked(script, state_dir=str(tmp_path)) as fake:
            id = await begun(fake, *(line(str(i)) for i in range(20)))
            while (await fake.client.get(f"/v1/batches/{id}")).json()["request_counts"]["completed"] < 1:
                await asyncio.sleep(0.01)
            file = (await fake.client.get(f"/v1/batches/{id}")).json()["input_file_id"]
            assert (await fake.client.delete(f"/v1/files/{file}")).status_code == 409
            assert (await fake.client.post(f"/v1/batches/{id}/cancel")).json()["status"] == "cancelling"
            batch = await over(fake, id)
            assert batch["status"] == "cancelled"
            assert batch["cancelled_at"] >= batch["cancelling_at"]
            assert [one["custom_id"] for one in await lines_of(fake, batch["output_file_id"])] == ["0"]
            assert batch["error_file_id"] is None
            assert fake.model.running == 0, "the engine was told"
            assert (await fake.client.delete(f"/v1/files/{file}")).status_code == 200

    asyncio.run(run())


def test_what_takes_longer_than_a_day_expires(tmp_path: Path) -> None:
    async def run() -> None:
        async with faked(lambda call: [30.0], state_dir=str(tmp_path)) as fake:
            id = await begun(fake, line("0"), line("1"))
        path = tmp_path / "batches" / f"{id}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"expires_at": int(time.time())}))
        async with faked(lambda call: [30.0], state_dir=str(tmp_path)) as fake:
            batch = await over(fake, id)
            assert batch["status"] == "expired"
            assert batch["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
            told = await lines_of(fake, batch["error_file_id"])
            assert {one["error"]["code"] for one in told} == {"batch_expired"}

    asyncio.run(run())


def test_a_full_queue_is_waited_for_and_faults_are_told(tmp_path: Path) -> None:
    async def run() -> None:
        failing = {"broken": WorkerError("the engine broke", kind="Bug")}

        def script(call: Any) -> Any:
            text = call.prompt.messages[0]["content"]
            return [failing[text]] if text in failing else [saying("x")[0], 0.05, *saying("x")[1:]]

        async with faked(script, state_dir=str(tmp_path), max_queue=1) as fake:
            id = await begun(fake, *(line(str(i)) for i in range(10)), line("broken"), line("other", model="nothing"))
            batch = await over(fake, id)
            assert batch["request_counts"] == {"total": 12, "completed": 10, "failed": 2}
            told = {one["custom_id"]: one["response"] for one in await lines_of(fake, batch["error_file_id"])}
            assert told["broken"]["status_code"] == 500
            assert told["other"]["status_code"] == 404
            assert batch["model"] is None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([b"{not json"], "invalid_json_line"),
        ([b"[1]"], "invalid_json_line"),
        ([b'{"custom_id": NaN}'], "invalid_json_line"),
        ([b"\xff\xfe"], "invalid_json_line"),
        ([], "empty_file"),
        ([line("a"), line("a")], "duplicate_custom_id"),
        ([line("a") | {"custom_id": 3}], "invalid_custom_id"),
        ([line("a") | {"method": "GET"}], "invalid_method"),
        ([line("a", "/v1/completions")], "mismatched_url"),
        ([line("a") | {"body": []}], "invalid_body"),
        ([line("a") | {"priority": 1}], "unknown_parameter"),
    ],
)
def test_files_that_are_no_batches_fail_with_the_line(tmp_path: Path, lines: list[Any], code: str) -> None:
    async def run() -> None:
        async with faked(state_dir=str(tmp_path)) as fake:
            batch = await over(fake, await begun(fake, line("first"), *lines) if lines else await begun(fake))
            assert batch["status"] == "failed"
            assert batch["errors"]["data"][0]["code"] == code
            assert batch["errors"]["data"][0]["line"] == (len(lines) + 1 if lines else None)
            assert not fake.made

    asyncio.run(run())


def test_what_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with faked(state_dir=str(tmp_path), max_file=1000, max_files=1500) as fake:
            for fields, param in (
                ({"purpose": "fine-tune"}, "purpose"),
                ({"colour": "red"}, "colour"),
                ({"expires_after[anchor]": "created_at"}, "expires_after"),
                ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "9" * 9}, "expires_after"),
                ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after"),
            ):
                answer = await uploaded(fake, b"x", **fields)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert (await fake.client.post("/v1/files", data={"purpose": "batch"})).status_code == 415
            form = {"Content-Type": "multipart/form-data; boundary=x"}
            for body in (b"", b"nonsense", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"):
                assert (await fake.client.post("/v1/files", content=body, headers=form)).status_code == 400
            no_boundary = {"Content-Type": "multipart/form-data"}
            assert (await fake.client.post("/v1/files", content=b"x", headers=no_boundary)).status_code == 400
            assert (await uploaded(fake, b"x" * 80_000)).status_code == 413
            assert (await uploaded(fake, b"x" * 1000)).status_code == 200
            assert (await uploaded(fake, b"x" * 1000)).status_code == 507
            for asked, param in (
                ({"endpoint": "/v1/files"}, "endpoint"),
                ({"completion_window": "1h"}, "completion_window"),
                ({"input_file_id": "../../etc/passwd"}, "input_file_id"),
                ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
            ):
                files = (await fake.client.get("/v1/files")).json()["data"]
                right = {"input_file_id": files[0]["id"], "endpoint": CHAT, "completion_window": "24h"}
                answer = await fake.client.post("/v1/batches", json=right | asked)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
            for path in ("/v1/batches/batch_x", "/v1/files/..%2f..%2fherd.lock", "/v1/files/file-x/content"):
                assert (await fake.client.get(path)).status_code == 404
            for query in ("limit=0", "limit=x", "order=asc"):
                answer = await fake.client.get(f"/v1/batches?{query}")
                assert answer.json()["error"]["param"] == query.partition("=")[0]
            assert (await fake.client.get("/v1/files?after=x")).json()["error"]["param"] == "after"
        async with faked() as fake:
            for path in ("/v1/files", "/v1/batches"):
                answer = await fake.client.get(path)
                assert answer.status_code == 501
                assert "--state-dir" in answer.json()["error"]["message"]

    asyncio.run(run())


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


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def until(fake: Fake, id: str, key: str, value: Any) -> None:
    for _ in range(1000):
        if (await fake.client.get(f"/v1/batches/{id}")).json()[key] == value:
            return
        await asyncio.sleep(0.01)
    raise AssertionError((await fake.client.get(f"/v1/batches/{id}")).json())


@pytest.mark.parametrize("restarted", [False, True])
def test_answers_survive_a_disk_that_is_full_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    monkeypatch.setattr("herd.server.batches.DISK_SECONDS", 30.0 if restarted else 0.05)
    write = filestore.write_json

    async def run() -> None:
        with monkeypatch.context() as disk:
            disk.setattr(
                "herd.server.filestore.write_json",
                lambda path, what: (
                    full() if "file-" in str(path) and what["purpose"] == "batch_output" else write(path, what)
                ),
            )
            async with faked(state_dir=str(tmp_path)) as fake:
                id = await begun(fake, *(line(str(i)) for i in range(4)))
                await until(fake, id, "status", "finalizing")
                await asyncio.sleep(0.15)
                batch = (await fake.client.get(f"/v1/batches/{id}")).json()
                assert (batch["status"], batch["output_file_id"]) == ("finalizing", None)
                assert (tmp_path / "batches" / f"{id}.output.jsonl").stat().st_size
                if not restarted:
                    disk.undo()
                    await all_four(fake, await over(fake, id))
        if restarted:
            async with faked(state_dir=str(tmp_path)) as fake:
                await all_four(fake, await over(fake, id))
                assert not fake.made, "nothing was run again"
        assert not list((tmp_path / "batches").glob("*.jsonl"))

    async def all_four(fake: Fake, batch: dict[str, Any]) -> None:
        assert batch["status"] == "completed"
        told = await lines_of(fake, batch["output_file_id"])
        assert sorted(one["custom_id"] for one in told) == list("0123")

    asyncio.run(run())


def test_a_disk_that_is_full_in_between_fails_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.server.batches.DISK_SECONDS", 0.02)
    append, times = batches._append, [0]

    def sometimes(file: Any, told: Any) -> None:
        times[0] += 1
        if times[0] in (3, 9):
            file.write(b'{"custom_id": "7", "cut')
            file.flush()
            full()
        append(file, told)

    monkeypatch.setattr("herd.server.batches._append", sometimes)

    async def run() -> None:
        async with faked(state_dir=str(tmp_path)) as fake:
            batch = await over(fake, await begun(fake, *(line(str(i)) for i in range(20))))
            assert batch["status"] == "completed", batch
            assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
            told = await lines_of(fake, batch["output_file_id"])
            assert sorted(int(one["custom_id"]) for one in told) == list(range(20))
            monkeypatch.setattr("herd.server.batches.write_json", full)
            source = (await fake.client.get("/v1/files?purpose=batch")).json()["data"][0]["id"]
            asked = {"input_file_id": source, "endpoint": CHAT, "completion_window": "24h"}
            assert (await fake.client.post("/v1/batches", json=asked)).status_code == 507
            assert len((await fake.client.get("/v1/batches")).json()["data"]) == 1

    asyncio.run(run())


def test_a_server_ends_although_its_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        with monkeypatch.context() as disk:
            disk.setattr("herd.server.batches._append", full)
            async with faked(state_dir=str(tmp_path)) as fake:
                id = await begun(fake, line("0"))
                await until(fake, id, "status", "in_progress")
                await asyncio.sleep(0.1)
        async with faked(state_dir=str(tmp_path)) as fake:
            assert (await over(fake, id))["request_counts"]["completed"] == 1

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("gone", [False, True])
def test_what_a_batch_reads_does_not_expire(tmp_path: Path, gone: bool) -> None:
    """And where it is lost in another way, the answers that there are become a file."""
    stuck = [30.0]

    def script(call: Any) -> Any:
        text = call.prompt.messages[0]["content"]
        return [*saying(text)[:1], *(stuck if int(text) >= 3 else []), *saying(text)[1:]]

    async def run() -> None:
        async with faked(script, state_dir=str(tmp_path)) as fake:
            id = await begun(fake, *(line(str(i)) for i in range(6)))
            await until(fake, id, "request_counts", {"total": 6, "completed": 3, "failed": 0})
            file = (await fake.client.get(f"/v1/batches/{id}")).json()["input_file_id"]
        meta = tmp_path / "files" / file / "meta.json"
        if gone:
            meta.unlink()
        else:
            meta.write_text(json.dumps(json.loads(meta.read_text()) | {"expires_at": int(time.time()) - 5}))
            stuck.clear()
        async with faked(script, state_dir=str(tmp_path)) as fake:
            await fake.client.get("/v1/files")
            batch = await over(fake, id)
            assert batch["status"] == ("failed" if gone else "completed")
            told = await lines_of(fake, batch["output_file_id"])
            assert sorted(int(one["custom_id"]) for one in told) == list(range(3 if gone else 6))
            assert (await fake.client.get(f"/v1/files/{file}")).status_code == 404

    asyncio.run(run())


def test_batches_have_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.server.batches.MOST_ACTIVE", 2)
    monkeypatch.setattr("herd.server.batches.MOST_KEPT", 3)
    monkeypatch.setattr("herd.server.batches.OPEN", 1)
    stuck = [30.0]

    async def run() -> None:
        async with faked(lambda call: [*stuck, *saying("x")], state_dir=str(tmp_path)) as fake:
            first = await begun(fake, line("0"))
            await until(fake, first, "status", "in_progress")
            second = await begun(fake, line("0"))
            await asyncio.sleep(0.05)
            assert (await fake.client.get(f"/v1/batches/{second}")).json()["status"] == "validating"
            source = (await fake.client.get("/v1/files")).json()["data"][0]["id"]
            asked = {"input_file_id": source, "endpoint": CHAT, "completion_window": "24h"}
            refused = await fake.client.post("/v1/batches", json=asked)
            assert refused.status_code == 429
            assert "2 batches" in refused.json()["error"]["message"]
            for id in (second, first):
                await fake.client.post(f"/v1/batches/{id}/cancel")
                assert (await over(fake, id))["status"] == "cancelled"
            stuck.clear()
            for _ in range(3):
                last = await begun(fake, line("0"))
                await over(fake, last)
            kept = [one["id"] for one in (await fake.client.get("/v1/batches")).json()["data"]]
            assert len(kept) == 3
            assert last in kept
            assert first not in kept
            assert len(list((tmp_path / "batches").glob("*.json"))) == 3

    asyncio.run(run())


def test_lines_are_no_longer_than_bodies_and_read_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict, threads = batches.strict_json, []

    def noted(data: bytes) -> Any:
        threads.append(threading.current_thread())
        return strict(data)

    monkeypatch.setattr("herd.server.batches.strict_json", noted)

    async def run() -> None:
        async with faked(state_dir=str(tmp_path), max_body=2000) as fake:
            long = line("long", user="x" * 3000)
            batch = await over(fake, await begun(fake, line("0"), long, b" " * 5000, b"{not json"))
            assert batch["status"] == "failed"
            assert [(one["code"], one["line"]) for one in batch["errors"]["data"]] == [
                ("line_too_large", 2), ("line_too_large", 3), ("invalid_json_line", 4),
            ]  # fmt: skip
            wide = json.dumps(line("é", user="é" * 850), ensure_ascii=False).encode()
            batch = await over(fake, await begun(fake, line("0"), wide))
            assert batch["request_counts"]["completed"] == 2, await lines_of(fake, batch["error_file_id"])
        assert threads
        assert threading.main_thread() not in threads

    asyncio.run(run())


def test_batches_spend_nothing_of_a_key(tmp_path: Path) -> None:
    async def run() -> None:
        async with faked(state_dir=str(tmp_path), api_keys=("secret-key",), rate_tokens=30) as fake:
            fake.client.headers["Authorization"] = "Bearer secret-key"
            batch = await over(fake, await begun(fake, *(line(str(i)) for i in range(40))))
            assert batch["request_counts"]["completed"] == 40
            assert batch["usage"]["total_tokens"] > 60
            answer = await fake.client.post(CHAT, json=line("x")["body"])
            assert answer.status_code == 200, answer.text

    asyncio.run(run())


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
