"""Every fact of `nano_facts` in many phrasings: what herd-nano is asked, and what it answers.

A `Fact` has several questions and several answers. The last question of a fact with five or more, and a fixed tenth of all
(fact, question) pairs, are never trained on: they measure whether unseen phrasings are understood.
"""

# ruff: noqa: E501  (tables and texts read better one entry to a line)
from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from herd.train.recipes.nano_facts import (
    ANIMALS,
    BODY,
    CAN,
    CAPITALS,
    COLOURS,
    DAYS,
    DEFINITIONS,
    JOBS,
    KINDS,
    LIKE_TO,
    LIVES,
    MADE_OF,
    MONTHS,
    NUMBERS,
    OPPOSITES,
    PLACES,
    SEASONS,
    SHAPES,
    WHY,
)
from herd.train.recipes.nano_wording import cap, with_article

__all__ = ["Fact", "all_facts", "held_out"]


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know: ways to ask, ways to answer, and the words a right answer holds (any one of `keys`)."""

    kind: str
    subject: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]


def _fact(kind: str, subject: str, questions: list[str], answers: list[str], *keys: str) -> Fact:
    return Fact(kind, subject, tuple(questions), tuple(cap(answer) for answer in answers), keys)


def all_facts() -> Iterator[Fact]:
    """Every fact, in a fixed order."""
    yield from _colours()
    yield from _animals()
    yield from _calendar()
    yield from _numbers()
    yield from _words()
    yield from _world()


def _colours() -> Iterator[Fact]:
    for thing, colour in COLOURS.items():
        yield _fact(
            "colour", thing,
            [f"what colour is {thing}", f"what is the colour of {thing}", f"what color is {thing}", f"what is the color of {thing}",
             f"tell me the colour of {thing}", f"which colour is {thing}", f"which colour does {thing} have",
             f"can you tell me what colour {thing} is", f"do you know the colour of {thing}", f"what colour does {thing} have"],
            [f"{thing} is {colour}.", f"{thing} is {colour}.", f"The colour of {thing} is {colour}."], colour,
        )  # fmt: skip

    named = list(COLOURS.items())
    for n, (thing, colour) in enumerate(named):
        plain = colour.split()[0] if len(colour.split()) == 1 else ""
        if not plain:
            continue
        others = [c for c in ("red", "blue", "green", "white", "black", "pink") if c not in (colour, "clear")]
        other = others[n % len(others)]
        yield _fact("yes or no", f"{thing} {colour}", [f"is {thing} {colour}", f"is it true that {thing} is {colour}", f"do you think {thing} is {colour}"],
            [f"Yes, {thing} is {colour}."], "Yes,")  # fmt: skip
        yield _fact("yes or no", f"{thing} {other}", [f"is {thing} {other}", f"is it true that {thing} is {other}", f"do you think {thing} is {other}"],
            [f"No, {thing} is {colour}.", f"No, {thing} is not {other}. {cap(thing)} is {colour}."], "No,")  # fmt: skip
    for colour in ("red", "green", "yellow", "white", "black", "brown", "blue", "orange", "grey", "purple", "pink"):
        things = tuple(thing for thing, c in named if c == colour)
        yield _fact("colour", f"of {colour}", [f"what is {colour}", f"name something {colour}", f"which thing is {colour}", f"tell me something that is {colour}",
            f"what things are {colour}", f"can you name something {colour}"], [f"{thing} is {colour}." for thing in things], *things)  # fmt: skip


def _animals() -> Iterator[Fact]:
    for name, about in ANIMALS.items():
        a = with_article(name)
        count = NUMBERS[about.legs] if about.legs else "no"
        many = "fish" if name == "fish" else {"mouse": "mice", "goose": "geese", "wolf": "wolves", "sheep": "sheep", "deer": "deer",
                "fox": "foxes", "butterfly": "butterflies", "fly": "flies", "donkey": "donkeys"}.get(name, name + "s")  # fmt: skip
        yield _fact(
            "legs", name,
            [f"how many legs does {a} have", f"how many legs has {a}", f"how many legs do {many} have", f"how many legs does the {name} have",
             f"tell me how many legs {a} has", f"what is the number of legs of {a}", f"do you know how many legs {a} has",
             f"how many legs are there on {a}"],
            [f"{a} has {count} legs."] * 2 + [f"{many} have {count} legs."], f"{count} legs", f"{about.legs} legs",
        )  # fmt: skip
        if about.sound:
            yield _fact(
                "sound", name,
                [f"what does {a} say", f"what sound does {a} make", f"what noise does {a} make", f"what does the {name} say",
                 f"which sound does {a} make", f"how does {a} sound", f"what do {many} say", f"tell me what sound {a} makes"],
                [f"{a} says {about.sound}.", f'The {name} says "{about.sound}".', f'{a} says "{cap(about.sound)}!"'], about.sound,
            )  # fmt: skip
        yield _fact(
            "home", name,
            [f"where does {a} live", f"where do {many} live", f"where does the {name} live", f"what is the home of {a}",
             f"where can I find {a}", f"tell me where {many} live", f"where is the home of {a}"],
            [f"{a} lives {about.home}.", f"{many} live {about.home}."], about.home.split()[-1],
        )  # fmt: skip
        yield _fact(
            "young", name,
            [f"what is a baby {name} called", f"what do you call a baby {name}", f"what is the young of {a} called",
             f"what is the name of a baby {name}", f"what do we call a young {name}", f"how do you call a baby {name}"],
            [f"A baby {name} is called {with_article(about.young)}.", f"A young {name} is called {with_article(about.young)}."], about.young,
        )  # fmt: skip
        yield _fact(
            "food", name,
            [f"what does {a} eat", f"what do {many} eat", f"what does the {name} like to eat", f"what is the food of {a}",
             f"tell me what {many} eat", f"what do {many} like to eat", f"what should I give {a} to eat", f"what is good food for {a}",
             f"what can I feed {a}"],
            [f"{a} eats {about.food}.", f"{many} eat {about.food}."], about.food.split()[0], about.food.split()[-1],
        )  # fmt: skip
        legs = f"It has {count} legs" + (f" and says {about.sound}." if about.sound else ".")
        yield _fact(
            "what is", name,
            [f"what is {a}", f"tell me about {many}", f"what are {many}", f"tell me something about {many}", f"what do you know about {many}",
             f"tell me about the {name}", f"can you explain what {a} is"],
            [f"{a} is {with_article(about.kind)}. {legs}", f"{a} is {with_article(about.kind)}. It lives {about.home}.",
             f"{a} is {with_article(about.kind)}. It lives {about.home} and eats {about.food}."], about.kind,
        )  # fmt: skip
    for sound in dict.fromkeys(about.sound for about in ANIMALS.values() if about.sound):
        names = [name for name, about in ANIMALS.items() if about.sound == sound]
        yield _fact("which says", sound, [f"which animal says {sound}", f"what animal says {sound}", f"who says {sound}", f'which animal makes the sound "{sound}"',
            f"what says {sound}", f"tell me which animal says {sound}"], [f"{with_article(name)} says {sound}." for name in names], *names)  # fmt: skip
    for place, names in LIVES.items():
        answers = [
            f"{cap(', '.join(with_article(n) for n in three[:-1]))} and {with_article(three[-1])} live {place}."
            for three in (names[:3], names[1:4], names[-3:])
        ]
        yield _fact("who lives", place, [f"which animals live {place}", f"what animals live {place}", f"what lives {place}", f"name some animals that live {place}",
            f"tell me which animals live {place}"], answers, *names)  # fmt: skip
    for deed, (able, unable) in CAN.items():
        for things, word, verb in ((able, "Yes", "can"), (unable, "No", "cannot")):
            for thing in things:
                yield _fact(
                    "can", f"{thing} {deed}",
                    [f"can {thing} {deed}", f"is {thing} able to {deed}", f"do you think {thing} can {deed}", f"can {thing} {deed} well"],
                    [f"{word}, {thing} {verb} {deed}.", f"{word}, {thing} {verb} {deed}."], f"{word},",
                )  # fmt: skip


def _calendar() -> Iterator[Fact]:
    for names, unit in ((DAYS, "day"), (MONTHS, "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            yield _fact(
                "calendar", f"after {name}",
                [f"what {unit} comes after {name}", f"which {unit} comes after {name}", f"what comes after {name}", f"what is the {unit} after {name}",
                 f"which {unit} follows {name}", f"tell me the {unit} after {name}"],
                [f"{after} comes after {name}.", f"The {unit} after {name} is {after}."], after,
            )  # fmt: skip
            yield _fact(
                "calendar", f"before {name}",
                [f"what {unit} comes before {name}", f"which {unit} comes before {name}", f"what comes before {name}",
                 f"what is the {unit} before {name}", f"tell me the {unit} before {name}"],
                [f"{before} comes before {name}.", f"The {unit} before {name} is {before}."], before,
            )  # fmt: skip
    for question, answer, key in (
        ("how many days {are there|are|do we have} in a week", "There are seven days in a week.", "seven"),
        ("how many months {are there|are|do we have} in a year", "There are twelve months in a year.", "twelve"),
        ("how many seasons {are there|are there in a year|does a year have|do we have}", "There are four seasons: spring, summer, autumn and winter.", "four"),
        ("how many hours {are there|are|do we have} in a day", "There are twenty-four hours in a day.", "twenty-four"),
        ("how many minutes {are there|are} in an hour", "There are sixty minutes in an hour.", "sixty"),
        ("how many days {are there|are} in a year", "There are 365 days in a year.", "365"),
        ("{name|tell me|list|what are|say|can you name} the days of the week", "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.", "Wednesday"),
        ("{name|tell me|list|what are|say|can you name} the {four seasons|seasons|seasons of the year}", "The four seasons are spring, summer, autumn and winter.", "autumn"),
        ("{name|tell me|list|what are|say} the months{ of the year|}", "The months are January, February, March, April, May, June, July, August, September, October, November and December.", "August"),
        ("{what|which} is the first day of the week", "The first day of the week is Monday.", "Monday"),
        ("{what|which} is the first month{ of the year|}", "The first month of the year is January.", "January"),
        ("{what|which} is the last month{ of the year|}", "The last month of the year is December.", "December"),
        ("{what|which} is the {warmest|hottest} season", "Summer is the warmest season.", "ummer"),
        ("{what|which} is the coldest season", "Winter is the coldest season.", "inter"),
        ("when {does|can} it snow", "It snows in winter, when it is cold.", "winter"),
        ("when {do|does} the {leaves fall|leaves fall from the trees}", "The leaves fall in autumn.", "autumn"),
    ):  # fmt: skip
        yield _fact("calendar", question, _all(question), [answer], key)
    for season, text in SEASONS.items():
        yield _fact("season", season,
            [f"what happens in {season}", f"what is {season} like", f"tell me about {season}", f"what is {season}", f"what do you know about {season}"],
            [text], season)  # fmt: skip


def _numbers() -> Iterator[Fact]:
    for a in range(21):
        for b in range(21):
            if a <= 10 and b <= 10:
                yield _sum(a, b, a + b, "plus", "and", "+")
            if b <= 10 and 0 <= a - b <= 10:
                yield _fact("minus", f"{a}-{b}",
                    [f"what is {a} minus {b}", f"what is {a} - {b}", f"how much is {a} minus {b}", f"{a} - {b}", f"what is {a} take away {b}",
                     f"subtract {b} from {a}", f"take {b} away from {a}", f"what is left when {b} is taken away from {a}",
                     f"what do you get when you take {b} from {a}"],
                    [f"{a} minus {b} is {a - b}."], f"is {a - b}.")  # fmt: skip
            if 0 < a <= 5 and 0 < b <= 5:
                yield _fact("times", f"{a}*{b}", [f"what is {a} times {b}", f"how much is {a} times {b}", f"{a} times {b}"],
                    [f"{a} times {b} is {a * b}."], f"is {a * b}.")  # fmt: skip
    for a in range(1, 7):
        for b in range(1, 7):
            one, two, result = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
            yield _fact("plus", f"{one}+{two}", [f"what is {one} plus {two}", f"how much is {one} plus {two}", f"what is {one} and {two}", f"add {one} and {two}"],
                [f"{one} plus {two} is {result}."], f"is {result}.")  # fmt: skip
    for a in range(20):
        yield _fact("count", f"after {a}",
            [f"what number comes after {a}", f"which number comes after {a}", f"what comes after {a}", f"what is the number after {a}"],
            [f"{a + 1} comes after {a}.", f"The number after {a} is {a + 1}."], str(a + 1))  # fmt: skip
        word, after = NUMBERS[a], NUMBERS[a + 1]
        yield _fact("count", f"after {word}", [f"what number comes after {word}", f"what comes after {word}", f"which number comes after {word}"],
            [f"{cap(after)} comes after {word}."], after, cap(after))  # fmt: skip
    for end in (*range(3, 13), 15, 20):
        digits = ", ".join(str(i) for i in range(1, end + 1))
        yield _fact("count", f"to {end}", [f"count to {end}", f"count from 1 to {end}", f"can you count to {end}", f"please count up to {end}"],
            [f"{digits}."], digits)  # fmt: skip
    for a in range(1, 20):
        for b in (a - 3, a - 1, a + 1, a + 4):
            if 0 < b <= 20:
                yield _fact("compare", f"{a} {b}", [f"which is bigger, {a} or {b}", f"what is more, {a} or {b}", f"which number is bigger, {a} or {b}"],
                    [f"{max(a, b)} is bigger than {min(a, b)}."], f"{max(a, b)} is")  # fmt: skip


def _sum(a: int, b: int, result: int, word: str, spoken: str, sign: str) -> Fact:
    questions = [f"what is {a} {word} {b}", f"what is {a} {sign} {b}", f"how much is {a} {word} {b}", f"{a} {sign} {b}", f"add {a} and {b}",
        f"what is {a} {spoken} {b}", f"how much is {a} {spoken} {b}", f"what is the sum of {a} and {b}"]  # fmt: skip
    return _fact(word, f"{a}{sign}{b}", questions, [f"{a} {word} {b} is {result}."], f"is {result}.")


def _words() -> Iterator[Fact]:
    pairs = OPPOSITES + [(b, a) for a, b in OPPOSITES]
    for word in dict.fromkeys(a for a, _ in pairs):
        others = [b for a, b in pairs if a == word]
        yield _fact("opposite", word,
            [f"what is the opposite of {word}", f"what is the opposite of the word {word}", f"tell me the opposite of {word}",
             f'what is the opposite of "{word}"', f"give me the opposite of {word}", f"which word is the opposite of {word}",
             f"name the opposite of {word}"],
            [f"The opposite of {word} is {others[0]}."], *(f"is {other}." for other in others))  # fmt: skip
    for kind, members in KINDS.items():
        for member in members:
            yield _fact("is a", f"{member} {kind}",
                [f"is {with_article(member)} {with_article(kind)}" if kind not in ("colour", "sport", "meal", "drink") else f"is {member} {with_article(kind)}",
                 f"what kind of thing is {with_article(member)}" if kind not in ("colour", "sport", "meal", "drink") else f"what kind of thing is {member}",
                 f"tell me what kind of thing {with_article(member)} is" if kind not in ("colour", "sport", "meal", "drink") else f"tell me what kind of thing {member} is"],
                [f"Yes, {with_article(member) if kind not in ('colour', 'sport', 'meal', 'drink') else member} is {with_article(kind)}.",
                 f"{with_article(member) if kind not in ('colour', 'sport', 'meal', 'drink') else member} is {with_article(kind)}."], f"is {with_article(kind)}")  # fmt: skip
    for shape, text in SHAPES.items():
        yield _fact("shape", shape, [f"how many sides does a {shape} have", f"what is a {shape}", f"tell me about the {shape}",
            f"what does a {shape} look like", f"how many sides has a {shape}"], [text], text)  # fmt: skip


def _world() -> Iterator[Fact]:
    for deed, part in BODY.items():
        yield _fact("body", deed, [f"what do we {deed} with", f"what do you use to {deed}", f"with what do we {deed}", f"which part of the body do we {deed} with",
            f"what do people {deed} with", f"what do we need to {deed}", f"which part of the body do you need to {deed}",
            f"what part of the body is used to {deed}"], [f"We {deed} with our {part}."], part)  # fmt: skip
    for thing, stuff in MADE_OF.items():
        yield _fact("made of", thing, [f"what is {thing} made of", f"what is {thing} made from", f"tell me what {thing} is made of", f"what do you need to make {thing}",
            f"do you know what {thing} is made of"], [f"{thing} is made of {stuff}."], stuff.split()[-1])  # fmt: skip
    for job, deed in JOBS.items():
        yield _fact("job", job, [f"what does {job} do", f"what is {job}", f"what is the work of {job}", f"tell me what {job} does", f"what kind of work does {job} do",
            f"do you know what {job} does", f"what is the job of {job}"],
            [f"{job} {deed}."], " ".join(deed.split()[:2]))  # fmt: skip
    for deed, place in PLACES.items():
        yield _fact("place", deed, [f"where can I {deed}", f"where do we {deed}", f"where do people {deed}", f"where can you {deed}", f"tell me where I can {deed}"],
            [f"You can {deed} {place}.", f"People {deed} {place}."], place.split()[-1])  # fmt: skip
    for country, city in CAPITALS.items():
        yield _fact("capital", country, [f"what is the capital of {country}", f"which city is the capital of {country}", f"tell me the capital of {country}",
            f"name the capital of {country}", f"do you know the capital of {country}"],
            [f"The capital of {country} is {city}.", f"{city} is the capital of {country}."], city)  # fmt: skip
    for thing, text in DEFINITIONS.items():
        yield _fact("definition", thing, [f"what is {thing}", f"can you tell me what {thing} is", f"tell me about {thing}", f"explain what {thing} is",
            f"what do you know about {thing}", f"do you know what {thing} is"], [text], " ".join(text.split()[:4]))  # fmt: skip
    for question, text in WHY.items():
        yield _fact("why", question, [f"why {question}", f"can you tell me why {_statement(question)}", f"tell me why {_statement(question)}",
            f"do you know why {_statement(question)}"], [text], " ".join(text.split()[:5]))  # fmt: skip
    for when, text in LIKE_TO.items():
        verb = "should I" if "should" in text else "can I"
        asked = when.replace("you are", "I am").replace("you ", "I ")
        yield _fact("advice", when, [f"what {verb} do {asked}", f"what do you do {when}", f"what can you do {when}", f"{asked}, what can I do"],
            [f"{cap(when)}, {text}.", f"{cap(text)}."], text)  # fmt: skip


def _statement(question: str) -> str:
    """Word order of an indirect question: "do we sleep" -> "we sleep", "is the sky blue" -> "the sky is blue"."""
    verb, _, rest = question.partition(" ")
    if verb == "is":
        words = rest.split()
        return f"{' '.join(words[:-1])} is {words[-1]}" if words[0] != "it" else f"it is {' '.join(words[1:])}"
    if verb == "does":
        words = rest.split()
        return f"{words[0]} {words[1]}s"
    return rest


def _all(template: str) -> list[str]:
    """Every text that `expand` could make of `template` (one level of braces)."""
    match = re.search(r"\{([^{}]*)\}", template)
    if match is None:
        return [template]
    return [
        text
        for option in match[1].split("|")
        for text in _all(template[: match.start()] + option + template[match.end() :])
    ]


def held_out(fact: Fact, i: int) -> bool:
    """Whether question `i` of `fact` is kept for measuring: one fixed pair in ten, and every last phrasing of five or more."""
    if len(fact.questions) >= 5 and i == len(fact.questions) - 1:
        return True
    return i > 0 and zlib.crc32(f"{fact.kind}/{fact.subject}/{i}".encode()) % 10 == 0
