"""Who uses the page without a mouse, without sight or with weak eyes: names, contrast, sizes, the order of the focus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Live
from tests.server.web.conftest import Visit, visiting

pytestmark = pytest.mark.browser
CHECK = Path(__file__).with_name("access.js").read_text(encoding="utf-8").partition("\n")[2].rstrip().rstrip(";")


def chat(visit: Visit) -> None:
    visit.open()
    visit.ask("lakes")
    visit.page.click("article.assistant [aria-label='Another reply']")
    visit.page.wait_for_selector(".branches")
    visit.done()


def panel(visit: Visit) -> None:
    visit.open().keyboard.press("Alt+s")


def tools(visit: Visit) -> None:
    panel(visit)
    visit.page.click("text=Put in an example")
    visit.page.keyboard.press("Escape")
    visit.send("the weather")
    visit.page.wait_for_selector(".call textarea")
    visit.done()


def failure(visit: Visit) -> None:
    visit.expected = ("400",)
    visit.open()
    visit.ask("first")
    visit.send("full")
    visit.page.wait_for_selector(".failure")


def editing(visit: Visit) -> None:
    visit.open()
    visit.ask("first")
    visit.page.focus("#draft")
    visit.page.keyboard.press("ArrowUp")


def keys(visit: Visit) -> None:
    visit.open().click("#help")


def engine(visit: Visit) -> None:
    visit.open()
    visit.ask("hi")
    visit.page.goto(visit.url + "/engine")
    visit.page.wait_for_selector(".charts")


SCENES: list[Callable[[Visit], None]] = [chat, panel, tools, failure, editing, keys, engine]


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_faults(browser: Any, staged: Live, scene: Callable[[Visit], None]) -> None:
    for visit in visiting(browser, staged.url, reduced_motion="reduce"):
        scene(visit)
        for theme in ("light", "dark"):
            visit.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            found = visit.page.evaluate(CHECK)
            assert found["faults"] == [], theme
            assert found["least"] >= 4.5


def test_the_check_finds_faults(visit: Visit) -> None:
    """It is able to fail."""
    page = visit.open()
    page.evaluate(
        """() => {
            const main = document.getElementById('main');
            const add = (tag, set = {}) => main.append(Object.assign(document.createElement(tag), set));
            add('button', { id: 'draft' });
            add('input');
            add('p', { textContent: 'pale', id: 'pale' });
            document.getElementById('pale').style.color = '#cccccc';
            add('img', { src: '/web/icon.svg' });
        }"""
    )
    faults = " ".join(page.evaluate(CHECK)["faults"])
    for part in ("id twice: draft", "no name: button", "only a placeholder: input", "contrast", "no alt"):
        assert part in faults


def test_the_focus_goes_through_the_page_in_order(visit: Visit) -> None:
    page = visit.open()
    visit.ask("hello")
    page.focus(".skip")
    order = [page.locator(".skip").inner_text()]
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
                const e = document.activeElement;
                if (e === document.body) return null;
                const { outlineStyle, opacity } = getComputedStyle(e);
                const shown = outlineStyle !== 'none' || getComputedStyle(e.closest('.field') ?? e).outlineStyle !== 'none';
                const seen = shown && Number(opacity) > 0 && !e.closest('[inert]');
                return [e.id || e.getAttribute('aria-label') || e.textContent.trim(), seen];
            }"""
        )
        if found is None:
            break
        assert found[1], f"{found[0]} has the focus, and nobody sees it"
        order.append(found[0])
    assert order[0] == "Skip to the message field"
    parts = [
        "new",
        "search",
        "export-all",
        "open-sidebar",
        "model",
        "to-engine",
        "theme",
        "open-panel",
        "Copy",
        "Edit",
        "attach",
        "draft",
    ]
    places = [order.index(part) for part in parts]
    assert places == sorted(places)


def test_what_streams_is_said_once(visit: Visit) -> None:
    page = visit.open()
    page.evaluate(
        """() => {
            window.heard = [];
            const place = document.getElementById('announcer');
            new MutationObserver(() => window.heard.push(place.textContent)).observe(place, { childList: true });
        }"""
    )
    visit.ask("hello")
    visit.until("window.heard.some((text) => text.startsWith('The reply is complete: You said: hello'))")
    assert len([text for text in page.evaluate("window.heard") if text]) <= 2
    assert page.get_attribute("#log", "aria-live") == "off"
