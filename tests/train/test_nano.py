"""The texts and conversations that herd-nano learns from."""

import random
import re

from herd.train.recipes.nano_questions import all_facts, held_out
from herd.train.recipes.nano_stories import HEROES, THINGS, made_story
from herd.train.recipes.nano_talk import small_talk
from herd.train.recipes.nano_texts import clean, readability
from herd.train.recipes.nano_wording import expand, vary, with_article


def test_every_answer_holds_a_key_and_no_braces():
    for fact in all_facts():
        assert len(set(fact.questions)) == len(fact.questions), fact
        for answer in fact.answers:
            assert any(key.lower() in answer.lower() for key in fact.keys), fact
            assert not re.search(r"[{}|<>]", answer), fact
            assert answer[0].isupper() or answer[0].isdigit(), fact


def test_some_questions_are_held_out_and_every_fact_is_taught():
    facts = list(all_facts())
    kept = sum(held_out(fact, i) for fact in facts for i in range(len(fact.questions)))
    total = sum(len(fact.questions) for fact in facts)
    assert 0.1 < kept / total < 0.3
    assert all(any(not held_out(fact, i) for i in range(len(fact.questions))) for fact in facts)


def test_stories_are_clean_and_about_their_topic():
    rng = random.Random(0)
    for topic in (*HEROES, *THINGS) * 4:
        told = made_story(rng, topic)
        assert topic in told.story
        assert told.name in told.story
        assert not re.search(r"[{}|<>]|\?,|\.\.|,,|  | [,.]|\ba [aeio]", told.story), told.story
        assert told.story[-1] in '."!?'
        assert told.story.count('"') % 2 == 0, told.story


def test_small_talk_alternates():
    rng = random.Random(0)
    for _ in range(300):
        texts = small_talk(rng)
        assert len(texts) % 2 == 0
        assert not any(re.search(r"[{}|<>]", text) for text in texts)


def test_wording():
    rng = random.Random(0)
    assert {expand("a{b|c{d|e}}", rng) for _ in range(99)} == {"ab", "acd", "ace"}
    assert with_article("owl") == "an owl"
    shown = {vary("what is a dog", rng) for _ in range(99)}
    assert {"What is a dog?", "what is a dog?", "What is a dog"} <= shown
    assert not any(text.endswith(".") for text in shown)


def test_cleaning_drops_headings_and_numbers():
    text = (
        "CHAPTER IX\n\nTHE DOG\n\n3. \u201cHello\u201d, said the dog.\n\nThis story was written by a pupil.\n\nIt  ran."
    )
    assert clean(text) == '"Hello", said the dog.\n\nIt ran.'
    assert readability("The cat sat. The dog ran.") < readability(
        "Considerable intellectual refinement characterised it."
    )
