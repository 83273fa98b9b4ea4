"""Foreign chat templates: nothing gets out, nothing takes long, and honest ones render as in transformers."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest

import herd
from herd.chat.formats import FORMATS
from herd.chat.sandbox import MAX_SOURCE, VARIABLES, WALL_SECONDS, Outcome, Sandbox
from herd.chat.templates import template_of
from herd.errors import PromptError
from tests.chat.conversations import PLAIN, WITH_TOOLS
from tests.chat.template_attacks import ESCAPES, EXHAUSTING
from tests.chat.test_templates import WEATHER, as_dict, written

CANARY = Path("/tmp/herd-canary")
LEAKS = (
    "<class",
    "<function",
    "<built-in",
    "<module",
    "object at 0x",
    "PWNED",
    "root:",
    "mappingproxy",
    "__globals__':",
)
SPARE = 0.35
"""Seconds beyond the wall limit that killing and noticing may take on a busy machine."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


@pytest.fixture(scope="module")
def patient() -> Iterator[Sandbox]:
    """For honest templates: a busy machine must not fail the test."""
    with Sandbox(wall_seconds=20) as opened:
        yield opened


@pytest.fixture(scope="module")
def kept() -> Iterator[Callable[..., Outcome]]:
    """Outcomes of the process itself, one for all templates: a sandbox starts another one after each refusal."""
    with Sandbox() as opened:

        def run(source: str, seconds: float = WALL_SECONDS) -> Outcome:
            if len(source) > MAX_SOURCE:
                return opened.run(source, given())
            request = {"source": source, "variables": given(), "now": [2026, 11, 21, 12, 0, 0]}
            reply = opened._exchange(json.dumps(request).encode(), seconds)
            if reply is None:
                opened._stop()  # as after every template that was stopped: it may not be dead yet
                return Outcome("stopped")
            return Outcome(reply["kind"], str(reply.get("text", "")))

        yield run


def given(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "bos_token": "<s>", "add_generation_prompt": True, **more}


def test_there_are_enough_attacks() -> None:
    assert len(set(ESCAPES)) >= 60


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_escapes(kept: Callable[..., Outcome], source: str) -> None:
    outcome = kept(source)
    assert outcome.kind != "stopped"
    assert not any(leak in outcome.text for leak in LEAKS), outcome
    assert not CANARY.exists()


@pytest.mark.parametrize("name", EXHAUSTING)
def test_nothing_takes_long(kept: Callable[..., Outcome], name: str) -> None:
    assert kept("warm", seconds=20).text == "warm"  # start-up is not the template's time
    before = time.monotonic()
    outcome = kept(EXHAUSTING[name])
    took = time.monotonic() - before
    assert took < WALL_SECONDS + SPARE
    if name not in ("many tags", "open comment", "long sum", "many macros"):
        assert outcome.kind in ("refused", "stopped", "broken", "failed") or len(outcome.text) < 100, outcome


def test_memory_is_bounded() -> None:
    """The child cannot map more than its limit, whatever it is asked to compute."""
    with Sandbox(wall_seconds=5) as sandbox:
        sandbox.run("warm", given())
        if "memory" not in sandbox.limits:
            pytest.skip("this system has no limit on memory")
        process = sandbox._process
        assert process is not None
        peaks = []
        grow = "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
        done = threading.Event()

        def watch() -> None:
            status = Path(f"/proc/{process.pid}/status")
            with contextlib.suppress(OSError):  # the process has ended
                while not done.is_set():
                    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
                    peaks.extend(int(line.split()[1]) for line in lines)
                    time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        outcome = sandbox.run(grow, given())
        done.set()
        watcher.join()
        assert outcome.kind == "refused"
        assert "memory" in outcome.message
        assert max(peaks) < 256 * 1024  # KiB


def test_an_event_loop_stays_responsive() -> None:
    async def attack(sandbox: Sandbox) -> list[Outcome]:
        sources = [EXHAUSTING[name] for name in ("nested loops", "tower", "doubling by join", "recursive macro")]
        return [await asyncio.to_thread(sandbox.run, source, given()) for source in sources]

    async def main() -> list[float]:
        late = []
        with Sandbox() as sandbox:
            task = asyncio.create_task(attack(sandbox))
            while not task.done():
                before = time.monotonic()
                await asyncio.sleep(0.005)
                late.append(time.monotonic() - before - 0.005)
            assert all(outcome.kind in ("refused", "stopped") for outcome in task.result())
        return sorted(late)

    late = asyncio.run(main())
    assert len(late) > 50
    assert late[int(len(late) * 0.99)] < 0.05


def test_a_stopped_process_is_replaced(sandbox: Sandbox) -> None:
    assert sandbox.run(EXHAUSTING["nested loops"], given()).kind == "stopped"
    assert sandbox.run("{{ bos_token }}", given()).text == "<s>"


def test_a_process_that_met_an_attack_is_replaced(sandbox: Sandbox) -> None:
    assert sandbox.run("x", given()).text == "x"
    process = sandbox._process
    assert sandbox.run(ESCAPES[0], given()).kind == "refused"
    assert sandbox.run("x", given()).text == "x"
    assert sandbox._process is not process


def test_one_process_serves_many(patient: Sandbox) -> None:
    patient.run("a", given())
    process = patient._process
    for i in range(50):
        assert patient.run("{{ messages[0].content }}" + str(i), given()).text == f"hi{i}"
    assert patient._process is process


def test_threads_take_turns(patient: Sandbox) -> None:
    found: list[str] = []

    def ask(i: int) -> None:
        found.append(patient.run("{{ messages[0].content }}", {"messages": [{"content": str(i)}]}).text)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=int) == [str(i) for i in range(20)]


@pytest.mark.parametrize(
    ("source", "kind", "line", "said"),
    [
        ("a\n{{ 2 ** 3 }}", "refused", 2, "Pow"),
        ("\n\n{% include 'x' %}", "refused", 3, "Include"),
        ("{{ 1\n| attr('x') }}", "refused", 2, "filter 'attr'"),
        ("a\n{{ x.__init__ }}", "refused", 2, "attribute '__init__'"),
        ("a\n{% if %}", "broken", 2, "Expected an expression"),
        ("a\nb\n{{ raise_exception('no system') }}", "raised", 3, "no system"),
        ("a\n{{ nothing.here.there }}", "failed", 2, "UndefinedError"),
        ("{{ 1 / 0 }}", "failed", 1, "ZeroDivisionError"),
        ("{{ messages|fantasy }}", "refused", 1, "filter 'fantasy'"),
    ],
)
def test_an_outcome_says_what_and_where(patient: Sandbox, source: str, kind: str, line: int, said: str) -> None:
    outcome = patient.run(source, given())
    assert (outcome.kind, outcome.line) == (kind, line)
    assert said in outcome.explain()
    assert f"line {line}: " in outcome.explain()
    with pytest.raises(PromptError, match=f"line {line}: "):
        patient.render(source, given())


def test_check_runs_nothing(patient: Sandbox) -> None:
    assert patient.check("{{ raise_exception('x') }}") == Outcome("text")
    assert patient.check("{{ 2 ** 3 }}").kind == "refused"
    assert patient.check("{{").kind == "broken"


def test_only_known_names_and_json(patient: Sandbox) -> None:
    assert {"messages", "tools", "date_string", "bos_token"} <= VARIABLES
    for name in ("tokenize", "chat_template", "environment", "__builtins__"):
        with pytest.raises(PromptError, match=name):
            patient.run("x", {name: 1})
    with pytest.raises(PromptError, match="JSON values"):
        patient.run("x", {"messages": [object()]})
    assert len(EXHAUSTING["too long"]) > MAX_SOURCE


def test_lone_surrogates_and_long_texts_travel(patient: Sandbox) -> None:
    for text in ("\ud800", "é🙂\x00\x1b[0m", "x" * 3_000_000):
        assert patient.run("{{ bos_token }}", {"bos_token": text}).text == text


def test_the_tags_and_functions_of_transformers(patient: Sandbox) -> None:
    source = (
        "{% for m in [1, 2, 3, 4] %}{% if m == 2 %}{% continue %}{% endif %}{% if m == 4 %}{% break %}{% endif %}{{ m }}"
        "{% endfor %}{% generation %}[{{ bos_token }}]{% endgeneration %}{{ strftime_now('%d %b %Y') }}"
        "{{ {'é': ['<', None, 1.5]} | tojson }}{{ dict(a=1).a }}{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    )
    moment = datetime(2026, 11, 21)
    text = patient.render(source, {"bos_token": "B"}, now=moment)
    assert text == '13[B]21 Nov 2026{"é": ["<", null, 1.5]}12'


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "base"])
def test_our_templates_render_as_in_transformers(patient: Sandbox, name: str) -> None:
    old = name in ("llama2", "codellama", "codellama-70b", "llama-guard-1")
    variables = {
        "bos_token": "<s>" if old else "<|begin_of_text|>",
        "eos_token": "</s>" if old else "<|end_of_text|>",
        "add_generation_prompt": True,
        "documents": None,
    }
    texts = 0
    for conversation in (PLAIN + WITH_TOOLS)[::3]:
        items = [as_dict(message) for message in conversation]
        for tools in ([], [WEATHER]) if name.startswith(("llama3.", "llama4")) else ([],):
            outcome = patient.run(template_of(name) or "", {"messages": items, "tools": tools or None, **variables})
            try:
                expected = Outcome("text", written(name, items, tools))
            except jinja2.exceptions.TemplateError as error:
                expected = Outcome("raised", message=str(error), line=outcome.line)
            assert outcome == expected
            texts += outcome.kind == "text"
    assert texts > 5


def test_llama4s_published_template_renders_as_in_transformers(patient: Sandbox) -> None:
    from tests.chat.test_llama4_template import template, theirs

    texts = 0
    for conversation in PLAIN + WITH_TOOLS:
        variables = {
            "messages": [as_dict(message) | {"stop_reason": None} for message in conversation],
            "tools": [WEATHER],
            "documents": None,
            "add_generation_prompt": True,
            "bos_token": "<|begin_of_text|>",
        }
        outcome = patient.run(template(), variables)
        try:
            expected = Outcome("text", theirs(conversation, [WEATHER]))
        except jinja2.exceptions.TemplateError as error:
            expected = Outcome("raised", message=str(error), line=outcome.line)
        assert outcome == expected
        texts += outcome.kind == "text"
    assert texts > 50


def test_a_process_behind_the_sandbox_can_do_nothing(tmp_path: Path) -> None:
    """What the limits hold back when a template does get out: every way to reach files, programs and the network."""
    child = Path(herd.__file__).parent / "chat" / "jinja_child.py"
    canary = tmp_path / "canary"
    script = f"""
import importlib.util, os, socket, subprocess, _posixsubprocess, sys
spec = importlib.util.spec_from_file_location("child", {str(child)!r})
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
ways = [
    lambda: open({str(canary)!r}, "w"), lambda: os.open("/etc/passwd", os.O_RDONLY), lambda: os.mkdir({str(canary)!r}),
    lambda: os.symlink("a", {str(canary)!r}), lambda: socket.socket(), lambda: os.fork(), lambda: os.pipe(),
    lambda: os.execv("/bin/sh", ["sh", "-c", "touch {canary}"]), lambda: os.kill(os.getppid(), 0),
    lambda: os.system("touch {canary}"), lambda: subprocess.run(["touch", {str(canary)!r}], check=True),
    lambda: os.unlink({str(child)!r}), lambda: os.chmod({str(tmp_path)!r}, 0),
    lambda: [bytearray(2**20) for i in range(300)],
]
limits = child.limit()
done = []
for i, way in enumerate(ways):
    try:
        answer = way()
        if answer not in (None, -1, 127 << 8): done.append(i)
        if answer is None and i not in (9,): done.append(i)
    except (OSError, MemoryError):
        pass
os.write(1, (" ".join(limits) + "|" + repr(done)).encode())
os._exit(0)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    limits, _, done = run.stdout.partition("|")
    if "system calls" not in limits:
        pytest.skip(f"this system has only these limits: {limits or 'none'}")
    assert done == "[]", run.stderr
    assert not canary.exists()


def test_templates_are_compiled_in_one_place_only() -> None:
    """No module of herd imports jinja2 but the child program, which nothing imports, and it makes one environment."""
    package = Path(herd.__file__).parent
    environments = 0
    for path in package.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if not re.search("jinja|Environment|Template", source):
            continue
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            if path.name != "jinja_child.py":
                assert not any(name.split(".")[0] == "jinja2" or "jinja_child" in name for name in names), path
            called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
            if called in ("Environment", "SandboxedEnvironment", "ImmutableSandboxedEnvironment", "Template"):
                assert path.name == "jinja_child.py", path
                environments += 1
    assert environments == 1


def test_lookalikes_of_released_templates(patient: Sandbox) -> None:
    """Ways of writing that released Llama templates use: slices, filters in conditions, set across loops, tojson(indent)."""
    source = (
        "{{- bos_token }}\n{%- if custom_tools is defined %}\n    {%- set tools = custom_tools %}\n{%- endif %}\n"
        "{%- if not tools_in_user_message is defined %}\n    {%- set tools_in_user_message = true %}\n{%- endif %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
        "{{- builtin_tools | reject('equalto', 'code_interpreter') | join(', ') + '\\n' }}\n"
        "{%- for message in messages %}\n    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}\n"
        "        {{- '[' + message['role'] + ']' + message['content'] | trim }}\n    {%- elif 'tool_calls' in message %}\n"
        "        {%- if not message.tool_calls|length == 1 %}\n            {{- raise_exception('one') }}\n        {%- endif %}\n"
        "        {%- for arg_name, arg_val in message.tool_calls[0].function.arguments | items %}\n"
        "            {{- arg_name + '=\"' + arg_val + '\"' }}\n            {%- if not loop.last %}, {% endif %}\n"
        "        {%- endfor %}\n    {%- endif %}\n{%- endfor %}\n{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}"
    )
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"function": {"name": "f", "arguments": {"a": "1", "b": "2"}}}
    messages = [
        {"role": "system", "content": " s "},
        {"role": "user", "content": " u "},
        {"role": "assistant", "tool_calls": [call]},
    ]
    more = {"bos_token": "B", "builtin_tools": ["brave_search", "code_interpreter"], "tools_in_user_message": False}
    theirs, _ = render_jinja_template(conversations=[messages], tools=[WEATHER], chat_template=source, **more)
    variables = {"messages": messages, "tools": [WEATHER], "documents": None, "add_generation_prompt": False, **more}
    assert patient.run(source, variables).text == theirs[0]
