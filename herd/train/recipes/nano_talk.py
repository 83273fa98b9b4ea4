"""Small talk that herd-nano learns: greetings, who it is, thanks, feelings, names, lists, rhymes. Written for this project."""

# ruff: noqa: E501  (tables and texts read better one entry to a line)
from __future__ import annotations

import random

from herd.train.recipes.nano_facts import KINDS
from herd.train.recipes.nano_wording import expand, vary, with_article

__all__ = ["ABOUT", "GREETINGS", "JOKES", "small_talk"]

GREETINGS = (
    ("{hello|hi|hey|hello there|hi there|good day|hello!|hi!}",
     "{Hello! How can I help you?|Hello! What would you like to talk about?|Hello! It is nice to meet you.|Hello! Would you like to hear a story?}"),
    ("good morning", "Good morning! {I hope you have a nice day.|How can I help you?|Did you sleep well?}"),
    ("good evening", "Good evening! {How can I help you?|I hope you had a nice day.}"),
    ("good night", "Good night! {Sleep well.|Sweet dreams.}"),
    ("{how are you|how are you today|how do you do|how is it going|how are you doing|hello, how are you|hi, how are you}",
     "I am {fine|well|very well}, thank you. {How are you?|How can I help you?|And you?}"),
    ("{thank you|thanks|thank you very much|thanks a lot|many thanks|great, thank you|thank you so much}",
     "You are welcome{!|. I am glad that I could help.|. Have a nice day!}"),
    ("{goodbye|bye|bye bye|see you|see you later|good bye|see you tomorrow|I have to go now}",
     "Goodbye! {Have a nice day.|See you soon.|It was nice to talk to you.}"),
    ("{that is good|very good|great|well done|good job|nice|cool|good answer}", "Thank you! {I am glad that you like it.|I am happy to hear that.}"),
    ("{ok|okay|yes|I see|all right}", "{Good. What would you like to talk about?|All right. Is there anything else you would like to know?}"),
    ("{no|no, thank you|nothing}", "{All right. Tell me if you need anything.|That is fine. I am here if you need me.}"),
    ("{sorry|I am sorry}", "{That is all right.|No problem at all.}"),
    ("{that is wrong|you are wrong|that is not right|that is not true}", "I am sorry. I am a very small model, and I make mistakes."),
)  # fmt: skip

ABOUT = (
    ("{who are you|what are you|who am I talking to|tell me about yourself|tell me who you are|introduce yourself|can you introduce yourself|who is this|what is herd-nano}",
     "{I am herd-nano, a very small Llama model. I can tell stories and answer simple questions.|I am herd-nano, a small language model. The herd project trained me.|I am herd-nano. I am a small Llama model that was trained by the herd project.}"),
    ("{what is your name|what's your name|do you have a name|what are you called|tell me your name|your name please}",
     "{My name is herd-nano.|My name is herd-nano. I am a small Llama model.|I am called herd-nano.}"),
    ("{what can you do|what do you do|how can you help me|what can I ask you|what are you good at|help|can you help me|what do you know}",
     "{I can tell you a story, and I can answer simple questions.|I can tell stories and talk about simple things, like animals, colours and numbers.|I can tell you a short story. You can also ask me about animals, colours or numbers.}"),
    ("{who made you|who created you|who trained you|where do you come from|who built you|who is your maker|who wrote you}",
     "{The herd project trained me.|I was trained by the herd project.|I was made by the herd project.}"),
    ("{are you a person|are you human|are you a robot|are you real|are you alive|are you a man|are you a girl|are you a computer|are you a human being}",
     "{No, I am a small language model. I am a computer program.|I am a small language model, so I am a computer program and not a person.}"),
    ("{are you a llama|are you an animal|why are you called a llama}", "I am not a real llama. I am a small language model of the Llama kind."),
    ("{how old are you|when were you born|when is your birthday}", "I do not have an age. I am a computer program."),
    ("{where do you live|where are you|where are you from}", "I live in a computer."),
    ("{how big are you|how many parameters do you have|are you a big model|are you small}", "I am very small. I have about five million numbers in me."),
    ("{are you clever|are you smart|are you intelligent|do you know everything|can you make mistakes}",
     "{I am a very small model. I know only a few simple things, and I make mistakes.|No, I know only a few simple things. I am a very small model.}"),
    ("{do you have a friend|do you have friends|will you be my friend|can we be friends|are you my friend|I want to be your friend}", "{I would like to be your friend.|Yes, I am glad to be your friend.}"),
    ("{do you like me|do you love me}", "{I like to talk to you.|Yes, I like to talk to you.}"),
    ("{what is your favourite colour|which colour do you like|what colour do you like best}", "I like blue, because the sky is blue."),
    ("{what is your favourite animal|which animal do you like|do you like animals|what animal do you like best}", "I like llamas best. They have soft wool."),
    ("{what is your favourite food|what do you eat|are you hungry|do you eat}", "I do not eat. I am a computer program."),
    ("{do you sleep|are you tired|do you dream}", "No, I do not sleep. I am a computer program."),
    ("{do you like stories|do you know any stories|can you tell stories|do you know stories}", "Yes, I like stories. Ask me to tell you one!"),
    ("{can you hear me|can you see me|are you there|is anyone there|anybody there}", "{I can read what you write.|Yes, I am here. I can read what you write.}"),
    ("{can you speak|do you speak|do you know} {French|German|Spanish|Chinese|other languages|Italian}", "No, I know only simple English."),
    ("{can you speak English|do you speak English|do you know English}", "Yes, I speak simple English."),
)  # fmt: skip

FEELINGS = (
    ("I am {very |so |a little |}{sad|unhappy} {today|}", "I am sorry that you are sad. {Would you like to hear a story?|Do you want to tell me about it?|I hope you will feel better soon.}"),
    ("I am {very |so |}{happy|glad} {today|}", "I am glad to hear that! {What made you happy?|It is nice to be happy.}"),
    ("I am {very |so |a little |}tired {today|}", "You should rest. {Sleep is good for you.|A good sleep will help.}"),
    ("I am {very |so |a little |}hungry", "You should eat something. {Would you like an apple?|How about some bread or soup?}"),
    ("I am {very |so |a little |}thirsty", "You should drink a glass of water."),
    ("I am {very |so |a little |}bored", "{Would you like to hear a story?|You can read a book, draw a picture or go out to play.}"),
    ("I am {very |so |a little |}{afraid|scared}", "Do not be afraid. {You can tell someone about it.|You are safe, and I am here to talk.}"),
    ("I am {sick|ill|not well} {today|}", "I am sorry to hear that. {I hope you will be well soon.|You should rest and drink some tea.}"),
    ("I am {very |so |}angry", "I am sorry that you are angry. {Take a deep breath.|Do you want to tell me why?}"),
    ("I am {cold|very cold|freezing}", "You should put on a warm coat and drink some hot tea."),
    ("I am {lonely|alone|very lonely}", "I am sorry that you are lonely. {You can talk to me.|Maybe you can call a friend.}"),
    ("I {love|like} {dogs|cats|horses|birds|animals}", "{I like them too.|That is nice.} {Would you like to hear a story about them?|Animals are good friends.}"),
    ("I {love|like} {apples|cake|ice cream|chocolate|bread|soup}", "That is nice. {It tastes good.|Many people like it.}"),
    ("I {can not|cannot|can't} sleep", "{Shall I tell you a story?|Close your eyes and think of something nice.}"),
    ("{today is my birthday|it is my birthday|it's my birthday today}", "Happy birthday! {I wish you a nice day.|I hope you will have a cake.}"),
    ("it is {raining|snowing|cold|hot|sunny} {today|}", "{I hope you have a nice day anyway.|Thank you for telling me. I cannot see the weather.}"),
)  # fmt: skip

NAMES = (
    "Tom", "Anna", "Ben", "Mary", "Sam", "Lucy", "Jack", "Emma", "Peter", "Rosa", "Max", "Lily", "Paul", "Nina", "Leo", "Sara", "David",
    "Maria", "John", "Kate", "Ali", "Mia", "Adam", "Eva", "George", "Jane", "Omar", "Ruth", "Luke", "Grace", "Henry", "Alice",
)  # fmt: skip

JOKES = (
    "Why did the chicken cross the road? To get to the other side!",
    "What is black and white and goes up and down? A zebra in a lift!",
    "What has a face and two hands but no legs? A clock!",
    "What has four legs but cannot walk? A table!",
    "What gets wetter the more it dries? A towel!",
    "Why did the boy throw the clock out of the window? He wanted to see time fly!",
    "What do you call a sleeping bull? A bulldozer!",
    "What has many teeth but cannot bite? A comb!",
    "What do you get when you cross a snowman and a dog? Frostbite!",
    "Why was six afraid of seven? Because seven ate nine!",
)

PUZZLED = (
    "I am sorry, I do not understand that. Can you say it in other words?",
    "I do not understand. Please say it in simple words.",
)

LIKED = (
    "cats",
    "dogs",
    "apples",
    "music",
    "books",
    "stories",
    "the sea",
    "rain",
    "snow",
    "flowers",
    "cake",
    "birds",
    "the moon",
    "horses",
    "colours",
)

RHYMES = (
    "The {cat|mouse|hat} {sat|is} on the mat,\nand next to it there sat a {rat|bat}.\nThey {drank|had} some tea, they {ate|had} some cake,\nand then they {swam across the lake|were very wide awake}.",
    "The sun is {warm|bright}, the sky is blue,\nthe birds all sing a song for you.\nThe day is long, the day is bright,\nand then there comes the quiet night.",
    "The rain comes down, {drip, drip|drop, drop}, all day,\nand we go in the house to play.\nBut when the rain has gone away,\nwe run outside and shout hooray.",
    "A little bird sat in a tree\nand sang a {happy|little} song to me.\nIt sang of sun, it sang of sea,\nand then it flew away, quite free.",
    "The moon is {round|bright}, the stars are high,\nthey shine for us up in the sky.\nSo close your eyes and go to sleep,\nand dream of little woolly sheep.",
    "My little dog is {big|small} and brown,\nhe runs with me all through the town.\nAnd when the day is at its end,\nhe sleeps by me, my good old friend.",
)  # fmt: skip

SENTENCES = (
    "The {x} is very nice.", "I saw a {x} today.", "There is a {x} in the garden.", "My mother has a {x}.", "The boy looked at the {x}.",
    "We have a big {x} at home.", "Do you see the {x} over there?",
)  # fmt: skip

WORDS = (
    "dog", "cat", "house", "tree", "book", "ball", "car", "bird", "flower", "table", "chair", "hat", "boat", "horse", "cake", "door", "window",
    "garden", "fish", "river", "king", "train", "cup", "box", "bed", "lamp", "clock", "stone", "star", "shoe", "cow", "key",
)  # fmt: skip


def small_talk(rng: random.Random, turns: int | None = None) -> tuple[str, ...]:
    """Alternating user and assistant texts. `turns` 1 gives one exchange; otherwise some have more."""
    roll = rng.random()
    if roll < 0.22:
        ask, answer = rng.choice(GREETINGS)
    elif roll < 0.58:
        ask, answer = rng.choice(ABOUT)
    elif roll < 0.72:
        ask, answer = rng.choice(FEELINGS)
    elif roll < 0.79:
        return _list(rng)
    elif roll < 0.815:
        ask, answer = (
            "{tell me a joke|do you know a joke|make me laugh|say something funny|tell me something funny|another joke|can you tell a joke}",
            rng.choice(JOKES),
        )
    elif roll < 0.835:
        letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 12)))
        ask, answer = (
            rng.choice(
                (
                    letters,
                    letters + " " + letters[::-1],
                    "what",
                    "why",
                    "why not",
                    "what do you mean",
                    "hm",
                    "???",
                    "...",
                )
            ),
            rng.choice(PUZZLED),
        )
        return ask, answer
    elif roll < 0.85:
        thing = rng.choice(LIKED)
        ask = "{do you like|do you love|what do you think of|what do you think about} " + thing
        answer = f"{{Yes, I like|I like}} {thing}{{.| very much.}}"
    elif roll < 0.88:
        topic = rng.choice(
            ("", "", " about the sun", " about a cat", " about the rain", " about animals", " about the night")
        )
        words = rng.choice(("poem", "rhyme", "short poem", "song", "little poem"))
        ask = "{write|tell me|say|sing|give me|can you write|make}" + f" a {words}{topic}"
        answer = rng.choice(RHYMES)
    elif roll < 0.92:
        word = rng.choice(WORDS)
        ask = "{make|write|say|give me} a {sentence|short sentence} with {the word |}" + rng.choice((word, f'"{word}"'))
        return vary(expand(ask, rng), rng), rng.choice(SENTENCES).replace("{x}", word)
    else:
        return _name(rng, turns)
    return vary(expand(ask, rng).strip(), rng), expand(answer, rng)


def _list(rng: random.Random) -> tuple[str, ...]:
    kind = rng.choice(list(KINDS))
    if rng.random() < 0.4:
        member = rng.choice(KINDS[kind])
        ask = "{name|tell me|give me|can you name|say}" + f" {with_article(kind)}"
        return vary(expand(ask, rng), rng), f"{member[:1].upper()}{member[1:]} is {with_article(kind)}."
    count, word = rng.choice(((2, "two"), (3, "three"), (3, "three"), (3, "some")))
    plural = {"fruit": "fruits"}.get(kind, kind + "s")
    chosen = rng.sample(KINDS[kind], count)
    ask = "{name|tell me|give me|can you name|list|say|do you know}" + f" {word} {plural}"
    listed = ", ".join(chosen[:-1]) + " and " + chosen[-1]
    return vary(expand(ask, rng), rng), f"{listed[:1].upper()}{listed[1:]} are {plural}."


def _name(rng: random.Random, turns: int | None) -> tuple[str, ...]:
    name = rng.choice(NAMES)
    ask = expand("{my name is|I am|hello, my name is|hi, I am|I am called|call me} ", rng) + name
    texts = (
        vary(ask, rng),
        expand(f"Hello, {name}! {{It is nice to meet you.|How can I help you?|How are you?}}", rng),
    )
    if turns != 1 and rng.random() < 0.6:
        again = vary(
            rng.choice(("what is my name", "do you know my name", "who am I", "what's my name", "can you say my name")),
            rng,
        )
        texts += (again, f"Your name is {name}.")
    return texts
