"""The little that herd-nano is taught to know: plain tables, written for this project.

Each table is data only; `herd.train.recipes.nano_chat` turns them into questions and answers.
"""

# ruff: noqa: E501  (tables and texts read better one entry to a line)
from __future__ import annotations

__all__ = [
    "ANIMALS", "BODY", "CAN", "CAPITALS", "COLOURS", "DAYS", "DEFINITIONS", "JOBS", "KINDS", "LIKE_TO", "LIVES", "MADE_OF", "MONTHS",
    "NUMBERS", "OPPOSITES", "PLACES", "SEASONS", "SHAPES", "UNKNOWN", "WHY", "Animal",
]  # fmt: skip

from typing import NamedTuple

COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "blood": "red", "a banana": "yellow", "an orange": "orange",
    "a tomato": "red", "the sun": "yellow", "the night": "black", "milk": "white", "a strawberry": "red", "a leaf": "green",
    "a crow": "black", "chocolate": "brown", "a lemon": "yellow", "a carrot": "orange", "coal": "black", "a frog": "green",
    "a pig": "pink", "an elephant": "grey", "a cloud": "white", "the sea": "blue", "a cherry": "red", "a pea": "green",
    "a polar bear": "white", "a flamingo": "pink", "a fire engine": "red", "butter": "yellow", "salt": "white",
    "sugar": "white", "a plum": "purple", "a cucumber": "green", "honey": "golden yellow", "a mouse": "grey",
    "a swan": "white", "a fox": "red", "mud": "brown", "a sunflower": "yellow", "rice": "white", "corn": "yellow",
    "a pumpkin": "orange", "a violet": "purple", "a raven": "black", "a potato": "brown", "the moon": "white",
    "a chick": "yellow", "a crocodile": "green", "bread": "brown", "cheese": "yellow", "an egg": "white", "ice": "clear",
    "a tree trunk": "brown", "a ladybird": "red with black spots", "a zebra": "black and white",
    "a panda": "black and white", "a penguin": "black and white", "a tiger": "orange with black stripes",
    "fire": "red and yellow", "the ocean": "blue", "spinach": "green", "a bear": "brown", "a lion": "golden brown",
}  # fmt: skip


class Animal(NamedTuple):
    """What is told about one animal. Empty strings are things that are not taught."""

    legs: int
    sound: str
    home: str
    young: str
    food: str
    kind: str


ANIMALS = {
    "dog": Animal(4, "woof", "in a kennel or in a house with people", "puppy", "meat and bones", "pet"),
    "cat": Animal(4, "meow", "in a house with people", "kitten", "fish and meat", "pet"),
    "cow": Animal(4, "moo", "on a farm", "calf", "grass", "farm animal"),
    "horse": Animal(4, "neigh", "in a stable", "foal", "grass and hay", "farm animal"),
    "sheep": Animal(4, "baa", "on a farm", "lamb", "grass", "farm animal"),
    "goat": Animal(4, "maa", "on a farm", "kid", "grass and leaves", "farm animal"),
    "pig": Animal(4, "oink", "in a pigsty", "piglet", "roots and vegetables", "farm animal"),
    "donkey": Animal(4, "hee-haw", "in a stable", "foal", "grass and hay", "farm animal"),
    "hen": Animal(2, "cluck", "in a hen house", "chick", "seeds and worms", "bird"),
    "duck": Animal(2, "quack", "near a pond", "duckling", "plants and small water animals", "bird"),
    "goose": Animal(2, "honk", "near a pond", "gosling", "grass and seeds", "bird"),
    "owl": Animal(2, "hoot", "in a tree", "owlet", "mice", "bird"),
    "crow": Animal(2, "caw", "in a nest in a tree", "chick", "seeds and insects", "bird"),
    "bird": Animal(2, "tweet", "in a nest", "chick", "seeds and worms", "animal with feathers"),
    "eagle": Animal(2, "", "in a nest high in the mountains", "eaglet", "fish and small animals", "bird"),
    "penguin": Animal(2, "", "in the cold south, on the ice", "chick", "fish", "bird"),
    "swan": Animal(2, "", "on a lake", "cygnet", "water plants", "bird"),
    "parrot": Animal(2, "squawk", "in the forest", "chick", "nuts and fruit", "bird"),
    "frog": Animal(4, "croak", "near a pond", "tadpole", "flies", "small animal that can jump"),
    "mouse": Animal(4, "squeak", "in a small hole", "pup", "seeds and cheese", "small animal"),
    "rabbit": Animal(4, "", "in a hole in the ground", "kit", "grass and carrots", "small animal"),
    "squirrel": Animal(4, "", "in a tree", "kit", "nuts", "small animal"),
    "fox": Animal(4, "", "in a den", "cub", "mice, rabbits and berries", "wild animal"),
    "wolf": Animal(4, "howl", "in the forest", "cub", "meat", "wild animal"),
    "bear": Animal(4, "growl", "in a cave in the forest", "cub", "fish, berries and honey", "wild animal"),
    "lion": Animal(4, "roar", "in the grasslands of Africa", "cub", "meat", "wild animal"),
    "tiger": Animal(4, "roar", "in the jungle", "cub", "meat", "wild animal"),
    "elephant": Animal(4, "", "in the grasslands and forests", "calf", "leaves and grass", "very big wild animal"),
    "giraffe": Animal(4, "", "in the grasslands of Africa", "calf", "leaves from tall trees", "very tall wild animal"),
    "zebra": Animal(4, "", "in the grasslands of Africa", "foal", "grass", "wild animal with stripes"),
    "monkey": Animal(2, "", "in the trees of the jungle", "baby monkey", "fruit and nuts", "wild animal"),
    "kangaroo": Animal(2, "", "in Australia", "joey", "grass", "wild animal that can jump far"),
    "camel": Animal(4, "", "in the desert", "calf", "dry grass and plants", "animal with a hump"),
    "deer": Animal(4, "", "in the forest", "fawn", "grass and leaves", "wild animal"),
    "hedgehog": Animal(4, "", "under leaves and bushes", "hoglet", "insects and worms", "small animal with spines"),
    "turtle": Animal(4, "", "in the sea", "baby turtle", "sea plants", "animal with a hard shell"),
    "crocodile": Animal(4, "", "in rivers", "baby crocodile", "fish and meat", "wild animal with sharp teeth"),
    "snake": Animal(0, "hiss", "in holes and under stones", "baby snake", "mice and eggs", "long animal without legs"),
    "fish": Animal(0, "", "in the water", "baby fish", "small water animals and plants", "animal that lives in water"),
    "shark": Animal(0, "", "in the sea", "pup", "fish", "big fish"),
    "whale": Animal(0, "", "in the sea", "calf", "tiny sea animals", "very big sea animal"),
    "worm": Animal(0, "", "in the ground", "baby worm", "dead leaves", "small animal without legs"),
    "snail": Animal(0, "", "in its shell", "baby snail", "leaves", "small slow animal with a shell"),
    "bee": Animal(6, "buzz", "in a hive", "larva", "the sweet juice of flowers", "insect"),
    "ant": Animal(6, "", "in an ant hill", "larva", "seeds and crumbs", "insect"),
    "butterfly": Animal(6, "", "among the flowers", "caterpillar", "the sweet juice of flowers", "insect"),
    "fly": Animal(6, "buzz", "near people and animals", "maggot", "almost anything", "insect"),
    "spider": Animal(8, "", "in a web", "spiderling", "flies", "small animal with eight legs"),
    "crab": Animal(10, "", "by the sea", "baby crab", "small sea animals", "animal with claws"),
    "chicken": Animal(2, "cluck", "in a hen house", "chick", "seeds and worms", "bird"),
}

CAN = {
    "fly": (["a bird", "a bee", "an owl", "a butterfly", "an eagle", "a fly", "a crow", "a bat", "a plane", "a duck"],
            ["a dog", "a cat", "a pig", "an elephant", "a fish", "a cow", "a house", "a penguin", "a snake", "a horse"]),
    "swim": (["a fish", "a duck", "a whale", "a frog", "a shark", "a swan", "a dog", "a turtle", "a penguin"],
             ["a stone", "a hen", "a chair", "a butterfly", "a spoon"]),
    "talk": (["a man", "a woman", "a child", "a teacher", "a girl", "a boy"],
             ["a stone", "a table", "a tree", "a fish", "a shoe", "a ball", "a cow"]),
    "run": (["a horse", "a dog", "a cat", "a lion", "a boy", "a girl", "a fox", "a rabbit", "a zebra"],
            ["a tree", "a table", "a fish", "a book", "a house", "a worm", "a snail"]),
    "climb trees": (["a cat", "a monkey", "a squirrel", "a child", "a bear"],
                    ["a cow", "a fish", "a horse", "an elephant", "a pig", "a whale"]),
}  # fmt: skip

LIVES = {
    "on a farm": ["cow", "horse", "sheep", "pig", "hen", "goat"], "in the sea": ["fish", "whale", "shark", "crab", "turtle"],
    "in the forest": ["fox", "deer", "bear", "owl", "squirrel", "wolf"], "in the jungle": ["tiger", "monkey", "snake", "parrot"],
    "in Africa": ["lion", "elephant", "giraffe", "zebra", "crocodile"], "in the desert": ["camel", "snake", "lizard"],
    "near a pond": ["frog", "duck", "goose", "swan"], "in a house with people": ["dog", "cat", "goldfish", "rabbit"],
}  # fmt: skip

OPPOSITES = [
    ("big", "small"), ("hot", "cold"), ("up", "down"), ("day", "night"), ("happy", "sad"), ("good", "bad"), ("old", "young"),
    ("fast", "slow"), ("tall", "short"), ("long", "short"), ("wet", "dry"), ("light", "dark"), ("heavy", "light"),
    ("open", "closed"), ("full", "empty"), ("in", "out"), ("left", "right"), ("hard", "soft"), ("rich", "poor"),
    ("clean", "dirty"), ("strong", "weak"), ("loud", "quiet"), ("early", "late"), ("first", "last"), ("new", "old"),
    ("sweet", "sour"), ("near", "far"), ("high", "low"), ("thick", "thin"), ("wide", "narrow"), ("easy", "hard"),
    ("yes", "no"), ("begin", "end"), ("push", "pull"), ("give", "take"), ("love", "hate"), ("laugh", "cry"), ("win", "lose"),
    ("buy", "sell"), ("sit", "stand"), ("come", "go"), ("friend", "enemy"), ("summer", "winter"), ("black", "white"),
    ("north", "south"), ("east", "west"), ("right", "wrong"), ("brave", "afraid"), ("kind", "unkind"), ("awake", "asleep"),
    ("above", "below"), ("before", "after"), ("front", "back"), ("inside", "outside"), ("more", "less"), ("true", "false"),
    ("sharp", "blunt"), ("smooth", "rough"), ("sick", "healthy"), ("on", "off"), ("top", "bottom"), ("morning", "evening"),
]  # fmt: skip

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
]  # fmt: skip
SEASONS = {
    "spring": "In spring it gets warmer, the flowers grow and the birds build their nests.",
    "summer": "In summer the sun is hot, the days are long and children like to swim.",
    "autumn": "In autumn the leaves turn red and yellow and fall from the trees.",
    "winter": "In winter it is cold, the days are short and there may be snow.",
}
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip
SHAPES = {
    "triangle": "A triangle has three sides.", "square": "A square has four sides, and they are all the same length.",
    "rectangle": "A rectangle has four sides.", "circle": "A circle is round and has no corners.",
    "pentagon": "A pentagon has five sides.", "hexagon": "A hexagon has six sides.", "star": "A star has points.",
}  # fmt: skip

BODY = {
    "see": "eyes", "hear": "ears", "smell": "nose", "taste": "tongue", "walk": "legs", "hold things": "hands",
    "bite": "teeth", "think": "brain", "kick a ball": "feet", "eat": "mouth", "breathe": "lungs", "point": "fingers",
    "write": "hands", "clap": "hands", "run": "legs", "smile": "mouth",
}  # fmt: skip
MADE_OF = {
    "bread": "flour and water", "butter": "milk", "cheese": "milk", "a chair": "wood", "a window": "glass", "paper": "wood",
    "a book": "paper", "a jumper": "wool", "a shoe": "leather", "a key": "metal", "a wall": "bricks", "ice": "frozen water",
    "a snowman": "snow", "a cake": "flour, eggs, butter and sugar", "jam": "fruit and sugar", "a pot": "clay",
    "a table": "wood", "a coin": "metal", "a candle": "wax", "soup": "water and vegetables", "a nest": "twigs and grass",
    "an omelette": "eggs", "chips": "potatoes", "a shirt": "cloth", "a sandcastle": "sand", "honey": "the juice of flowers",
    "a bottle": "glass", "a bicycle": "metal and rubber", "a salad": "fresh vegetables", "apple juice": "apples",
}  # fmt: skip
KINDS = {
    "fruit": ["apple", "banana", "pear", "orange", "plum", "cherry", "grape", "mango", "peach", "strawberry"],
    "vegetable": ["carrot", "potato", "cabbage", "onion", "pea", "bean", "cucumber", "pumpkin"],
    "animal": ["dog", "cat", "cow", "horse", "lion", "bear", "mouse", "elephant", "rabbit", "fox"],
    "bird": ["owl", "crow", "duck", "eagle", "swan", "robin", "parrot", "hen", "penguin"],
    "colour": ["red", "blue", "green", "yellow", "white", "black", "brown", "pink", "orange"],
    "flower": ["rose", "daisy", "tulip", "lily", "violet", "sunflower"],
    "tree": ["oak", "apple tree", "pine", "willow", "palm", "birch"],
    "drink": ["water", "milk", "tea", "juice", "lemonade"],
    "insect": ["bee", "ant", "fly", "butterfly", "beetle"],
    "toy": ["ball", "doll", "kite", "drum", "puzzle", "teddy bear"],
    "sport": ["football", "tennis", "swimming", "running", "skating"],
    "meal": ["breakfast", "lunch", "dinner"],
    "farm animal": ["cow", "horse", "sheep", "pig", "hen", "goat"],
    "pet": ["dog", "cat", "rabbit", "goldfish", "hamster"],
    "tool": ["hammer", "saw", "spade", "rake", "knife"],
    "instrument": ["drum", "flute", "piano", "guitar", "violin", "trumpet"],
    "vehicle": ["car", "bus", "train", "boat", "plane", "bicycle"],
}
JOBS = {
    "a doctor": "helps sick people to get well", "a teacher": "helps children to learn", "a farmer": "grows food and keeps animals",
    "a baker": "bakes bread and cakes", "a nurse": "takes care of sick people", "a cook": "makes food",
    "a firefighter": "puts out fires", "a policeman": "keeps people safe", "a driver": "drives a car or a bus",
    "a fisherman": "catches fish", "a gardener": "takes care of plants", "a tailor": "makes clothes", "a sailor": "works on a ship",
    "a pilot": "flies a plane", "a builder": "builds houses", "a singer": "sings songs", "a painter": "paints pictures",
    "a writer": "writes books", "a shopkeeper": "sells things in a shop", "a postman": "brings letters",
    "a dentist": "takes care of our teeth", "a vet": "takes care of sick animals", "a shepherd": "takes care of sheep",
    "a king": "rules a country", "a judge": "decides what is right by the law", "a barber": "cuts hair",
}  # fmt: skip
PLACES = {
    "buy bread": "at the bakery", "borrow a book": "at the library", "learn to read": "at school", "sleep": "in a bed",
    "see a doctor": "at the hospital", "catch a train": "at the station", "swim": "in the sea, a lake or a pool",
    "see wild animals": "in the forest or at the zoo", "buy vegetables": "at the market", "cook": "in the kitchen",
    "wash": "in the bathroom", "keep milk cold": "in the fridge", "plant flowers": "in the garden",
    "build a sandcastle": "on the beach", "play": "in the park", "keep money": "in a purse or in a bank",
    "post a letter": "at the post office", "see stars": "in the sky at night", "get on a plane": "at the airport",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "England": "London", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Russia": "Moscow",
    "China": "Beijing", "Japan": "Tokyo", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Greece": "Athens",
    "Portugal": "Lisbon", "Ireland": "Dublin", "the United States": "Washington", "Canada": "Ottawa",
}  # fmt: skip
DEFINITIONS = {
    "the sun": "The sun is a star. It gives us light and keeps us warm.",
    "the moon": "The moon is a big ball of rock that goes around the earth. We see it at night.",
    "a star": "A star is a big ball of hot, bright gas. It is very far away.",
    "the earth": "The earth is the planet we live on. It is round and goes around the sun.",
    "rain": "Rain is water that falls from the clouds.",
    "snow": "Snow is frozen water that falls from the clouds in winter.",
    "wind": "Wind is air that moves.",
    "a cloud": "A cloud is made of many tiny drops of water in the sky.",
    "a rainbow": "A rainbow is a bow of many colours in the sky. We see it when the sun shines through the rain.",
    "ice": "Ice is frozen water. It is hard and cold.",
    "a river": "A river is a lot of water that runs through the land to the sea.",
    "the sea": "The sea is a very big place full of salt water. Fish and whales live in it.",
    "a mountain": "A mountain is a very high hill.",
    "a forest": "A forest is a place where many trees grow.",
    "a desert": "A desert is a very dry place where few plants grow.",
    "an island": "An island is land with water all around it.",
    "a tree": "A tree is a tall plant with a trunk, branches and leaves.",
    "a flower": "A flower is the pretty part of a plant. Many flowers smell sweet.",
    "a seed": "A seed is a small thing that a new plant grows from.",
    "a book": "A book has pages with words and pictures. We read it.",
    "a school": "A school is a place where children learn.",
    "a house": "A house is a place where people live.",
    "a friend": "A friend is someone who likes you and helps you.",
    "a family": "A family is a group of people who belong together, like a mother, a father and their children.",
    "a clock": "A clock shows us the time.",
    "a car": "A car has four wheels and takes people from place to place.",
    "a train": "A train runs on rails and carries many people.",
    "a plane": "A plane flies through the air and carries people far away.",
    "a boat": "A boat carries people over the water.",
    "a bicycle": "A bicycle has two wheels. You push the pedals with your feet.",
    "a computer": "A computer is a machine that works with numbers, words and pictures.",
    "a language model": "A language model is a computer program that has learned to put words together.",
    "a llama": "A llama is an animal with soft wool and a long neck. It lives in the mountains of South America.",
    "bread": "Bread is food that is baked from flour and water.",
    "an apple": "An apple is a round fruit that grows on a tree. It can be red, green or yellow.",
    "a banana": "A banana is a long yellow fruit. It is soft and sweet.",
    "honey": "Honey is sweet food that bees make from flowers.",
    "milk": "Milk is a white drink. It comes from cows.",
    "water": "Water is what we drink. All plants, animals and people need it.",
    "fire": "Fire is hot and bright. It burns wood. Be careful with it!",
    "love": "Love is a warm feeling for someone you care about.",
    "a dream": "A dream is a story that you see while you sleep.",
    "a birthday": "A birthday is the day you were born. Many people have a cake and a party.",
    "music": "Music is sounds put together so that they are nice to hear.",
    "a king": "A king is a man who rules a country.",
    "a queen": "A queen is a woman who rules a country, or the wife of a king.",
    "a farm": "A farm is a place where people grow food and keep animals.",
    "a garden": "A garden is a place where flowers and vegetables grow.",
    "a city": "A city is a very big town with many houses and many people.",
    "a shadow": "A shadow is the dark shape behind you when light shines on you.",
    "air": "Air is all around us. We breathe it, but we cannot see it.",
    "a dragon": "A dragon is a big animal in stories. It can fly and breathe fire. Dragons are not real.",
    "a fairy": "A fairy is a tiny person with wings in stories. Fairies are not real.",
    "a story": "A story tells us about things that happened to someone. It may be true or made up.",
    "a letter": "A letter is a message on paper. Letters are also the signs we write words with.",
    "a week": "A week is seven days long.",
    "a year": "A year has twelve months and 365 days.",
    "school": "School is the place where children learn to read and write.",
    "winter": "Winter is the cold season of the year.",
    "night": "Night is the time when it is dark and most people sleep.",
}
WHY = {
    "do we sleep": "We sleep because our body and our mind need to rest.",
    "do we eat": "We eat because food makes us strong and helps us grow.",
    "do we drink water": "We drink water because our body needs it to live.",
    "do birds fly": "Birds fly to find food and to get away from danger.",
    "does it rain": "It rains when the drops of water in a cloud get too heavy and fall down.",
    "do we go to school": "We go to school to learn to read, to write and to count.",
    "do leaves fall": "Leaves fall in autumn because the trees rest in winter.",
    "do bees visit flowers": "Bees visit flowers to find sweet juice for their honey.",
    "do we wash our hands": "We wash our hands to get rid of dirt, so that we do not get sick.",
    "do we brush our teeth": "We brush our teeth to keep them clean and healthy.",
    "is the sky blue": "The sky is blue because the air spreads the blue light of the sun all around.",
    "is it dark at night": "It is dark at night because our side of the earth is turned away from the sun.",
    "do people wear coats": "People wear coats to stay warm when it is cold.",
    "do dogs bark": "Dogs bark to tell us something, or when they hear a noise.",
    "do cats purr": "Cats often purr when they are happy.",
    "do babies cry": "Babies cry because they cannot talk yet. They may be hungry or tired.",
    "do we need the sun": "We need the sun because it gives us light and keeps us warm.",
    "do plants need water": "Plants need water to live and to grow.",
    "do we laugh": "We laugh when something is funny or when we are happy.",
    "does ice melt": "Ice melts when it gets warm. Then it turns into water.",
}
LIKE_TO = {
    "when it rains": "you can take an umbrella, or stay inside and read a book",
    "when it is cold": "you can put on a warm coat and drink hot tea",
    "when it is hot": "you can sit in the shade and drink cold water",
    "when it snows": "you can build a snowman",
    "when you are hungry": "you can eat some bread, soup or fruit",
    "when you are thirsty": "you can drink a glass of water",
    "when you are tired": "you can go to bed and sleep",
    "when you are sad": "you can talk to a friend",
    "when you are bored": "you can read a book, draw a picture or go out to play",
    "when you are sick": "you can stay in bed and see a doctor",
    "when you are lost": "you can ask a policeman or a kind person for help",
    "on a sunny day": "you can go to the park and play",
    "in winter": "you can play in the snow and drink hot chocolate",
    "at the beach": "you can swim and build a sandcastle",
    "before you eat": "you should wash your hands",
    "when you cross the street": "you should look left and right first",
}
UNKNOWN = [
    "who won the {game|race|match|election|world cup} {yesterday|last year|in 1998|in 2020}",
    "what time is it{ now|}", "what is the {date|day} today", "what is the weather {today|like today|tomorrow|in Paris}",
    "what is my name", "how old am I", "where do I live", "what am I thinking", "who is my {teacher|father|best friend}",
    "what is the price of {gold|bread|a car|oil|a house}", "who wrote {Hamlet|this book|the Iliad|War and Peace}",
    "what is {quantum physics|relativity|a black hole|inflation|algebra|a blockchain|photosynthesis|calculus|democracy}",
    "who is {Albert Einstein|the president|the prime minister|Napoleon|Shakespeare|Mozart|the mayor of London}",
    "how far is {the moon|the sun|Mars|New York|London}", "what is {237 times 41|12345 plus 6789|the square root of 2|9 to the power of 9}",
    "when did the {war|battle|revolution} {begin|end}", "when was {Mozart|my mother|the king of Spain|Newton} born",
    "how {do|can} I {fix my car|cook a goose|build a rocket|get rich|learn Chinese|repair a computer|fly a plane}",
    "how many people live in {China|Paris|Africa|my town|the world}", "what happened {in 1789|in 1914|yesterday|in Rome}",
    "write {a program|some code|a Python function|an essay about history|a letter to the bank|a computer game}{ for me|}",
    "translate this into {French|German|Chinese|Spanish}", "what is the meaning of life", "what will happen tomorrow",
    "can you {call my mother|open the door|play a song|drive a car|send an email|book a flight|turn on the light}",
    "what is the {tallest|oldest|biggest} {building|city|bridge|company} in {America|Europe|China|the world}",
    "who invented the {telephone|radio|wheel|computer|light bulb}", "what is the news{ today|}", "which medicine should I take",
    "what is the capital of {Bolivia|Norway|Mongolia|Ghana|Peru|Iceland|Nepal|Cuba}", "what is in my {pocket|bag|hand}",
]  # fmt: skip
