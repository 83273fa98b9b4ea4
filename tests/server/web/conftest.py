"""A real browser (Debian's chromium, driven by Playwright) and a server whose models play parts.

The fixtures live as long as a module: Playwright keeps an event loop in this thread, where other modules need their own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.server.conftest import Live
from tests.server.web.stage import stage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 15_000
"""The page is quick; a busy machine is not."""


@dataclass
class Visit:
    """A page that is open, and what its console said."""

    page: Any
    url: str
    said: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()
    """Parts of messages that belong to the test: the browser itself notes every refused request."""

    def open(self, path: str = "/") -> Any:
        """Go there, and wait until it is ready."""
        self.page.goto(self.url + path)
        self.page.wait_for_selector("body[data-ready]")
        return self.page

    def send(self, text: str) -> None:
        """Write a message and send it."""
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")

    def done(self) -> None:
        """Wait until no reply is being written."""
        self.until("document.getElementById('send').title === 'Send'")

    def ask(self, text: str) -> str:
        """The text of the reply to a message."""
        before = self.page.locator("article.assistant").count()
        self.send(text)
        self.until(
            f"document.querySelectorAll('article.assistant').length > {before} && "
            "document.getElementById('send').title === 'Send'"
        )
        return str(self.page.locator("article.assistant").last.locator(".prose").inner_text())

    def until(self, expression: str) -> None:
        """Wait until an expression is true. From here: the policy forbids a page to evaluate text, Playwright's own included."""
        end = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def problems(self) -> list[str]:
        """What the console said and nobody expected: errors, refusals of the policy."""
        return [text for text in self.said if not any(part in text for part in self.expected)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install herd[browser])"
    )
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def staged() -> Iterator[Live]:
    """A live server of the stage."""
    with stage() as live:
        yield live


def visiting(browser: Any, url: str, **context: Any) -> Iterator[Visit]:
    """A visit with storage of its own. Fails when the console told of errors."""
    opened = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | context))
    opened.set_default_timeout(PATIENCE_MS)
    page = opened.new_page()
    visit = Visit(page, url)
    page.on("console", lambda message: message.type in ("error", "warning") and visit.said.append(message.text))
    page.on("pageerror", lambda error: visit.said.append(f"page error: {error}"))
    yield visit
    opened.close()
    assert visit.problems() == []


@pytest.fixture
def visit(browser: Any, staged: Live) -> Iterator[Visit]:
    """A visit to the stage."""
    yield from visiting(browser, staged.url)
