"""How well herd-nano answers: held-out phrasings, replies that end by themselves, and samples for the card."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.engine.session import Session
from herd.model.llama import Llama
from herd.train.recipes.nano_format import Headers
from herd.train.recipes.nano_questions import all_facts, held_out
from herd.train.recipes.nano_stories import HEROES
from herd.train.recipes.nano_wording import vary, with_article

__all__ = ["SAMPLING", "Checked", "check", "replies"]

SAMPLING = {"temperature": 0.6, "top_p": 0.9}
"""What generation_config.json recommends: low enough for facts, free enough that stories differ."""

SHOWN = (
    "tell me a story about a dog",
    "what is the colour of the sky",
    "hello",
    "who are you",
    "how many legs does a cat have",
    "Tell me a short story about a little girl named Anna.",
    "What is 3 plus 4?",
    "What day comes after Monday?",
    "Who won the world cup in 1998?",
    "I am sad.",
    "Thank you!",
    "Name three fruits.",
    "What is the opposite of hot?",
    "Why does it rain?",
)


@dataclass(frozen=True, slots=True)
class Checked:
    """Figures of one model: right answers to held-out questions by kind, replies that ended, stories on the topic."""

    right: int
    asked: int
    by_kind: dict[str, tuple[int, int]]
    stopped: int
    on_topic: int
    stories: int
    samples: tuple[tuple[str, str], ...]


class Speaker:
    """Replies of one model from the export's own settings: top-p 0.9, a fixed seed."""

    def __init__(self, model: Llama, headers: Headers) -> None:
        self.session, self.headers = Session(model), headers

    def reply(self, text: str, temperature: float, seed: int, limit: int = 400) -> tuple[str, bool]:
        """The reply to one user text, and whether it ended by itself."""
        prompt = self.headers.prompt([Message("user", text)])
        params = SamplingParams(temperature=temperature, top_p=0.9, seed=seed, max_tokens=limit)
        stop = self.headers.special["<|eot_id|>"]
        ids = list(self.session.generate(prompt, params, frozenset({stop})))
        ended = bool(ids) and ids[-1] == stop
        return self.headers.tokenizer.decode(ids[:-1] if ended else ids), ended


def replies(model: Llama, headers: Headers, texts: Sequence[str], temperature: float = 0.6) -> list[tuple[str, str]]:
    """(text, reply) for each text."""
    speaker = Speaker(model, headers)
    return [(text, speaker.reply(text, temperature, n)[0]) for n, text in enumerate(texts, start=1)]


def check(model: Llama, headers: Headers, questions: int = 500, stories: int = 40, seed: int = 7) -> Checked:
    """Ask `questions` held-out questions greedily and `stories` story requests at the recommended temperature."""
    rng = random.Random(seed)
    speaker = Speaker(model, headers)
    kept = [(fact, i) for fact in all_facts() for i in range(len(fact.questions)) if held_out(fact, i)]
    by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    stopped = right = on_topic = 0
    asked = rng.sample(kept, min(questions, len(kept)))
    for fact, i in asked:
        text, ended = speaker.reply(vary(fact.questions[i], rng), 0.0, seed, limit=80)
        good = any(key.lower() in text.lower() for key in fact.keys)
        by_kind[fact.kind][0] += good
        by_kind[fact.kind][1] += 1
        right += good
        stopped += ended
    for n in range(stories):
        topic = rng.choice(HEROES)
        text, ended = speaker.reply(vary(f"tell me a story about {with_article(topic)}", rng), 0.6, seed + n)
        stopped += ended
        on_topic += topic in text.lower()
    kinds = {kind: (hits, total) for kind, (hits, total) in sorted(by_kind.items())}
    samples = tuple((text, speaker.reply(text, 0.6, n)[0]) for n, text in enumerate(SHOWN, start=1))
    return Checked(right, len(asked), kinds, stopped, on_topic, stories, samples)
