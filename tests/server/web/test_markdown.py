"""The page's markdown, in the browser it is written for: beside markdown-it, which we did not write, and hostile texts."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.server.conftest import Live
from tests.server.web.conftest import Visit, visiting

pytestmark = pytest.mark.browser
DRAW = "async (text) => (await import('/web/js/markdown.js')).drawMarkdown(text).innerHTML"
SECONDS = 4.0
"""For 100,000 characters that are meant to be slow; what is quadratic takes minutes. Plain text of that size takes 0.1."""
VOID = ("br", "hr", "input")


@pytest.fixture(scope="module")
def open_page(browser: Any, staged: Live) -> Iterator[Visit]:
    """A page that is open once for tests that only draw."""
    for visit in visiting(browser, staged.url):
        visit.open()
        yield visit


class Shape(HTMLParser):
    """HTML as nested tags and text: no attributes but addresses, no space between blocks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.out: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if level := given.get("data-level"):
            tag = f"h{level}"
        self.out.append(f"<{tag}{' ' + str(given['href']) if tag == 'a' else ''}>")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            self.out.append("</>")

    def handle_data(self, data: str) -> None:
        self.out.append(data)

    def __str__(self) -> str:
        text = re.sub(r"\s+", " ", "".join(self.out))
        return re.sub(r" ?(<(?:/|p|h\d|ul|ol|li|blockquote|pre|br|hr|t\w+)>) ?", r"\1", text).strip()


def ours(visit: Visit, text: str) -> str:
    """The page's elements as a Shape."""
    html = visit.page.evaluate(DRAW, text)
    # what the page adds around code and tables
    html = re.sub(r'<div class="code-head">.*?</div>', "", html)
    html = re.sub(r'<div class="(?:code|table)"[^>]*>', "<x>", html)
    html = re.sub(r"</?span[^>]*>", "", html)
    shape = str(Shape(html))
    return (
        re.sub(r"<x>(.*?</>)</>", r"\1", shape)
        if "<x><pre>" in shape
        else shape.replace("<x>", "").replace("</></></></></>", "</></></></>")
        if "<x>" in shape
        else shape
    )


def theirs(text: str) -> str:
    """What markdown-it makes of it, with line breaks as chats have them."""
    markdown_it = pytest.importorskip("markdown_it")
    reader = markdown_it.MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    return str(Shape(reader.render(text)))


SAME = [
    "plain",
    "two\nlines",
    "two\n\nparagraphs",
    "# One",
    "###### Six",
    "####### seven",
    "#nothing",
    "# closed ##",
    "## *with* `code`",
    "*em*",
    "**strong**",
    "***both***",
    "**a *b* c**",
    "*a **b** c*",
    "_em_ and __strong__",
    "snake_case_word",
    "a*b*c",
    "2 * 3 * 4",
    "~~gone~~",
    "**not closed",
    "*also not",
    "`code`",
    "``a ` b``",
    "` a `",
    "`not closed",
    "\\*escaped\\*",
    "\\`",
    "a\\\nb",
    "[link](https://example.org/a)",
    '[li*n*k](https://example.org/a "title")',
    "[p](https://example.org/a_(b))",
    "[not a link]",
    "[a](<https://example.org/x>)",
    "<https://example.org/y>",
    "[a [b](https://example.org/) c](no)",
    "- a\n- b",
    "* a\n* b",
    "1. a\n2. b",
    "3) c\n4) d",
    "- a\n  - b\n    - c\n- d",
    "1. a\n   - b\n   - c\n2. d",
    "- a\n\n- b",
    "- a\n\n  more\n- b",
    "- a\n- b\n\ntext",
    "- a\n\n\n- b",
    "- `x`\n- **y**",
    "1. one\n1. two",
    "- a\n+ b",
    "10. ten\n11. eleven",
    "-",
    "- a\nlazy",
    "> quote",
    "> a\n> b",
    "> a\n\n> b",
    "> # h\n> - l",
    "> lazy\ntext",
    "> > two",
    "> a\n> > b",
    "- > q",
    "```\ncode\n```",
    "```python\nx = 1\n```",
    "~~~\na\n~~~",
    "````\n```\n````",
    "```\nnot closed",
    "- a\n  ```\n  code\n  ```\n- b",
    "```\n\n```",
    "---",
    "***",
    "a\n\n---\n\nb",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "a | b\n--- | ---\n1 | 2\n\n3",
    "| a |\n|---|\n| x \\| y |",
    "| a | b |\n|:-:|--:|\n| 1 |",
    "| a |\n| b |",
    "a\n# h\nb",
    "a\n- b",
    "a\n```\nb\n```",
    "&amp; &lt; &copy; &#65; &#x42; &nothing;",
    "5 < 6 > 4",
    "<b>not bold</b>",
    "a  \nb",
    "!",
    "![",
    "[",
    "](",
    "**",
    "* *",
    "_ _",
    "a_b_ c",
    "**bold**text",
    '**"quoted"** x',
    "*(a)*b",
]
"""Texts that mean the same to both. Setext headings, indented code, HTML and reference links are left out on purpose: models
mean none of them when they write them."""


def test_as_markdown_it(open_page: Visit) -> None:
    differ = [(text, ours(open_page, text), theirs(text)) for text in SAME]
    assert [one for one in differ if one[1] != one[2]] == []


OWN = [
    ("$a_1 * b_2 * c$", '<p><span class="math">$a_1 * b_2 * c$</span></p>'),
    ("it is $5 and $6 *now*", "<p>it is $5 and $6 <em>now</em></p>"),
    ("\\(x_1\\) \\[y\\]", '<p><span class="math">\\(x_1\\)</span> <span class="math">\\[y\\]</span></p>'),
    ("$$\nx *y* z\n$$", '<p class="math">$$\nx *y* z\n$$</p>'),
    ("\\[\nx\n\\]", '<p class="math">\\[\nx\n\\]</p>'),
    ("$$ not closed", "<p>$$ not closed</p>"),
    (
        "see https://example.org/a_b_c.",
        r'<p>see <a href="https://example.org/a_b_c".*?>https://example.org/a_b_c</a>.</p>',
    ),
    ("(https://example.org/a)", r'<p>\(<a href="https://example.org/a".*?>https://example.org/a</a>\)</p>'),
    (
        "- [ ] a\n- [x] b",
        r'<ul><li class="task"><input type="checkbox".*?aria-label="to do"><div>a</div></li>.*aria-label="done".*</ul>',
    ),
    ("![alt](https://example.org/x.png)", r'<p><a class="picture" href="https://example.org/x.png".*?>.*alt</a></p>'),
    ("```diff\n+a\n-b\n```", r'.*<span class="add">\+a</span>\n<span class="remove">-b</span>.*'),
    ('```json\n{"a": 1}\n```', r'.*<span class="call">"a"</span>: <span class="number">1</span>.*'),
    ("", ""),
    ("\n\n", ""),
    ("a\u0000b", "<p>a\ufffdb</p>"),
]


@pytest.mark.parametrize(("text", "html"), OWN)
def test_own(open_page: Visit, text: str, html: str) -> None:
    got = open_page.page.evaluate(DRAW, text)
    assert got == html or re.fullmatch(html, got, re.S), got


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '<a href="javascript:alert(1)">x</a>',
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](file:///etc/passwd)",
    "[x](blob:https://x/1)",
    "[x](//evil.example)",
    "[x](/v1/models)",
    "[x](https:evil)",
    '[x](https://a" onmouseover="alert(1))',
    "[x](<javascript:alert(1)>)",
    "<javascript:alert(1)>",
    "![x](javascript:alert(1))",
    "![x](https://evil.example/?q=secret)",
    '![x" onerror="alert(1)](https://evil.example/)',
    'https://evil.example/"onmouseover="alert(1)',
    '```"><script>alert(1)</script>\nx\n```',
    "```html\n<script>alert(1)</script>\n```",
    "```js onload=alert(1)\nx\n```",
    "# <img src=x onerror=alert(1)>",
    "| <img src=x onerror=alert(1)> |\n|---|\n| <script>alert(1)</script> |",
    "- <script>alert(1)</script>",
    "`<img src=x onerror=alert(1)>`",
    "$<img src=x onerror=alert(1)>$",
    "$$\n<script>alert(1)</script>\n$$",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;img src=x onerror=alert(1)&#62;",
    "<math><mtext><style><img src=x onerror=alert(1)></style></mtext></math>",
    "<!--<img src=x onerror=alert(1)>-->",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=//evil.example>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0;url=//evil.example>",
    "<form action=//evil.example><button>x</button></form>",
    "</div></body><script>alert(1)</script>",
    "[a]: javascript:alert(1)\n\n[a]",
    "[x](https://user:pass@evil.example/)",
    "\u202ehttps://evil.example",
    "[__proto__](constructor)",
    "```__proto__\nx\n```",
    "```constructor\nx\n```",
]
ALLOWED = {
    "P",
    "H1",
    "BR",
    "HR",
    "A",
    "CODE",
    "PRE",
    "EM",
    "STRONG",
    "S",
    "UL",
    "OL",
    "LI",
    "BLOCKQUOTE",
    "TABLE",
    "THEAD",
    "TBODY",
    "TR",
    "TH",
    "TD",
    "DIV",
    "SPAN",
    "BUTTON",
    "INPUT",
    "svg",
    "path",
}


def test_hostile(visit: Visit) -> None:
    page = visit.open()
    page.evaluate("window.alerted = 0; window.alert = () => { window.alerted += 1; }; 0")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for text in [*HOSTILE, "\n\n".join(HOSTILE), "> " + "\n> ".join(HOSTILE)]:
        found = page.evaluate(
            """async (text) => {
                const { drawMarkdown } = await import('/web/js/markdown.js');
                const drawn = drawMarkdown(text);
                document.getElementById('log').replaceChildren(drawn);
                const all = [...drawn.querySelectorAll('*')];
                return {
                    tags: all.map((one) => one.tagName),
                    handlers: all.flatMap((one) => one.getAttributeNames().filter((name) => /^on|^style$|^src/.test(name))),
                    links: all.filter((one) => one.tagName === 'A').map((one) => one.href),
                };
            }""",
            text,
        )
        assert set(found["tags"]) <= ALLOWED, text
        assert found["handlers"] == [], text
        assert all(link.startswith(("https://", "http://", "mailto:")) for link in found["links"]), text
    page.wait_for_timeout(200)
    assert page.evaluate("window.alerted") == 0
    assert [url for url in asked if not url.startswith(visit.url)] == []


N = 100_000
SLOW = {
    "stars": "*" * N,
    "stars and letters": "*a" * (N // 2),
    "open emphasis": "*a **b " * (N // 7),
    "closed emphasis": "*a **b " * 2000 + "c** d* " * 2000,
    "brackets": "[" * N,
    "closing brackets": "]" * N,
    "link starts": "[a](" * (N // 4),
    "spaced link starts": ("[a](" + " " * 50) * (N // 54),
    "image starts": "![" * (N // 2),
    "nested links": "[" * 5000 + "a" + "](https://x.y/)" * 5000,
    "ticks": "".join("`" * (i % 400 + 1) + " " for i in range(500)),
    "tick pairs": "` `` " * (N // 5),
    "quotes": ">" * N,
    "quote lines": "> " * 50 + "a\n" + ("> " * 40 + "b\n") * 1000,
    "nested lists": "".join("  " * i + "- a\n" for i in range(400)),
    "markers": "- " * (N // 2),
    "table": "| a " * (N // 8) + "\n" + "|---" * (N // 8),
    "bars": ("|" * 100 + "\n") * (N // 100),
    "dashes": "-" * N,
    "hashes": "#" * N,
    "dollars": "$a " * (N // 3),
    "math": "\\(" * (N // 2),
    "addresses": "http://" * (N // 7),
    "parentheses": "https://x.y/" + ")" * N,
    "entities": "&#" * (N // 2),
    "angles": "<https://" * (N // 9),
    "fences": "```\n" * (N // 4),
    "lines": "a\n" * (N // 2),
    "backslashes": "\\" * N,
    "tildes": "~~a" * (N // 3),
    "underscores": "_a__" * (N // 4),
    "code": "```python\n" + "\"'" * 25_000 + "\n```",
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_texts_are_quick(open_page: Visit, name: str) -> None:
    began = time.monotonic()
    open_page.page.evaluate(
        "async (text) => (await import('/web/js/markdown.js')).drawMarkdown(text).childElementCount", SLOW[name]
    )
    assert time.monotonic() - began < SECONDS


def test_growing_is_the_same_as_whole(open_page: Visit) -> None:
    """Drawn piece by piece, with blocks that change their kind on the way, and drawn at once."""
    chance = random.Random(5)
    parts = [*SAME, *HOSTILE, "\n\n", "\n", " "]
    texts = ["\n".join(chance.choices(parts, k=8)) for _ in range(40)]
    same = open_page.page.evaluate(
        """async (texts) => {
            const { Drawing, drawMarkdown } = await import('/web/js/markdown.js');
            return texts.map((text) => {
                const drawing = new Drawing(document.createElement('div'));
                for (let end = 1; end < text.length; end += 3) drawing.update(text.slice(0, end));
                drawing.update(text);
                return drawing.element.innerHTML === drawMarkdown(text).innerHTML;
            });
        }""",
        texts,
    )
    assert [text for text, good in zip(texts, same, strict=True) if not good] == []


def test_highlighting_keeps_every_character(open_page: Visit) -> None:
    chance = random.Random(7)
    alphabet = "ab_0 1.\n\"'`/*#-+<>=(){}$\\é\u2028:"
    texts: list[Any] = ["".join(chance.choices(alphabet, k=200)) for _ in range(20)]
    languages = ["python", "js", "c", "bash", "sql", "html", "css", "yaml", "json", "diff", "none", "", "__proto__"]
    differ = open_page.page.evaluate(
        """async ([texts, languages]) => {
            const { highlight } = await import('/web/js/highlight.js');
            const whole = (text, one) => highlight(text, one).map((pair) => pair[1]).join('');
            return texts.flatMap((text) => languages.filter((one) => whole(text, one) !== text));
        }""",
        [texts, languages],
    )
    assert differ == []
