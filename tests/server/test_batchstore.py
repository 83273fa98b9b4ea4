"""Batches as they are kept: full disks, limits, what their files must be."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from herd.server import batchlines, filestore
from tests.server.batching import CHAT, begun, full, line, lines_of, over, until
from tests.server.conftest import Fake, faked
from tests.server.fakes import saying


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
    append, times = batchlines._append, [0]

    def sometimes(file: Any, told: Any) -> None:
        times[0] += 1
        if times[0] in (3, 9):
            file.write(b'{"custom_id": "7", "cut')
            file.flush()
            full()
        append(file, told)

    monkeypatch.setattr("herd.server.batchlines._append", sometimes)

    async def run() -> None:
        async with faked(state_dir=str(tmp_path)) as fake:
            batch = await over(fake, await begun(fake, *(line(str(i)) for i in range(20))))
            assert batch["status"] == "completed", batch
            assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
            told = await lines_of(fake, batch["output_file_id"])
            assert sorted(int(one["custom_id"]) for one in told) == list(range(20))
            monkeypatch.setattr("herd.server.batchstore.write_json", full)
            source = (await fake.client.get("/v1/files?purpose=batch")).json()["data"][0]["id"]
            asked = {"input_file_id": source, "endpoint": CHAT, "completion_window": "24h"}
            assert (await fake.client.post("/v1/batches", json=asked)).status_code == 507
            assert len((await fake.client.get("/v1/batches")).json()["data"]) == 1

    asyncio.run(run())


def test_a_server_ends_although_its_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        with monkeypatch.context() as disk:
            disk.setattr("herd.server.batchlines._append", full)
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
    monkeypatch.setattr("herd.server.batchstore.MOST_ACTIVE", 2)
    monkeypatch.setattr("herd.server.batchstore.MOST_KEPT", 3)
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
    strict, threads = batchlines.strict_json, []

    def noted(data: bytes) -> Any:
        threads.append(threading.current_thread())
        return strict(data)

    monkeypatch.setattr("herd.server.batchlines.strict_json", noted)

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
