"""Requests that Schemathesis makes from the OpenAPI document, those that fit it and those that do not, over real connections.

`HERD_EXAMPLES=200 pytest -m slow tests/server/test_openapi.py` makes so many of each kind for each route; `-k` chooses routes. A
route gets `HERD_EXAMPLE_SECONDS` of the processor, so that all of it ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import httpx
import pytest

from herd.server.app import create_app
from herd.server.process import WorkerError
from herd.server.settings import ModelSpec, ServerSettings
from tests.server.conftest import Live, serving
from tests.server.fakes import Scripted, saying

FEW = 2
"""Of each route in the default run, where nothing else is asked for; those that do not fit come with the slow one."""
EXAMPLES = int(os.environ.get("HERD_EXAMPLES", "30"))
SECONDS = float(os.environ.get("HERD_EXAMPLE_SECONDS", "60"))
"""Of the processor, for the requests of one kind for one route. Bodies of many fields take a third of a second each to make."""
LEAST = 1
"""Requests that a route must have seen."""


def routes() -> list[tuple[str, str]]:
    """(method, path) of everything in the document."""
    paths = create_app(ServerSettings()).openapi()["paths"]
    return [(verb, path) for path, verbs in paths.items() for verb in verbs]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with all that can be switched on, over models that say Hello; what it finds on its machine is an empty folder."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "HERD_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
            patch.setenv(name, str(home / name.lower()))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(Scripted, "ask", _asked)
        adapters = home / "adapters"
        adapters.mkdir()
        settings = ServerSettings(
            models=(ModelSpec(source="fake", name="fake", adapters=(("a", "path"),)),), any_model=True, lazy=True, port=0,
            drain_seconds=0.5, max_body=1 << 20, state_dir=str(home / "state"), guard="fake", adapter_dir=str(adapters),
        )  # fmt: skip
        yield from serving(settings, launch=lambda spec: Scripted(spec, lambda call: saying("Hello")))


async def _asked(self: Scripted, what: str, **args: Any) -> Any:
    raise WorkerError("not this time", kind="PromptError")


@cache
def document(url: str) -> Any:
    """The operations of the server at `url`, by (method, path)."""
    import schemathesis

    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json", timeout=60).json())
    return {(one.method.lower(), one.path): one for one in (result.ok() for result in schema.get_all_operations())}


class _Enough(BaseException):
    """The time of a route is up. Hypothesis takes no notice of what is no Exception."""


def tried(live: Live, operation: Any, fits: bool, count: int) -> int:
    """Send `count` requests to a route, or as many as there is time for; how many there were."""
    import hypothesis
    import schemathesis

    mode = schemathesis.GenerationMode.POSITIVE if fits else schemathesis.GenerationMode.NEGATIVE
    until = time.process_time() + SECONDS
    seen = 0
    with live.client(limits=httpx.Limits(max_keepalive_connections=0)) as client:  # none that the server finds idle

        @hypothesis.settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            nonlocal seen
            if seen >= LEAST and time.process_time() > until:
                raise _Enough
            seen += answered(client, case)

        try:
            ask()
        except _Enough:
            pass
        except hypothesis.errors.Unsatisfiable:
            assert not fits, "nothing fits the document"
            return LEAST  # nothing that could be said wrongly
    return seen


def answered(client: httpx.Client, case: Any) -> bool:
    """Send a request; whether it could be sent. It is answered, and not with a fault of the server's."""
    import requests

    sent = case.as_transport_kwargs(base_url=str(client.base_url))
    sent.pop("cookies", None)
    if isinstance(sent.get("json"), dict) and "model" in sent["json"]:
        sent["json"]["model"] = "fake"  # so that it comes as far as it can
    try:
        made = requests.Request(**sent).prepare()
        headers = {k: v for k, v in made.headers.items() if k.lower() not in ("host", "content-length")}
        content = made.body.encode() if isinstance(made.body, str) else made.body
        request = client.build_request(str(made.method), str(made.url), headers=headers, content=content)
    except (requests.RequestException, httpx.InvalidURL, UnicodeError, ValueError, TypeError, AttributeError):
        return False  # what an HTTP client cannot send
    try:
        reply = client.send(request)
    except httpx.LocalProtocolError:
        return False
    assert reply.status_code < 500, (case.method, case.path, reply.status_code, reply.text[:500])
    return True


@pytest.mark.parametrize(("verb", "path"), routes(), ids=lambda one: str(one))
def test_requests_that_fit(verb: str, path: str, everything: Live) -> None:
    pytest.importorskip("schemathesis")
    assert tried(everything, document(everything.url)[verb, path], True, FEW) >= LEAST


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False], ids=["fit", "wrong"])
@pytest.mark.parametrize(("verb", "path"), routes(), ids=lambda one: str(one))
def test_many_requests(
    verb: str, path: str, fits: bool, everything: Live, record_property: Callable[[str, object], None]
) -> None:
    """The number that were sent is in the report (`--junitxml`)."""
    pytest.importorskip("schemathesis")
    seen = tried(everything, document(everything.url)[verb, path], fits, EXAMPLES)
    record_property("requests", seen)
    print(f"{verb} {path}, {'fit' if fits else 'wrong'}: {seen} requests")
    assert seen >= LEAST
