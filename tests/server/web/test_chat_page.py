"""The chat in a real browser: what users do, on a server whose models play parts."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Live
from tests.server.web.conftest import Visit, visiting
from tests.server.web.stage import stage

pytestmark = pytest.mark.browser
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def kept(visit: Visit) -> Any:
    """All conversations in the browser's database, once the page has written them."""
    visit.until("document.querySelectorAll('#conversations .row').length > 0")
    return visit.page.evaluate(
        "async () => { const { Store } = await import('/web/js/store.js'); return (await Store.open()).all(); }"
    )


def test_a_conversation(visit: Visit) -> None:
    page = visit.open()
    assert page.locator(".greeting").inner_text() == "llama-3.2-1b"
    assert visit.ask("Hello herd") == "You said: Hello herd"
    assert visit.ask("And again") == "You said: And again"
    assert page.locator("article").count() == 4
    stats = page.locator("article.assistant .stats").last.inner_text()
    assert re.fullmatch(
        r"\d+ tokens · \d+\.\d tok/s · first after \d+ ms.*|\d+ tokens · \d+\.\d tok/s · first after [\d.]+ s.*", stats
    )
    page.wait_for_selector("article.user .stats:has-text('2 tokens')")
    assert page.title() == "Hello herd · herd"
    assert page.evaluate("document.activeElement.id") == "draft"
    page.wait_for_selector("#meter-text:has-text('of 8,192 tokens')")


def test_it_is_still_there_after_a_reload(visit: Visit) -> None:
    page = visit.open()
    visit.ask("Remember the lakes")
    (one,) = kept(visit)
    assert [node["role"] for node in one["nodes"].values()] == ["user", "assistant"]
    page.reload()
    page.wait_for_selector("#conversations .row")
    assert page.locator("article").count() == 0, "a reload begins anew; the conversation is in the list"
    page.click("#conversations .row")
    page.wait_for_selector("article.assistant .prose table")
    assert page.locator("article.user .prose").inner_text() == "Remember the lakes"


def test_markdown_streams_into_elements(visit: Visit) -> None:
    page = visit.open()
    visit.ask("lakes")
    prose = page.locator("article.assistant .prose")
    assert prose.locator("table tbody tr").count() == 2
    assert prose.locator("strong").inner_text() == "Andes"
    assert prose.locator("a").get_attribute("rel") == "noopener noreferrer nofollow"
    assert prose.locator("pre .keyword").all_inner_texts() == ["def", "return"]
    assert "$d = V / A$" in prose.inner_text()
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("article.assistant .copy")
    assert page.evaluate("window.copied").startswith("def area(width")


def test_stop(visit: Visit, staged: Live) -> None:
    page = visit.open()
    visit.send("a slow one")
    visit.until("document.querySelector('article.assistant .prose')?.innerText.includes('word3')")
    assert page.get_attribute("#send", "title") == "Stop the reply"
    page.keyboard.press("Escape")
    visit.done()
    assert page.locator(".note").inner_text() == "Stopped."
    assert "word399" not in page.locator("article.assistant .prose").inner_text()
    page.wait_for_timeout(300)
    assert staged.state.running == set(), "the server's request has ended, too"


def test_regenerate_makes_versions(visit: Visit) -> None:
    page = visit.open()
    first = visit.ask("seeds please")
    page.click("article.assistant [aria-label='Another reply']")
    page.wait_for_selector(".branches:has-text('2/2')")
    visit.done()
    second = page.locator("article.assistant .prose").inner_text()
    assert first != second
    page.click("[aria-label='Version before']")
    assert page.locator("article.assistant .prose").inner_text() == first
    page.keyboard.press("]")
    assert page.locator("article.assistant .prose").inner_text() == second
    assert page.locator("#announcer").inner_text() in ("", "Version 2 of 2", "Version 1 of 2")


def test_edit_makes_a_branch(visit: Visit) -> None:
    page = visit.open()
    visit.ask("one")
    visit.ask("two")
    page.locator("article.user [aria-label='Edit']").first.click()
    page.fill("article.editing textarea", "three")
    page.click("article.editing button.primary")
    page.wait_for_selector("article.assistant .prose:has-text('You said: three')")
    visit.done()
    assert page.locator("article").count() == 2
    page.click("article.user [aria-label='Version before']")
    assert page.locator("article").count() == 4, "what was said after the first version is there again"
    page.locator("article.assistant [aria-label='Edit']").last.click()
    page.fill("article.editing textarea", "other words")
    page.keyboard.press("Control+Enter")
    assert page.locator("article.assistant .prose").last.inner_text() == "other words"
    assert page.locator("article.assistant .branches").inner_text() == "2/2"
    page.focus("#draft")
    page.keyboard.press("ArrowUp")
    assert page.input_value("article.editing textarea") == "two"
    page.keyboard.press("Escape")
    assert page.locator("article.editing").count() == 0


def test_system_prompt_and_sampling_reach_the_server(visit: Visit) -> None:
    page = visit.open()
    page.keyboard.press("Alt+s")
    page.fill("#system", "Be brief.")
    for name, value in {
        "temperature": "0.3",
        "top_p": "0.5",
        "top_k": "7",
        "min_p": "0.05",
        "max_tokens": "99",
        "seed": "11",
    }.items():
        page.fill(f"#set-{name}", value)
    page.fill("#stop", "END\n\\n\\n")
    page.keyboard.press("Escape")
    system, sampling = json.loads(visit.ask("system?"))
    assert system == "Be brief."
    assert sampling == {
        "temperature": 0.3, "top_p": 0.5, "top_k": 7, "min_p": 0.05, "max_tokens": 99, "seed": 11, "stop": ["END", "\n\n"],
    }  # fmt: skip
    page.keyboard.press("Alt+s")
    page.wait_for_selector("#set-top_k[placeholder='0']")
    assert page.get_attribute("#set-temperature", "placeholder") == "0.6"
    page.click("text=Back to the model's defaults")
    assert page.input_value("#set-seed") == ""
    page.fill("#set-temperature", "-1")
    assert page.get_attribute("#set-temperature", "aria-invalid") == "true"
    page.keyboard.press("Escape")
    assert json.loads(visit.ask("system?"))[1] == {}


def test_models_and_adapters(visit: Visit, staged: Live) -> None:
    page = visit.open()
    assert page.locator("#model option").all_inner_texts() == ["llama-3.2-1b", "support", "small", "late", "broken"]
    page.select_option("#model", "support")
    visit.ask("hi")
    assert page.locator(".who").inner_text() == "support"
    process = staged.state.models.slots["llama-3.2-1b"].process
    assert process is not None
    assert process.seen[-1].adapter == "support"  # type: ignore[attr-defined]
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.input_value("#model") == "support", "the choice is remembered"


def test_loading_and_failing_are_told(visit: Visit) -> None:
    visit.expected = ("503",)
    page = visit.open()
    page.select_option("#model", "late")
    visit.send("hello")
    page.wait_for_selector(".waiting:has-text('Loading late: reading weights 50%')")
    page.wait_for_selector("article.assistant .prose:has-text('You said: hello')")
    visit.done()
    page.select_option("#model", "broken")
    visit.send("hello")
    page.wait_for_selector(".failure:has-text(\"tensor 'output.weight' is missing\")")


def test_tools(visit: Visit) -> None:
    page = visit.open()
    page.keyboard.press("Alt+s")
    page.fill("#tools", "[{]")
    assert "no JSON" in page.locator("#tools-problem").inner_text()
    page.click("text=Put in an example")
    assert page.locator("#tools-problem").inner_text() == "One tool: get_weather"
    page.keyboard.press("Escape")
    visit.send("the weather")
    visit.done()
    field = page.locator(".call textarea")
    assert json.loads(page.locator(".call pre").inner_text()) == {"city": "La Paz"}
    field.fill("12 degrees, sun")
    field.press("Control+Enter")
    page.wait_for_selector("article.assistant .prose:has-text('The tool says: 12 degrees, sun')")
    assert page.locator(".result pre").inner_text() == "12 degrees, sun"
    assert page.locator("article").count() == 3
    assert page.locator(".call textarea").count() == 0


class Endpoint(BaseHTTPRequestHandler):
    """A tool endpoint: adds what it was asked."""

    asked: list[Any]

    def do_OPTIONS(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((body, self.headers.get("Authorization"), self.headers.get("Cookie")))
        self._answer(b"9 degrees")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "content-type")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Endpoint.asked = []
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/call"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_tool_endpoint_is_asked_when_the_user_says_so(visit: Visit, endpoint: str) -> None:
    page = visit.open()
    page.keyboard.press("Alt+s")
    page.click("text=Put in an example")
    page.fill("#endpoint", "https://example.org/call")
    assert page.get_attribute("#endpoint", "aria-invalid") == "true", "only this computer"
    page.fill("#endpoint", endpoint)
    page.keyboard.press("Escape")
    visit.send("the weather")
    page.wait_for_selector("text=Ask the endpoint")
    assert Endpoint.asked == []
    page.click("text=Ask the endpoint")
    visit.until("document.querySelector('.call textarea')?.value === '9 degrees'")
    assert Endpoint.asked == [({"name": "get_weather", "arguments": {"city": "La Paz"}}, None, None)]
    page.click("text=Send the result")
    page.wait_for_selector("text=The tool says: 9 degrees")


def test_images(visit: Visit, tmp_path: Path) -> None:
    import base64

    visit.expected = ("400",)
    picture = tmp_path / "dot.png"
    picture.write_bytes(base64.b64decode(PIXEL))
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    page = visit.open()
    page.set_input_files("#attach-file", [str(picture), str(text)])
    page.wait_for_selector("#attached img")
    page.wait_for_selector(".toast:has-text('notes.txt')")
    assert page.locator("#attached img").get_attribute("alt") == "dot.png"
    visit.send("what is this?")
    page.wait_for_selector("article.user .images img")
    page.wait_for_selector(".failure:has-text('reads text only')")
    assert "without its pictures" in page.locator(".failure .hint").inner_text()
    page.click("text=Send without pictures")
    page.wait_for_selector("article.assistant .prose:has-text('You said: what is this?')")
    assert page.locator("article.user img").count() == 0
    # pasted
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], 'pasted.png', { type: 'image/png' }));
            const how = { bubbles: true, cancelable: true };
            const [draft, main] = ['draft', 'main'].map((id) => document.getElementById(id));
            draft.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, ...how }));
            main.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, ...how }));
        }""",
        PIXEL,
    )
    visit.until("document.querySelectorAll('#attached img').length === 2")
    page.locator("#attached button").first.click()
    assert page.locator("#attached img").count() == 1


def test_errors_have_a_cause_and_a_retry(visit: Visit) -> None:
    visit.expected = ("400", "ERR_", "Failed to load")
    page = visit.open()
    visit.send("full")
    page.wait_for_selector(".failure:has-text('9,000 tokens')")
    assert "Shorten" in page.locator(".failure .hint").inner_text()
    page.keyboard.press("Alt+n")
    visit.send("break")
    page.wait_for_selector(".failure:has-text('process ended')")
    assert page.locator("article.assistant .prose").inner_text() == "half a", "what came is kept"
    page.keyboard.press("Alt+n")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    visit.send("hello")
    page.wait_for_selector(".failure:has-text('cannot be reached')")
    page.unroute("**/v1/chat/completions")
    page.click("text=Try again")
    page.wait_for_selector("article.assistant .prose:has-text('You said: hello')")


def test_the_key_is_asked_for(visit: Visit) -> None:
    visit.expected = ("401",)
    right = "Bearer sk-right"
    refusal = json.dumps(
        {"error": {"message": "a key is needed", "type": "authentication_error", "param": None, "code": None}}
    )

    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == right:
            route.continue_()
        else:
            route.fulfill(status=401, content_type="application/json", body=refusal)

    visit.page.route("**/v1/**", guard)
    visit.page.goto(visit.url)
    page = visit.page
    page.wait_for_selector("dialog[open] input[name=key]")
    assert page.locator("dialog").count() == 1, "one question for all requests"
    page.fill("dialog input[name=key]", "sk-wrong")
    page.click("text=Use this key")
    page.wait_for_selector(".toast:has-text('a key is needed')")
    page.click(".toast >> text=Try again")
    page.fill("dialog input[name=key]", "sk-right")
    page.click("text=Use this key")
    page.wait_for_selector(".greeting:has-text('llama')")
    assert visit.ask("hi") == "You said: hi"
    assert page.evaluate("localStorage.getItem('herd.key')") is None, "kept for the tab only, unless asked"


def test_the_list(visit: Visit) -> None:
    page = visit.open()
    visit.ask("about alpacas")
    page.keyboard.press("Alt+n")
    visit.ask("about guanacos")
    page.keyboard.press("Alt+n")
    visit.until("document.querySelectorAll('#conversations .row').length === 2")
    page.keyboard.press("Control+k")
    page.keyboard.type("alpacas said")
    assert page.locator(".row-title").all_inner_texts() == ["about alpacas"]
    page.hover("#conversations li")
    page.click("[aria-label='Rename about alpacas']")
    page.fill("dialog input", "Camelids")
    page.keyboard.press("Enter")
    page.wait_for_selector(".row-title:has-text('Camelids')")
    page.hover("#conversations li")
    page.click("[aria-label='Delete Camelids']")
    page.click("dialog >> text=Cancel")
    assert page.locator("#conversations .row").count() == 1
    page.hover("#conversations li")
    page.click("[aria-label='Delete Camelids']")
    page.click("dialog button.danger")
    page.wait_for_selector("text=Nothing has these words.")
    page.fill("#search", "")
    assert page.locator(".row-title").all_inner_texts() == ["about guanacos"]


def test_export_and_import(visit: Visit, tmp_path: Path) -> None:
    page = visit.open()
    visit.ask("lakes")
    page.click("article.assistant [aria-label='Another reply']")
    page.wait_for_selector(".branches:has-text('2/2')")
    visit.done()
    page.keyboard.press("Alt+s")
    with page.expect_download() as saving:
        page.click("text=Save as markdown")
    text = Path(saving.value.path()).read_text()
    assert saving.value.suggested_filename == "lakes.md"
    assert text.startswith("# lakes\n")
    assert "## User\n\nlakes\n" in text
    assert "| Titicaca |" in text
    with page.expect_download() as saving:
        page.click("text=Save as JSON")
    file = tmp_path / "one.json"
    saving.value.save_as(str(file))
    page.set_input_files("#import-file", str(file))
    visit.until("document.querySelectorAll('#conversations .row').length === 2")
    page.wait_for_selector(".branches:has-text('2/2')")
    whole = json.loads(file.read_text())
    one, other = kept(visit)
    for name in ("nodes", "chosen", "system", "settings", "model"):
        assert one[name] == other[name]
    bad = [
        ("{", "no JSON"),
        ("{}", "not exported"),
        (json.dumps(whole | {"version": 99}), "version 99"),
        (
            json.dumps(
                whole | {"conversations": [{"nodes": {"a": {"id": "a", "parent": "b", "role": "user", "content": ""}}}]}
            ),
            "not there",
        ),
        (
            json.dumps(
                whole | {"conversations": [{"nodes": {"a": {"id": "a", "parent": "a", "role": "user", "content": ""}}}]}
            ),
            "circle",
        ),
        (
            json.dumps(
                whole
                | {"conversations": [{"nodes": {"a": {"id": "a", "parent": "", "role": "__proto__", "content": ""}}}]}
            ),
            "damaged",
        ),
    ]
    node = {"id": "a", "parent": "", "role": "user", "content": "x"}
    for part, why in (
        ({"images": [{"url": "https://example.com/a.png"}]}, "a picture of message a is damaged"),
        ({"images": "x"}, "a picture of message a is damaged"),
        ({"calls": [{"name": "f"}]}, "a tool call of message a is damaged"),
    ):
        bad.append((json.dumps(whole | {"conversations": [{"nodes": {"a": node | part}}]}), why))
    for content, why in bad:
        file.write_text(content)
        page.set_input_files("#import-file", str(file))
        page.wait_for_selector(f".toast:has-text('{why}')")
    assert len(kept(visit)) == 2


def test_keys_and_help(visit: Visit) -> None:
    page = visit.open()
    visit.ask("one")
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open] kbd")
    page.keyboard.press("Escape")
    visit.until("!document.querySelector('dialog')")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.className") == "message assistant"
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.className") == "message user"
    page.keyboard.press("/")
    page.keyboard.type("a?/[j")
    assert page.input_value("#draft") == "a?/[j", "keys are letters where one writes"
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#draft") == "a?/[j\n"
    page.keyboard.press("Alt+d")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


def test_hostile_replies_stay_text(visit: Visit) -> None:
    page = visit.open()
    page.evaluate("window.pwned = 0")
    attack = "<img src=x onerror=window.pwned=1><script>window.pwned=1</script>[a](javascript:window.pwned=1)![b](https://evil.example/x.png)"
    visit.ask(f"hostile {attack}")
    prose = page.locator("article.assistant .prose")
    assert prose.locator("img, script").count() == 0
    assert prose.locator("a").evaluate_all("links => links.map(a => a.protocol)") == ["https:"]
    assert "<script>window.pwned=1</script>" in prose.inner_text()
    assert page.evaluate("window.pwned") == 0


def test_on_a_phone(browser: Any, staged: Live) -> None:
    for visit in visiting(browser, staged.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True):
        page = visit.open()
        visit.send("lakes")  # Enter is a new line where there is no real keyboard
        page.click("#send")
        page.wait_for_selector("article.assistant .prose table")
        visit.done()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.click("#open-sidebar")
        page.wait_for_selector("#conversations .row")
        assert page.evaluate("document.getElementById('main').inert") is True
        page.click("#close-sidebar")
        page.click("#open-panel")
        assert page.evaluate("document.getElementById('panel').getBoundingClientRect().right") <= 360
        page.locator("#panel [aria-label='Close the settings']").click()
        page.wait_for_selector("#send", state="visible")


def test_behind_a_path(browser: Any) -> None:
    """Addresses are relative: the page works behind a proxy that serves it under a path."""
    with stage() as live:
        for visit in visiting(browser, live.url):
            page = visit.page
            page.route("**/under/**", lambda route: route.continue_(url=route.request.url.replace("/under/", "/")))
            visit.open("/under/")
            assert visit.ask("hi") == "You said: hi"
