import json
import random
from pathlib import Path

import pytest

from herd.data.leakage import RUN, SHORT, Evaluation
from herd.data.words import words


def _evaluation(tmp_path: Path, *rows: dict) -> Evaluation:
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Evaluation([path])


LONG = "If a train leaves at nine and drives for three hours at sixty miles an hour how far does it go?"
EIGHT = "Name the three largest moons of the planet."


def test_runs_of_thirteen_words_leak_whatever_their_dress(tmp_path):
    found = _evaluation(tmp_path, {"question": LONG, "choices": ["x", "y"]}, {"question": EIGHT}, {"question": "Who?"})
    assert (len(found), found.unchecked, len(words(EIGHT))) == (3, 1, SHORT)
    part = " ".join(LONG.split()[2 : 2 + RUN])
    ((row, leak),) = found.leaks(f"Q: {part.upper().replace(' ', ',  ')}. So?")
    assert (row, leak.where, leak.runs) == (0, f"{tmp_path}/eval.jsonl:1", 1)
    assert leak.words == part
    assert found.leaks(" ".join(LONG.split()[2 : 1 + RUN])) == []
    assert found.leaks(LONG)[0][1].runs == len(words(LONG)) - RUN + 1
    assert [row for row, _ in found.leaks(f"{EIGHT} {LONG}")] == [0, 1]
    assert found.leaks(EIGHT.replace("three", "four")) == []
    assert found.leaks("") == []


def test_a_run_of_several_rows_leaks_all_of_them(tmp_path):
    found = _evaluation(tmp_path, {"a": {"b": [LONG]}}, {"c": LONG + " Say why."})
    assert sorted(row for row, _ in found.leaks(LONG)) == [0, 1]


def test_it_finds_what_a_search_for_substrings_finds(tmp_path):
    rng = random.Random(5)
    rows = [" ".join(rng.choice("abcd") for _ in range(rng.randint(3, 30))) for _ in range(60)]
    found = _evaluation(tmp_path, *({"text": row} for row in rows))
    for _ in range(200):
        text = " ".join(rng.choice("abcd") for _ in range(40))
        if rng.random() < 0.5:
            row = rng.choice(rows).split()
            at = rng.randrange(len(row))
            text = f"{text} {' '.join(row[at : at + rng.randint(1, 20)])}"
        expected = set()
        for i, row in enumerate(rows):
            said = row.split()
            n = min(len(said), RUN)
            if n >= SHORT and any(f" {' '.join(said[k : k + n])} " in f" {text} " for k in range(len(said) - n + 1)):
                expected.add(i)
        assert {row for row, _ in found.leaks(text)} == expected


def test_an_evaluation_without_texts(tmp_path):
    found = _evaluation(tmp_path, {"n": 1})
    assert found.unchecked == 1
    assert found.leaks(LONG) == []


@pytest.mark.parametrize("damage", ["not json\n"])
def test_bad_rows_of_an_evaluation_are_counted(tmp_path, damage):
    path = tmp_path / "eval.jsonl"
    path.write_text(damage + json.dumps({"q": LONG}) + "\n")
    found = Evaluation([path])
    assert (len(found), found.report.bad_count) == (1, 1)
    assert found.leaks(LONG)[0][1].where.endswith(":2")
