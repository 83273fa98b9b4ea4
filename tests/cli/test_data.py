import gzip
import json
import subprocess
import sys

import pytest

from herd.cli.data import COMMANDS
from herd.cli.data_files import KIND_NAMES
from herd.cli.main import run
from herd.data.adapt import KINDS

LONG = "if a train leaves at nine and drives for three hours how far does it go then"
HEAVY = ("torch", "numpy", "rich", "pyarrow", "tiktoken", "regex")


def _chat(question, reply="Tom is a cat."):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}],
        "n": len(question),
    }


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [_chat("Name a cat."), _chat("Who is Tom?"), _chat("Name a cat."), _chat(LONG), _chat("Bye.", "")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_kinds_of_the_options_are_those_of_the_reader():
    assert KIND_NAMES == KINDS


@pytest.mark.parametrize("name", ["lint", "dedup", "filter"])
def test_help_has_examples_and_imports_nothing_heavy(name):
    code = (
        f"import sys; from herd.cli.main import run; run(['data', {name!r}, '--help']); "
        f"sys.exit([m for m in {HEAVY!r} if m in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"herd data {name}" in done.stdout
    assert "Examples" in done.stdout


def test_the_group_lists_its_commands_and_suggests(capsys):
    assert run(["data", "--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name}" in out
        assert summary in out
    assert run(["data", "lnt"]) == 2
    assert "did you mean lint?" in capsys.readouterr().err


def test_lint_says_that_nothing_trains_on_preferences_and_prompts_alone(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    for row, kind in (({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"), ({"prompt": "a"}, "prompt")):
        path.write_text(json.dumps(row) + "\n")
        assert run(["data", "lint", str(path)]) == 0
        assert f"no recipe trains on {kind} rows yet" in capsys.readouterr().out


def test_texts_that_a_template_has_written_are_told(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "<|im_start|>user\nHi<|im_end|>"}) + "\n")
    assert run(["data", "lint", str(path)]) == 0
    out = capsys.readouterr().out
    assert "<|im_end|>, <|im_start|> in 1 row: read as letters, never as tokens" in out
    assert run(["data", "lint", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["marks"]["rows"] == [f"{path}:1"]


def test_a_far_outlier_does_not_make_a_page_of_empty_lengths(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * size}) + "\n" for size in (3, 3, 20_000)))
    assert run(["data", "lint", str(path)]) == 0
    shown = capsys.readouterr().out.partition("Words")[2].partition("Languages")[0].splitlines()[1:]
    assert [line.split()[0] for line in shown] == ["3-4", "5-8", "...", "8,193-16,384", "16,385-32,768"]


@pytest.mark.parametrize("group", ["data", "tokenizer"])
def test_a_group_alone_shows_its_help_in_lines(group, capsys):
    assert run([group, "--help"]) == 0
    shown = capsys.readouterr().out
    assert run([group]) == 2
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", shown.strip())


def test_lint_without_a_model(chats, capsys):
    assert run(["data", "lint", str(chats)]) == 1
    out, err = capsys.readouterr()
    assert "read as messages" in err
    assert "4 good (4 chat), 1 bad" in out
    assert f"{chats}:5: message 1 (assistant) has no text" in out
    assert f"{chats}:3 says what {chats}:1 says" in out
    assert "[[Tom is a cat.]]" in out
    assert "Not ready to train on: bad rows: 1." in out


def test_lint_with_a_model(chats, tmp_path, capsys):
    test = tmp_path / "test.jsonl.gz"
    test.write_bytes(gzip.compress(json.dumps({"q": LONG}).encode()))
    line = ["data", "lint", str(chats), "--model", "nano", "--length", "20", "--against", str(test)]
    assert run(line) == 1
    out = capsys.readouterr().out
    assert "<|start_header_id|>user<|end_header_id|>" in out
    assert "[[Tom is a cat.<|eot_id|>]]" in out
    assert "<- --length 20" in out
    assert f'{chats}:4 and {test}:1 (5 runs): "if a train' in out
    assert run([*line, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 4
    assert facts["bad"]["rows"] == [f"{chats}:5: message 1 (assistant) has no text"]
    assert facts["duplicates"] == [{"row": f"{chats}:3", "of": f"{chats}:1", "exact": True, "similarity": 1.0}]
    assert facts["leaks"]["rows"][0]["of"] == f"{test}:1"
    assert 0 < facts["learned"] < facts["length"]["sum"]


def test_lint_names_rows_longer_than_the_context_of_the_model(tmp_path, capsys):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(_chat(text)) + "\n" for text in ("Hi.", "long " * 600)))
    assert run(["data", "lint", str(path), "--model", "nano"]) == 0
    out = capsys.readouterr().out
    assert f"Too long  1 row longer than the context of nano, 512\n  {path}:2: " in out
    assert "training stops at rows that do not fit" in out
    (tmp_path / "tale.txt").write_text("long " * 600)
    assert run(["data", "lint", str(tmp_path / "tale.txt"), "--model", "nano"]) == 0
    assert "Too long" not in capsys.readouterr().out  # training cuts texts where rows end


def test_lint_of_several_paths_reports_each(chats, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time there was a cat.\n")
    assert run(["data", "lint", str(text), str(chats)]) == 1
    out = capsys.readouterr().out
    assert out.index("Nothing stands against") < out.index(f"{chats}:5: message 1") < out.index("Not ready to train on")
    assert run(["data", "lint", str(text), str(chats), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert {path: one["rows"] for path, one in facts.items()} == {str(text): 1, str(chats): 4}


def test_lint_of_a_good_file_is_zero(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("Once upon a time there was a cat.\n")
    assert run(["data", "lint", str(path), "--model", "nano"]) == 0
    assert "Nothing stands against" in capsys.readouterr().out
    assert run(["data", "lint", str(tmp_path / "none.jsonl")]) == 1
    assert "no such data file" in capsys.readouterr().err
    assert run(["data", "lint", str(path), "--format", "llama3"]) == 2


def test_lint_of_chats_for_a_base_model_asks_for_a_format(chats, capsys):
    assert run(["data", "lint", str(chats), "--model", "nano", "--format", "base"]) == 2
    assert f"{chats}:1: conversations need a prompt format, and nano has none" in capsys.readouterr().err


def test_dedup_keeps_the_first_and_every_field(chats, tmp_path, capsys):
    out, report = tmp_path / "out.jsonl.gz", tmp_path / "report.json"
    assert run(["data", "dedup", str(chats), str(out)]) == 1
    assert f"{chats}:5: message 1" in capsys.readouterr().err
    assert not out.exists()
    assert run(["data", "dedup", str(chats), str(out), "--bad", "skip", "--report", str(report)]) == 0
    assert "3 of 4 rows kept: 1 exact and 0 near duplicates left out, 1 bad rows" in capsys.readouterr().out
    rows = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    assert rows == [_chat("Name a cat."), _chat("Who is Tom?"), _chat(LONG)]
    named = json.loads(report.read_text())
    assert named["removed"] == [{"row": f"{chats}:3", "of": f"{chats}:1", "exact": True, "similarity": 1.0}]
    assert len(named["bad_rows"]) == 1
    before = out.read_bytes()
    assert run(["data", "dedup", str(chats), str(out), "--bad", "skip"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run(["data", "dedup", str(chats), str(out), "--bad", "skip", "--overwrite"]) == 0
    assert out.read_bytes() == before
    assert run(["data", "dedup", str(chats), str(tmp_path / "out.txt")]) == 1
    assert run(["data", "dedup", str(chats), str(chats), "--overwrite", "--bad", "skip"]) == 1
    assert "source" in capsys.readouterr().err


def test_filter_by_rules_language_and_leakage(tmp_path, capsys):
    path, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    english = "It was the best of times and they had all of it before them, for that is how they were with each other."
    german = "Es war einmal ein König, der hatte eine Tochter, und sie war so schön wie die Sonne."
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (english, german, LONG, "The of and have.")))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"q": LONG}) + "\n")
    line = ["data", "filter", str(path), str(out), "--overwrite", "--json"]
    assert run([*line, "--language", "en", "--tag", "lang"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"language de": 1}
    assert json.loads(out.read_text().splitlines()[0]) == {"text": english, "lang": "en"}
    assert run([*line, "--against", str(test), "--report", str(tmp_path / "r.json")]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"leakage": 1}
    assert json.loads((tmp_path / "r.json").read_text())["removed"][0]["of"] == f"{test}:1"
    assert run([*line, "--rules", "gopher", "--set", "min_words=15"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"stop-words": 2, "words": 1}
    test.write_text("not json\n" + test.read_text())
    assert run([*line, "--against", str(test)]) == 0
    assert f"1 evaluation rows cannot be read and were not checked: {test}:1: not JSON" in capsys.readouterr().err
    assert run([*line, "--tag", "text"]) == 1
    assert "there is a field 'text' already: give --tag another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "nothing to filter by"),
        (["--set", "min_words=1"], "--set changes the bounds of --rules"),
        (["--rules", "gopher", "--set", "words=1"], "the bounds are min_words"),
        (["--rules", "gopher", "--set", "min_words=few"], "is no number"),
        (["--language", "xx"], "the tags are en"),
        (["--rules", "nice"], "there is no group of rules 'nice'"),
        (["--rules", "gopher"], "quality rules are for texts"),
    ],
)
def test_filters_that_make_no_sense(chats, tmp_path, capsys, more, words):
    assert run(["data", "filter", str(chats), str(tmp_path / "x.jsonl"), *more]) in (1, 2)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_many_files_are_named_in_few_lines(tmp_path, capsys):
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text(f"Once there was a cat with {i} lives.")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"text": "A row."}))
    assert run(["data", "lint", str(tmp_path)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/00.txt: read as text" in told
    assert f"and 36 more files, to {tmp_path}/chats.jsonl: read as text" in told
    assert len(told) == 6


def test_a_threshold_without_near_duplicates_is_refused(tmp_path, capsys):
    assert run(["data", "dedup", str(tmp_path), str(tmp_path / "o.jsonl"), "--exact", "--threshold", "0.8"]) == 2
    assert "--threshold is about near duplicates, which --exact leaves in" in capsys.readouterr().err
