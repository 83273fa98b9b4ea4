"""`herd lint-template`: what it finds, how it is shown, and the exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from herd.chat.lint_cases import CASES
from herd.chat.templates import template_of
from herd.cli.main import run
from tests.chat.test_lint import GOOD

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def jinja(tmp_path: Path) -> Path:
    """A template with two mistakes: the first token is written twice, and contents are kept as they are."""
    path = tmp_path / "broken.jinja"
    path.write_text(GOOD.replace("{{- bos_token }}", "{{- bos_token + bos_token }}"))
    return path


def test_the_shipped_model_is_clean(capsys: Captured) -> None:
    assert run(["lint-template", "nano"]) == 0
    out = " ".join(capsys.readouterr()[0].split())
    assert f"{len(CASES)} of {len(CASES)} cases are the same as llama3" in out
    assert "the template follows Meta's way of writing" in out
    assert "Same text, other ids" in out


def test_differences_are_shown_with_signs_and_meanings(jinja: Path, capsys: Captured) -> None:
    assert run(["lint-template", str(jinja)]) == 1
    out, _ = capsys.readouterr()
    assert re.search(r"one question +different +double-bos", out)
    assert "- <|begin_of_text|><|start_header_id|>user<|end_header_id|>↵" in out
    assert "+ <|begin_of_text|><|begin_of_text|><|start_header_id|>user<|end_header_id|>↵" in out
    assert "What it means\n  double-bos (" in out
    assert "\x1b" not in out
    assert re.search(r"\d+ more cases differ; --all shows them", out)
    assert run(["lint-template", str(jinja), "--all"]) == 1
    longer, _ = capsys.readouterr()
    assert "more cases differ" not in longer
    assert len(longer) > 2 * len(out)
    assert all(case.name in longer for case in CASES)


def test_white_space_is_visible(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "x.jinja"
    path.write_text(GOOD)
    assert run(["lint-template", str(path), "--format", "llama3", "--all"]) == 1
    out, _ = capsys.readouterr()
    assert "- ··↵\n" in out
    assert "- ·Hi.·↵\n" in out
    assert "+ Hi.<|eot_id|>" in out


def test_json_has_everything(jinja: Path, capsys: Captured) -> None:
    assert run(["lint-template", str(jinja), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["format"] == "llama3-hf"
    assert set(answer["passed"]) == {"llama3", "llama3-hf"}
    assert len(answer["cases"]) == len(CASES)
    first = answer["cases"][0]
    assert first["status"] == "different"
    assert first["reasons"] == ["double-bos"]
    assert first["template"] == "<|begin_of_text|>" + first["herd"]
    assert "double-bos" in answer["meanings"]
    assert answer["refused"] is None
    assert run(["lint-template", "nano", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_a_hostile_template_is_a_finding(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "hostile.jinja"
    path.write_text("<|start_header_id|>\n{{ ''.__class__.__mro__[1].__subclasses__() }}\x1b[31m")
    assert run(["lint-template", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "The template is refused" in out
    assert "line 2: attribute '__subclasses__'" in out or "line 2: attribute '__class__'" in out
    assert not err
    assert run(["lint-template", str(path), "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)["refused"]
    assert refused["kind"] == "refused"
    assert refused["line"] == 2


def test_settings_files_folders_and_what_has_no_template(tmp_path: Path, capsys: Captured) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps(
            {
                "chat_template": [
                    {"name": "tool_use", "template": "x"},
                    {"name": "default", "template": template_of("llama4")},
                ]
            }
        )
    )
    assert run(["lint-template", str(config)]) == 0
    assert "the same as llama4" in capsys.readouterr().out
    assert run(["lint-template", str(tmp_path)]) == 0  # the folder has no vocabulary: texts are compared
    capsys.readouterr()
    config.write_text("{}")
    assert run(["lint-template", str(config)]) == 1
    assert "has no chat_template" in capsys.readouterr().err
    assert run(["lint-template", str(tmp_path)]) == 1
    assert "it has no chat template" in capsys.readouterr().err


def test_mistakes_of_the_user(jinja: Path, capsys: Captured) -> None:
    assert run(["lint-template", str(jinja), "--format", "llama9"]) == 1
    assert "llama9" in capsys.readouterr().err
    assert run(["lint-template", "./no-such.jinja"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert run(["lint-template"]) == 2


def test_help_and_linting_import_no_torch_and_no_jinja(jinja: Path) -> None:
    code = (
        "import sys; from herd.cli.main import run; "
        f"status = run(['lint-template', {str(jinja)!r}]); "
        "loaded = [name for name in ('torch', 'jinja2', 'numpy') if name in sys.modules]; "
        "print(status, loaded, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().endswith("1 []")
