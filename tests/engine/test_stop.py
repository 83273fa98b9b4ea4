"""Stop strings: found wherever they are split, and nothing of them shown."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.engine.stop import StopMatcher


def twin(text: str, stop: list[str]) -> tuple[str, bool]:
    """What is shown of `text`, and whether a stop string ended it: by growing the text one character at a time."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def run(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stop)
    shown = "".join(matcher.push(piece) for piece in pieces)
    return shown + matcher.flush(), matcher.matched


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("the END of it", ["END"]),
        ("the EN of it", ["END"]),
        ("aab", ["ab"]),
        ("ababac!", ["abac"]),
        ("one\n\ntwo", ["\n\n", "\n"]),
        ("xyz", ["z", "yz"]),
        ("xabcd", ["abc", "b"]),
        ("caffé au lait", ["é au"]),
        ("abc", []),
        ("", ["a"]),
    ],
)
def test_every_split(text: str, stop: list[str]) -> None:
    for count in range(min(4, len(text) + 1)):
        for cuts in itertools.combinations(range(len(text) + 1), count):
            bounds = [0, *cuts, len(text)]
            pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
            assert run(pieces, stop) == twin(text, stop), pieces


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_text_in_any_pieces(pieces: list[str], stop: list[str]) -> None:
    assert run(pieces, stop) == twin("".join(pieces), stop)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == "the "
    assert matcher.push("agle") == "Eagle"
    assert matcher.push(" EN") == " "
    assert matcher.flush() == "EN"


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a. b") == "a"
    assert (matcher.push("more"), matcher.flush()) == ("", "")
