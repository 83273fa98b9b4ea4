"""How well herd-nano answers: held-out phrasings, replies that end by themselves, and samples for the card.

    python -m herd.train.recipes.nano_check nano runs/nano/export --data ../shared/data

measures any models that chat the same way, each on the same held-out texts, questions and stories.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from herd.chat.format import ChatFormat
from herd.chat.formats import detect
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.checkpoint.load import load
from herd.engine.session import Session
from herd.model.llama import Llama
from herd.tokenizer.tokenizer import Tokenizer
from herd.train.measure import bits_per_byte
from herd.train.recipes.nano_questions import all_facts, held_out
from herd.train.recipes.nano_stories import HEROES
from herd.train.recipes.nano_texts import validation_texts
from herd.train.recipes.nano_wording import vary, with_article

__all__ = ["SAMPLING", "Checked", "check", "held_out_bits"]

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

    def __init__(self, model: Llama, tokenizer: Tokenizer, format: ChatFormat) -> None:
        self.session, self.tokenizer, self.format = Session(model), tokenizer, format

    def reply(self, text: str, temperature: float, seed: int, limit: int) -> tuple[str, bool]:
        """The reply to one user text, and whether it ended by itself."""
        prompt = self.format.render([Message("user", text)]).tokens
        params = SamplingParams(temperature=temperature, top_p=0.9, seed=seed, max_tokens=limit)
        ids = list(self.session.generate(prompt, params, self.format.stop_ids))
        ended = bool(ids) and ids[-1] in self.format.stop_ids
        return self.tokenizer.decode(ids[:-1] if ended else ids), ended


def check(
    model: Llama,
    tokenizer: Tokenizer,
    format: ChatFormat,
    questions: int = 1000,
    stories: int = 60,
    limit: int = 400,
    seed: int = 7,
) -> Checked:
    """Ask `questions` held-out questions greedily and `stories` story requests at the recommended temperature.

    A reply that has not ended by itself is cut after `limit` tokens.
    """
    rng = random.Random(seed)
    speaker = Speaker(model, tokenizer, format)
    kept = [(fact, i) for fact in all_facts() for i in range(len(fact.questions)) if held_out(fact, i)]
    by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    stopped = right = on_topic = 0
    asked = rng.sample(kept, min(questions, len(kept)))
    for fact, i in asked:
        text, ended = speaker.reply(vary(fact.questions[i], rng), 0.0, seed, min(80, limit))
        good = any(key.lower() in text.lower() for key in fact.keys)
        by_kind[fact.kind][0] += good
        by_kind[fact.kind][1] += 1
        right += good
        stopped += ended
    for n in range(stories):
        topic = rng.choice(HEROES)
        text, ended = speaker.reply(vary(f"tell me a story about {with_article(topic)}", rng), 0.6, seed + n, limit)
        stopped += ended
        on_topic += topic in text.lower()
    kinds = {kind: (hits, total) for kind, (hits, total) in sorted(by_kind.items())}
    samples = tuple((text, speaker.reply(text, 0.6, n, limit)[0]) for n, text in enumerate(SHOWN, start=1))
    return Checked(right, len(asked), kinds, stopped, on_topic, stories, samples)


def held_out_bits(model: Llama, tokenizer: Tokenizer, data: Path) -> float:
    """Bits per byte of the children's documents of `data`, read in windows of the model's context."""
    encoded = [(tokenizer.encode(text), len(text.encode())) for text in validation_texts(data)]
    return bits_per_byte(model, encoded, tokenizer.special.bos, model.config.max_seq_len - 1)


def main() -> None:
    """Measure models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders, files or names")
    parser.add_argument("--data", type=Path, required=True, help="the data collection")
    args = parser.parse_args()
    for name in args.models:
        model, tokenizer = load(name, dtype=torch.float32)
        bits, found = held_out_bits(model, tokenizer, args.data), check(model, tokenizer, detect(tokenizer))
        print(f"{name}: {bits:.4f} bits per byte; {found.right} of {found.asked} questions; {found.stopped} of "
              f"{found.asked + found.stories} replies ended; {found.on_topic} of {found.stories} stories on topic")  # fmt: skip
        print("  " + ", ".join(f"{kind} {right}/{asked}" for kind, (right, asked) in found.by_kind.items()), flush=True)


if __name__ == "__main__":
    main()
