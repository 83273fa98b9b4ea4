"""`/v1/batches` with the real client on a live server, and what becomes of them when it ends in between."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from herd.server.process import WorkerError
from tests.server.batching import CHAT, begun, ended, jsonl, line, lines_of, over, uploaded
from tests.server.conftest import faked
from tests.server.fakes import saying


def test_a_batch_of_several_endpoints(keeping_client: openai.OpenAI) -> None:
    """Chats that are right and wrong; the answers are those that a client gets."""
    asked = {"model": "nano", "max_tokens": 6, "temperature": 0}
    good = [line(f"good-{i}", **asked) for i in range(12)]
    source = keeping_client.files.create(
        file=("in.jsonl", jsonl(*good, line("bad", **asked, n=0), line("streamed", **asked, stream=True), b"")),
        purpose="batch",
    )
    batch = keeping_client.batches.create(
        input_file_id=source.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"},
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )  # fmt: skip
    assert batch.status in ("validating", "in_progress")
    batch = ended(keeping_client, batch.id)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (14, 12, 2)
    assert batch.usage is not None
    assert batch.usage.output_tokens == 12 * 6
    assert (batch.model, batch.metadata) == ("nano", {"a": "b"})
    assert batch.output_file_id
    assert batch.error_file_id
    out = {
        one["custom_id"]: one
        for one in map(json.loads, keeping_client.files.content(batch.output_file_id).iter_lines())
    }
    assert set(out) == {f"good-{i}" for i in range(12)}
    response = out["good-3"]["response"]
    assert response["status_code"] == 200
    direct = keeping_client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "good-3"}], max_tokens=6, temperature=0
    )
    assert response["body"]["choices"][0]["message"]["content"] == direct.choices[0].message.content
    wrong = {
        one["custom_id"]: one for one in map(json.loads, keeping_client.files.content(batch.error_file_id).iter_lines())
    }
    assert wrong["bad"]["response"]["body"]["error"]["param"] == "n"
    assert wrong["streamed"]["response"]["status_code"] == 400
    kept = keeping_client.files.retrieve(batch.output_file_id)
    assert kept.expires_at == kept.created_at + 7200
    assert kept.purpose == "batch_output"
    assert batch.id in [one.id for one in keeping_client.batches.list(limit=1)]
    with pytest.raises(openai.ConflictError):
        keeping_client.batches.cancel(batch.id)

    one = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": {"model": "nano", "input": "A dog."}}
    source = keeping_client.files.create(file=("in.jsonl", jsonl(one)), purpose="batch")
    made = keeping_client.batches.create(input_file_id=source.id, endpoint="/v1/embeddings", completion_window="24h")
    made = ended(keeping_client, made.id)
    assert made.output_file_id
    vector = json.loads(keeping_client.files.content(made.output_file_id).read())["response"]["body"]["data"][0][
        "embedding"
    ]
    expected = keeping_client.embeddings.create(model="nano", input="A dog.").data[0].embedding
    assert vector == pytest.approx(expected, abs=1e-5)


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
            fake.state._retry_after = lambda waiting: 0.05  # type: ignore[method-assign]
            id = await begun(fake, *(line(str(i)) for i in range(10)), line("broken"), line("other", model="nothing"))
            batch = await over(fake, id)
            assert batch["request_counts"] == {"total": 12, "completed": 10, "failed": 2}
            told = {one["custom_id"]: one["response"] for one in await lines_of(fake, batch["error_file_id"])}
            assert told["broken"]["status_code"] == 500
            assert told["other"]["status_code"] == 404
            assert batch["model"] is None

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
