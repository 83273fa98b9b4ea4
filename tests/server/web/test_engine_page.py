"""The engine page in a real browser."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Live
from tests.server.web.conftest import Visit
from tests.server.web.stage import STATS

pytestmark = pytest.mark.browser


def loaded(visit: Visit, staged: Live) -> Any:
    """The double behind the first model, which has answered once."""
    visit.open()
    visit.ask("hi")
    return staged.state.models.slots["llama-3.2-1b"].process


def figure(visit: Visit, label: str) -> str:
    """A large number of the first model."""
    return str(
        visit.page.locator(f".model >> nth=0 >> dl div:has(dt:text-is('{label}')) dd").inner_text().split("\n")[0]
    )


def test_the_numbers(visit: Visit, staged: Live) -> None:
    process = loaded(visit, staged)
    process.stats = dict(STATS)
    page = visit.page
    page.click("#to-engine")
    page.wait_for_selector(".model .figures")
    assert page.locator("h2").all_inner_texts() == ["llama-3.2-1b", "late", "broken"]
    assert page.locator(".state").all_inner_texts() == ["ready", "unloaded", "unloaded"]
    assert (figure(visit, "Running"), figure(visit, "Waiting")) == ("3", "2")
    assert figure(visit, "Prefix hits") == "60%"
    assert figure(visit, "Memory") == "1.2 GB"
    assert "141 used, 96 remembered, 275 free of 512 KV blocks" in (
        page.get_attribute(".blocks svg", "aria-label") or ""
    )
    process.stats = dict(STATS) | {"running": 7, "generated_tokens": 9000, "blocks_used": 512, "blocks_cached": 0}
    visit.until("document.querySelector('.figures dd').textContent.startsWith('7')")
    assert page.locator(".blocks path.free").count() == 0
    visit.until("document.querySelector('.chart .line') !== null")
    page.click("#pause")
    process.stats = dict(STATS) | {"running": 9}
    page.wait_for_timeout(1300)
    assert figure(visit, "Running") == "7", "it stands still"
    page.click("#pause")
    visit.until("document.querySelector('.figures dd').textContent.startsWith('9')")


def test_a_server_that_is_gone(visit: Visit, staged: Live) -> None:
    visit.expected = ("ERR_", "Failed to load")
    visit.page.goto(visit.url + "/engine")
    visit.page.wait_for_selector(".model")
    visit.page.route("**/v1/engine", lambda route: route.abort())
    visit.page.wait_for_selector("#problem:has-text('cannot be reached')")
    visit.page.unroute("**/v1/engine")
    visit.page.wait_for_selector("#problem", state="hidden")


def test_names_are_text(visit: Visit) -> None:
    """Whatever a model is called."""
    row: dict[str, Any] = {"name": "<img src=x onerror=alert(1)>", "state": "failed", "error": "<b>damaged</b>"}
    row |= {"aliases": [], "adapters": [], "requests": [], "progress": None, "memory": None, "stats": None}
    told = {"version": "1", "uptime": 1.0, "draining": False, "models": [row]}
    visit.page.route("**/v1/engine", lambda route: route.fulfill(json=told))
    visit.page.goto(visit.url + "/engine")
    visit.page.wait_for_selector(".model:has-text('<b>damaged</b>')")
    assert visit.page.locator(".model img, .model b").count() == 0
