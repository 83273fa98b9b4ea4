"""Models by a name of one's own: made, listed, shown, used, copied and deleted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import herd
from herd.checkpoint.load import open_checkpoint
from herd.cli.main import run
from herd.hub.created import Created, find, manifest_of, save

Captured = pytest.CaptureFixture[str]

TEXT = """\
FROM {base}
PARAMETER temperature 0
PARAMETER num_ctx 200
PARAMETER num_predict 4
SYSTEM Be brief.
MESSAGE user Hello
MESSAGE assistant Hi
LICENSE Apache
"""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piped: Callable[[str], None]) -> Path:
    piped("")
    monkeypatch.setenv("HERD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "home"


def create(tmp_path: Path, text: str, *options: str, name: str = "mine") -> int:
    (tmp_path / "Modelfile").write_text(text)
    return run(["create", name, "-f", str(tmp_path / "Modelfile"), *options])


def test_a_life(tmp_path: Path, chat_model: str, capsys: Captured) -> None:
    assert create(tmp_path, TEXT.format(base=chat_model)) == 0
    assert run(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert [one["name"] for one in listed if one["where"] == "created"] == ["mine:latest"]
    assert run(["run", "mine", "Who?", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["usage"]["completion_tokens"], said["finish_reason"]) == (4, "length")
    assert run(["cp", "mine", "mine:old"]) == 0
    assert run(["rm", "mine", "--yes"]) == 0
    assert find("mine") is None
    assert find("mine:old") is not None
    assert run(["run", "mine", "Who?"]) == 1
    assert run(["rm", "mine:old", "--yes"]) == 0
    assert Path(chat_model).is_dir()


def test_what_it_says_reaches_the_model(tmp_path: Path, chat_model: str, capsys: Captured) -> None:
    assert create(tmp_path, TEXT.format(base=chat_model)) == 0
    capsys.readouterr()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    messages += [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Who?"}]
    (tmp_path / "talk.json").write_text(json.dumps(messages))
    assert run(["run", "mine", "Who?", "--json"]) == 0
    by_name = json.loads(capsys.readouterr().out)
    assert run(["run", chat_model, "--messages", str(tmp_path / "talk.json"), "--temp", "0", "-n", "4", "--json"]) == 0
    by_hand = json.loads(capsys.readouterr().out)
    assert (by_name["text"], by_name["usage"]) == (by_hand["text"], by_hand["usage"])
    assert run(["run", "mine", "Who?", "-n", "2", "--system", "Other.", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["usage"]["completion_tokens"] == 2
    assert open_checkpoint("mine").defaults.params().temperature == 0
    with herd.LLM("mine") as llm:
        assert llm.params().max_tokens == 4


def test_parts_are_shown(tmp_path: Path, chat_model: str, capsys: Captured) -> None:
    text = TEXT.format(base=chat_model)
    assert create(tmp_path, text) == 0
    for part, words in (
        ("modelfile", text.rstrip()),
        ("system", "Be brief."),
        ("license", "Apache"),
        ("parameters", "context              200"),
    ):
        capsys.readouterr()
        assert run(["show", "mine", f"--{part}"]) == 0
        assert words in capsys.readouterr().out
    assert run(["show", chat_model, "--system"]) == 1
    assert run(["show", "mine"]) == 0


def test_one_on_top_of_another(tmp_path: Path, chat_model: str) -> None:
    assert create(tmp_path, TEXT.format(base=chat_model)) == 0
    assert create(tmp_path, "FROM mine\nPARAMETER top_k 3\nSYSTEM Be long.", name="other") == 0
    other = find("other")
    assert other is not None
    assert other.params == {"temperature": 0.0, "max_tokens": 4, "top_k": 3}
    assert (other.system, other.context, other.base) == ("Be long.", 200, str(Path(chat_model).resolve()))


def test_weights_of_its_own(tmp_path: Path, chat_model: str, capsys: Captured, own_home: Path) -> None:
    assert create(tmp_path, f"FROM {chat_model}", "-q", "q8_0") == 0
    assert (own_home / "models/mine/latest.gguf").is_file()
    assert run(["cp", "mine", "copy"]) == 0
    assert run(["rm", "mine", "--yes"]) == 0
    assert not (own_home / "models/mine").exists()
    assert run(["run", "copy", "Hi", "-n", "2"]) == 0
    assert run(["rm", "copy", "--yes", "--json"]) == 0
    assert not list((own_home / "models").iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("FROM absent-model", "absent-model"),
        ("FROM {base}\nPARAMETER num_ctx 100000", "100,000"),
        ("FROM {base}\nPARAMETER temperature -1", "temperature"),
        ("FROM {base}\nADAPTER nowhere", "ADAPTER"),
        ("FROM {base}\nTEMPLATE llama9", "name a format"),
        ('FROM {base}\nTEMPLATE """{{{{ .System }}}} {{{{ .Prompt }}}}"""', "Go template of no Llama"),
        ('FROM {base}\nTEMPLATE """{{% for m in messages %}}<|start_header_id|>{{{{ m }}}}{{% endfor %}}"""', "other prompts"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, chat_model: str, capsys: Captured, text: str, words: str) -> None:
    assert create(tmp_path, text.format(base=chat_model)) == 1
    assert words in capsys.readouterr().err
    assert find("mine") is None


def test_names(tmp_path: Path, chat_model: str, capsys: Captured) -> None:
    for name in ("../up", "a/b", "nano", "llama3.2:1b", "", "x" * 200):
        assert create(tmp_path, f"FROM {chat_model}", name=name) == 1, name
    assert create(tmp_path, f"FROM {chat_model}") == 0
    assert create(tmp_path, f"FROM {chat_model}") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert create(tmp_path, f"FROM {chat_model}", "--overwrite") == 0


def test_a_go_template_is_recognised_and_said(tmp_path: Path, chat_model: str, capsys: Captured) -> None:
    text = 'FROM {}\nTEMPLATE """{{{{ if .System }}}}<|start_header_id|>{{{{ end }}}}"""'
    assert create(tmp_path, text.format(chat_model)) in (0, 1)  # this vocabulary may be of another family
    assert "not executed" in capsys.readouterr().err


def test_damaged_manifests_and_bases_that_went(tmp_path: Path, capsys: Captured, own_home: Path) -> None:
    save(Created("gone:latest", str(tmp_path / "gone")))
    bad = manifest_of("bad")
    bad.parent.mkdir(parents=True)
    for content in ("{", "{}", '{"schema": "herd.model/1", "name": 3}', "[" * 10_000):
        bad.write_text(content)
        assert run(["run", "bad", "Hi"]) == 1
        assert run(["list"]) == 0
        said = capsys.readouterr().err
        assert "bad" in said
        assert "bug" not in said
    assert run(["run", "gone", "Hi"]) == 1
    assert "which is gone" in capsys.readouterr().err
