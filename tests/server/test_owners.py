"""What clients leave on a server belongs to their API key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.server.conftest import faked
from tests.server.test_batches import begun, line, over

ASKED = {"model": "fake", "input": "Hi"}


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def test_keys_do_not_see_what_others_left(tmp_path: Path) -> None:
    async def run() -> None:
        async with faked(api_keys=("one", "two"), state_dir=str(tmp_path)) as fake:
            assert (await fake.client.get("/v1/batches")).status_code == 401
            fake.client.headers.update(key("one"))
            response = (await fake.client.post("/v1/responses", json=ASKED)).json()["id"]
            batch = await over(fake, await begun(fake, line("0")))
            paths = [f"/v1/responses/{response}", f"/v1/batches/{batch['id']}", f"/v1/files/{batch['output_file_id']}"]
            lists = ["/v1/batches", "/v1/files"]
            for path in paths:
                assert (await fake.client.get(path)).status_code == 200
            for path in lists:
                assert (await fake.client.get(path)).json()["data"]
            fake.client.headers.update(key("two"))
            for path in paths:
                assert (await fake.client.get(path)).status_code == 404
            for path in lists:
                assert (await fake.client.get(path)).json()["data"] == []
            more = ASKED | {"previous_response_id": response}
            assert (await fake.client.post("/v1/responses", json=more)).status_code == 400
            source = {"input_file_id": batch["input_file_id"], "endpoint": "/v1/responses", "completion_window": "24h"}
            assert (await fake.client.post("/v1/batches", json=source)).status_code == 400

    asyncio.run(run())


def test_responses_of_a_batch_belong_to_who_made_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with faked(api_keys=("one", "two"), state_dir=str(tmp_path)) as fake:
            fake.client.headers.update(key("one"))
            asked: Any = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": ASKED}
            await over(fake, await begun(fake, asked, endpoint="/v1/responses"))
            (id,) = fake.state.stored._entries
            assert (await fake.client.get(f"/v1/responses/{id}")).status_code == 200
            fake.client.headers.update(key("two"))
            assert (await fake.client.get(f"/v1/responses/{id}")).status_code == 404

    asyncio.run(run())
