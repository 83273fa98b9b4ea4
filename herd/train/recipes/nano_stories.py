"""Story requests and stories for herd-nano: short real stories, and plots told in many ways. Plots written for this project.

A plot is a text with {a|b} choices and names in angle brackets: <N> the hero's name, <K> what the hero is ("dog"), <A> an adjective,
<he> <him> <his> <He> <His> pronouns, <F> <G> a friend's name and kind, <P> a place, <E> food, <T> a thing. The same story can so be told
many thousand times without being the same text twice.
"""

# ruff: noqa: E501  (tables and texts read better one entry to a line)
from __future__ import annotations

import random
import re
from typing import NamedTuple

from herd.data.records import ChatRecord
from herd.train.recipes.nano_talk import NAMES
from herd.train.recipes.nano_texts import Text
from herd.train.recipes.nano_wording import expand, vary, with_article

__all__ = ["HEROES", "THINGS", "made_story", "real_stories", "story_rows"]

HEROES = (
    "dog", "cat", "mouse", "rabbit", "bear", "fox", "lion", "elephant", "bird", "duck", "frog", "horse", "cow", "pig", "sheep", "goat",
    "monkey", "squirrel", "hedgehog", "turtle", "owl", "tiger", "wolf", "hen", "donkey", "giraffe", "penguin", "crow", "snail", "bee",
    "ant", "butterfly", "fish", "whale", "puppy", "kitten", "lamb", "chick", "dragon", "boy", "girl", "king", "queen", "prince", "princess",
    "farmer", "fairy", "giant", "robot", "child", "llama", "zebra", "deer", "kangaroo", "parrot", "goose", "camel", "crocodile", "spider",
    "fisherman", "baker", "sailor", "witch", "wizard", "dinosaur", "bunny", "pony", "teacher", "unicorn", "snake", "mermaid", "knight",
)  # fmt: skip
HUMAN = {
    "boy": "he", "girl": "she", "king": "he", "queen": "she", "prince": "he", "princess": "she", "farmer": "he", "fairy": "she", "giant": "he",
    "fisherman": "he", "baker": "he", "sailor": "he", "witch": "she", "wizard": "he", "hen": "she", "cow": "she", "teacher": "she",
    "mermaid": "she", "knight": "he",
}  # fmt: skip
THINGS = (
    "ball", "boat", "train", "car", "kite", "hat", "book", "doll", "tree", "flower", "star", "cloud", "teddy bear", "bus", "drum", "balloon",
    "bicycle", "snowman", "house", "plane", "clock", "lamp", "rocket", "shoe", "leaf", "moon", "sun", "river", "rainbow", "apple", "cake",
)  # fmt: skip
GOOD_SHARE = (
    "mouse",
    "dog",
    "cat",
    "bird",
    "frog",
    "rabbit",
    "squirrel",
    "hedgehog",
    "duck",
    "turtle",
    "sheep",
    "goat",
    "boy",
    "girl",
)
NAMES_OF = {
    "he": ("Tom", "Ben", "Sam", "Jack", "Peter", "Max", "Paul", "Leo", "David", "John", "Adam", "George", "Luke", "Henry", "Tim", "Bobby", "Rex"),
    "she": ("Anna", "Mary", "Lucy", "Emma", "Rosa", "Lily", "Nina", "Sara", "Kate", "Mia", "Eva", "Jane", "Ruth", "Grace", "Alice", "Daisy", "Molly"),
}  # fmt: skip
ADJECTIVES = (
    "little",
    "small",
    "young",
    "brave",
    "kind",
    "happy",
    "clever",
    "lonely",
    "curious",
    "funny",
    "gentle",
    "quiet",
    "old",
)
PLACES = (
    "in a small house near the forest", "in a village by the river", "on a farm on a hill", "in a little town by the sea",
    "in a green valley", "in the big forest", "in a garden full of flowers", "in a land far away", "in a house with a red roof",
    "in the woods behind the mill", "near a lake", "on a small island", "at the foot of a mountain",
)  # fmt: skip
FOODS = (
    "bread",
    "a red apple",
    "a piece of cake",
    "some nuts",
    "a pear",
    "some berries",
    "a carrot",
    "some cheese",
    "a sweet bun",
)
TREASURES = (
    "ball",
    "hat",
    "key",
    "ring",
    "bell",
    "red scarf",
    "drum",
    "kite",
    "book",
    "blue cup",
    "flute",
    "lamp",
    "basket",
)

OPEN = (
    "{Once upon a time there was|Once there was|There was once|Long ago there lived|Once upon a time there lived} a <A> <K> {named|called} <N>. "
    "<He> lived <P>{.|, and everyone knew <him>.|, and <he> was happy there.} "
)
PLOTS = (
    # lost
    "{One day|One sunny day|One fine morning} <N> went for a walk. <He> saw a {yellow butterfly|red leaf in the wind|shiny blue beetle} and ran after it. <He> ran and ran, and "
    "<he> did not look where <he> was going. {Soon|After a while} <he> was lost. \"Oh dear,\" said <N>, \"{I do not know the way home|I want to go home}.\" <He> sat down and {began to cry|was very sad}.\n\n"
    "{Just then|At that moment} a <G> came by. \"{Why are you crying?|What is the matter?}\" asked the <G>. \"I am lost,\" said <N>. \"{Do not be afraid|Do not cry},\" said the <G>. \"I know the way. Come with me!\" "
    "They walked {past the mill and over the bridge|through the trees and over the hill|along the river}, and {soon|before long} <N> saw <his> home.\n\n"
    "\"Thank you!\" said <N>. {From that day on the two were good friends.|<He> gave the <G> <E>, and they became good friends.|And after that <he> always looked where <he> was going.}",
    # share
    "{One day|One morning|One cold day} <N> found <E>. \"{How lucky I am|What a good day}!\" <he> said. \"I will {eat this|have this for my dinner}.\" But then <he> saw a {hungry|thin|tired} <G> {sitting by the road|under a tree}. "
    "\"I have had nothing to eat {today|all day|since yesterday},\" said the <G>.\n\n<N> looked at <his> food and thought {about it|for a while}. Then <he> said, \"{Let us share|You can have half of it}.\" So they {sat down and ate|ate it} together, and it tasted {very good|better than ever}.\n\n"
    "{A few days later|The next week|Some time later} <N> fell into a {deep hole|hole in the ground}. \"Help! Help!\" <he> cried. The <G> heard <him> and came running. <F> was the name of the <G>, and <F> pulled <N> out. \"{You were kind to me|You shared with me},\" said <F>, \"{and now I can help you|so I am glad to help you}.\" {They were friends for ever.|And so they became the best of friends.}",
    # dark
    "<N> had one trouble: <he> was afraid of the dark. {Every night|When the sun went down} <he> {hid under the blanket|kept <his> eyes shut}. One night there was a noise outside. Tap, tap, tap! \"{Who is there?|What can that be?}\" whispered <N>.\n\n"
    "<He> was very frightened, but <he> {got up|took a little lamp} and opened the door. There stood a little <G>, {wet and cold|shaking with cold}. \"{May I come in?|Please let me in,}\" said the <G>. \"I am afraid of the dark.\"\n\n"
    "{Then <N> laughed|<N> smiled}. \"I am afraid of it too,\" <he> said. \"{Let us be brave together|But two are braver than one}.\" {They drank warm milk and told each other stories|They sat by the fire and told each other stories} until they fell asleep. {After that night <N> was not afraid of the dark any more.|And from that night on the dark was not so dark.}",
    # friend
    "<He> had {a nice home|everything <he> needed}, but <he> had no friend to play with. \"I wish I had a friend,\" said <N>. {One day|One morning} <he> went out to look for one.\n\nFirst <he> met a {proud peacock|busy bee|big old ox}. \"{Will you be my friend|Will you play with me}?\" asked <N>. \"{I have no time|Go away, I am busy},\" {was the answer|it said}. Then <he> met a {sleepy cat|slow snail|fat toad}. But it only said, \"{I want to sleep|Not today}.\"\n\n"
    "<N> was {sad|very sad} and sat down {by the pond|under a big tree}. There <he> heard {a small voice|someone singing}. It was a <G> {called|named} <F>. \"{I am all alone too|I have no friend},\" said <F>. \"{Let us play together!|Will you play with me?}\" So they {played all day long|ran and jumped and laughed until the evening}. {And they have been friends ever since.|Now <N> had a friend, and <he> was never lonely again.}",
    # lost thing
    "<N> had a <T> that <he> loved {very much|more than anything}. {But one day|One morning} the <T> was gone. <He> looked under the bed. <He> looked {behind the door|in the garden}. It was not there. \"{Where is my <T>?|Who has seen my <T>?}\" cried <N>.\n\n"
    "<He> asked the <G>. \"{I have not seen it|No, I did not see it},\" said the <G>, \"but {I will help you look for it|let us look for it together}.\" They {looked and looked|went up the hill and down again}. At last they {heard a noise in a bush|came to a big tree}. There {sat a little bird|was a little bird}, and in its nest lay the <T>!\n\n"
    "\"{I am sorry|Please do not be angry},\" said the bird. \"I thought that nobody wanted it.\" <N> {was not angry|smiled}. \"{You can look at it every day|We can all play with it},\" <he> said, \"{but it lives with me|but please ask me first}.\" {And that is what they did.|Then they all went home and had tea.}",
    # rain
    "{One day|One afternoon} {it began to rain|dark clouds came and it rained very hard}. <N> ran {as fast as <he> could|quickly} and found a {big mushroom|hollow tree|little cave}. \"{Here it is dry|Now I am safe from the rain},\" said <N>. Then a wet <G> came. \"{May I come in too?|Is there room for me?}\" \"{Of course|Yes, come in},\" said <N>, and <he> made room.\n\n"
    "{Soon|After a while} a {mouse|beetle|hen} came, and then a {hare|robin|lamb}. \"{Is there room for me?|May I come in?}\" they asked. It was very {small|narrow}, but {everyone moved a little|they all sat close together}, and it was {warm|nice and warm}.\n\nWhen the rain stopped, {a rainbow stood in the sky|the sun came out again}. \"{Where there is a kind heart, there is always room|There is always room for a friend},\" said the <G>. {And they all went home happy.|They all laughed and went home together.}",
    # learn
    "All the others could {swim|whistle|dance|climb|sing}, but <N> could not. {<He> tried once, and <he> fell.|<He> tried and tried, but it did not work.} The others laughed. \"{I will never learn it|I cannot do it},\" said <N>, and <he> {went home sadly|was very sad}.\n\n"
    "{But <his> grandmother said|Then an old <G> said to <him>|But <his> mother said}, \"{Nobody can do it the first time|You must try a little every day}.\" So <N> got up early and tried again. On Monday <he> could not do it. On Tuesday <he> could do it a little. {And on Sunday|By the end of the week} <he> could do it {very well|better than all the others}!\n\n"
    "{Everyone clapped|Now nobody laughed any more}. \"{How did you learn it?|How did you do it?}\" they asked. \"I {fell down many times|tried many times},\" said <N>, \"{but I always got up again|and I did not give up}.\"",
    # nest
    "{One day|One spring morning} <N> {heard a cry|heard a little voice} in the grass. There lay a tiny bird. It had fallen out of its nest. \"{Cheep, cheep|Please help me},\" it said. <N> {looked up|saw the nest}. The tree was very high.\n\n"
    "<He> could not climb so high alone. So <he> called <his> friend <F> the <G>. \"{I will carry you on my back|Stand on my back},\" said <F>. {<N> held the little bird very carefully|Very carefully <N> took the bird} and put it back into the nest. {The mother bird came home|Just then the mother bird came home} and {was so glad that she sang|thanked them with a song}.\n\n"
    "{And every morning|Every day after that} the bird sang at the window of <N>, {and <N> was happy|to say thank you}.",
    # sorry
    "{One day|One morning} <N> saw <E> on the table of <his> neighbour, the <G>. {It smelled so good|It looked so good} that <he> {took it and ate it|ate it all up}. Then the <G> came home. \"{Who has eaten my dinner?|Where is my food?}\" asked the <G>. \"{It was not me|I do not know},\" said <N>.\n\n"
    "But that night <N> could not sleep. {<His> heart felt heavy.|<He> felt bad.} {In the morning|When the sun came up} <he> went to the <G>. \"It was me,\" <he> said. \"{I took it, and I told a lie|I ate it}. I am sorry.\"\n\nThe <G> looked at <him>. \"{It is brave to tell the truth|I am glad that you told me},\" said the <G>. Then they {baked a big cake|cooked a good soup} together, and {there was enough for both|they ate it together}. {<N> never told a lie again.|And <N> slept very well that night.}",
    # birthday
    "{It was the birthday of <N>|One morning <N> woke up and it was <his> birthday}, but nobody said a word. <He> met the <G>. \"{Good morning|Hello},\" said the <G>, and ran away. <He> met the <M>. \"{I am busy|I have no time},\" said the <M>.\n\n\"{Everyone has forgotten me|They all forgot my birthday},\" thought <N>, and <he> walked {slowly|sadly} home. <He> opened the door. {It was dark inside.|It was very quiet.} Then somebody cried, \"Happy birthday, <N>!\"\n\n"
    "{There they all were|All <his> friends were there}! They had {a big cake|a cake with candles} and a new <T> for <him>. {<N> laughed and cried at the same time|<N> had never been so happy}. \"{I thought that you had forgotten|You are the best friends of all},\" <he> said. {They danced and sang until the stars came out.|And they ate the whole cake.}",
    # wish
    "{Every night|In the evening} <N> looked up at {the moon|the stars}. \"{I wish I could fly up to you|How I would like to visit you},\" <he> said. {One night|One clear night} a {star|little star} fell down {into the garden|right in front of <him>}. It was {small and bright|as small as a nut}. \"{I have lost my way|I want to go home},\" said the star.\n\n"
    "{<N> thought hard|<N> wanted to help}. <He> called the <G>, and together they {climbed the highest hill|built a long ladder}. There <N> {threw the star up as high as <he> could|lifted the star up}, and the wind {took it and carried it|carried it} back into the sky.\n\n\"{Thank you|Thank you, <N>},\" called the star. {And every night since then|Now every evening} it {winks at <N>|shines a little brighter for <N>}, {and <N> winks back|and <N> waves to it before <he> goes to sleep}.",
    # race
    "{One day|One summer day} there was a {race|big race}. A {proud hare|quick fox|vain horse} said to <N>, \"{You are too slow|You can never win}.\" But <N> said, \"{We will see|I will try}.\" One, two, three, and they ran!\n\n{The other was soon far ahead|Soon <N> was far behind}. But {on the way|beside the road} <N> saw a <G> {who had hurt a foot|who was stuck in the mud}. {<N> stopped at once|<He> did not think of the race any more}. <He> helped the <G> to get up and {carried it|walked with it} slowly {to the end|along the road}.\n\n"
    "{Everyone was waiting there.|They came last of all.} \"{You have lost|You are last},\" laughed the other. But the old {owl|king|bear} said, \"{The one who helps a friend is the real winner|A kind heart is better than quick feet}.\" And the prize went to <N>.",
    # seed
    "{One day|In spring} <N> found a {little|tiny} seed. \"{What can that be?|What will grow from it?}\" <he> asked. <He> put it into the ground and gave it water. {The next day|In the morning} <he> looked, but there was nothing. \"{You must wait|Wait a little},\" said the <G>.\n\n<N> waited. {The sun shone and the rain fell.|It rained, and then the sun shone.} Then one morning there was a {small|tiny} green leaf! It grew and grew. {Soon it was as tall as <N>|It grew as high as the house}. In summer it had a {big yellow|beautiful red} flower.\n\n"
    "\"{How beautiful it is!|Look at my flower!}\" cried <N>. In autumn the flower gave <him> a hundred seeds. {<He> gave one to each of <his> friends|<N> gave them to all <his> friends}, and {the next year|a year later} the whole {village|valley} was full of flowers.",
    # snow
    "{One morning|One winter morning} everything was white. It had snowed {all night|in the night}. \"{Snow! Snow!|Hooray, snow!}\" cried <N>, and <he> ran outside. <His> friend the <G> came too. They {threw snowballs|rolled in the snow} and {built a big snowman|made a snowman with a carrot nose}.\n\n{But then|After a while} <N> saw that the snowman {looked sad|was all alone}. \"{He is cold|He needs a friend},\" said <N>. So they gave him {a warm scarf|an old hat} and built {a second snowman|a little snow dog} beside him. {Now he was smiling.|Now they both smiled.}\n\n"
    "{When it got dark|In the evening} the two friends went inside and drank hot {milk|chocolate}. {Through the window they saw the snowman|They looked out of the window}. {And it looked as if he waved to them.|\"Good night,\" they said to the snowman, and they went to bed.}",
    # soup
    "{One day|One cold morning} <his> friend the <G> was {sick|ill} and {had to stay|lay} in bed. \"{I must help|I will make some soup},\" said <N>. <He> took water, {carrots and beans|onions and peas}, and a little salt. {The soup smelled good|Soon the soup was hot}, and <N> carried it {through the wind and the rain|all the way over the hill}.\n\n"
    "{Knock, knock!|<He> knocked at the door.} \"Who is there?\" asked the <G> in a weak voice. \"It is me, <N>. {I have brought you some soup|I made you some soup}.\" The <G> {ate it all up|ate and ate} and {felt warm again|began to feel better}. Then <N> {read a story|sang a song} until the <G> fell asleep.\n\n{The next day|After two days} the <G> was well again. \"{Your soup was good|The soup helped me},\" said the <G>, \"{but a good friend is the best medicine|but you were the best medicine}.\"",
    # noise
    "{One night|Late one night} <N> woke up. There was a {strange|terrible} noise. Boom, boom, boom! \"{A monster!|It is a giant!}\" thought <N>. <He> ran to the <G>. \"{Wake up|Come quickly},\" <he> said. \"There is a monster outside!\"\n\nThe two {went out very quietly|took a stick and went out}. Boom, boom! It came from {behind the barn|the old shed}. They {looked around the corner|opened the door slowly}. {And what did they see?|There was no monster at all.} {It was only the wind|The wind was playing with the door}! The door opened and closed, boom, boom, boom.\n\n"
    "{They laughed so much that they had to sit down.|How they laughed!} <N> shut the door, and {it was quiet|all was quiet again}. \"{Good night, monster|Sleep well, monster},\" said the <G>, and they went back to bed.",
    # help strong
    "{One day|One hot day} a {big stone|heavy branch} lay {on the road|in front of the house}, and nobody could get past. {The horse pulled, but it did not move.|The bear pushed, but it did not move.} \"{Let me try|May I help},\" said <N>. Everyone laughed. \"{You are much too small|You? You are not strong}!\"\n\n\"{Alone I am not strong|Nobody is strong enough alone},\" said <N>, \"{but together we are|but we can all push together}.\" So they all stood side by side: <N>, the <G>, the horse and the bear. One, two, three! {The stone began to roll|It moved a little}, and then it {rolled away|was gone}.\n\n"
    "\"{We did it!|Hooray!}\" they all cried. {And nobody laughed at <N> any more.|\"That was a clever thought,\" said the <G> to <N>.}",
    # mud
    "{One day|One morning} <N> wanted to look fine. <He> {brushed <his> coat|washed <his> face} and put on a red scarf. \"{Now I am the finest <K> of all|Look at me, how fine I am},\" <he> said to the <G>. {And <he> walked|Then <he> went} down the road with <his> nose in the air.\n\n"
    "But <he> did not {see|look at} the {big puddle|mud on the road}. Splash! <N> {fell right into it|was brown from head to foot}. {Everyone looked|All was quiet}. Then <N> {began to laugh|laughed out loud}. \"{Now I am the dirtiest <K> of all|Brown is a fine colour too},\" <he> said. The <G> laughed too and {jumped into the mud|jumped in beside <him>}.\n\n"
    "{They played until the evening.|What fun they had!} At home <N> {had a warm bath|was washed with warm water}. \"{It is nice to be fine|To be clean is nice},\" said <N>, \"{but it is nicer to have fun|but to play with a friend is nicer}.\"",
    # picnic with map
    "{One day|One rainy day} <N> found an old {map|letter} in {the attic|a box}. {There was a red cross on it.|It showed a path and a red cross.} \"{A treasure|There must be a treasure},\" {cried|said} <N>. <He> ran to <his> friend <F> the <G>, and together they {set out|went to look for it}.\n\n"
    "They went {over the bridge|through the dark wood} and {up the steep hill|past the old mill}. They were {tired and hungry|very tired}, but they did not turn back. At last they came to a {big stone|hollow tree}. {Here was the place!|\"Here it is,\" said <F>.} They dug and dug, and {they found a little box|there was a box}. In it lay {a piece of paper|a letter}. <N> read: \"{The best treasure is a good friend|A good friend is worth more than gold}.\"\n\n"
    "<N> looked at <F>, and {they both smiled|both began to laugh}. \"{Then we found it long ago|Then I have it already},\" said <N>. {They ate their bread under the tree and went home singing.|And they walked home side by side.}",
    # tooth / loud voice
    "<N> had a very {small|quiet} voice. When <he> {spoke|said something}, nobody heard <him>. \"{Speak up|What did you say},\" {they all said|everyone said}. So <N> {said nothing more|stopped talking}.\n\n"
    "{One night|One evening} <N> could not sleep. <He> looked out and saw {smoke|a fire} at the house of the <G>. {Everyone was asleep.|Nobody was awake.} \"{Wake up|Help}!\" said <N>, but nobody heard. Then <he> took a deep breath and shouted as loud as <he> could, \"{Fire! Fire!|Wake up! Fire!}\"\n\n"
    "{Now they all woke up|Everyone heard it} and came running with water, and the fire was put out. \"{You have saved me|You saved my house},\" said the <G>. \"{I did not know that you could shout so loud|What a big voice you have}!\" \"{I did not know it either|Nor did I},\" said <N>, {and then everyone laughed|and <he> was very proud}.",
    # bake
    "{It was|It was a cold} Sunday, and <N> wanted to bake a cake. <He> {took a big bowl|lit the stove}. But there was {no flour|nothing in the house}. So <he> went to the <G>. \"{I have flour|You can have my flour},\" said the <G>, \"{may I help you|let me come with you}.\" But they had no eggs. So they went to the hen. \"{I have eggs|Here are three eggs},\" said the hen, \"{may I come too|I will come with you}.\"\n\n"
    "{The cow gave them milk, and the bee gave them honey.|They got milk from the cow and honey from the bee.} Soon the kitchen was full. {They stirred and stirred|Everyone helped}, and {the cake went into the oven|<N> put the cake into the oven}. {How good it smelled!|It smelled sweet.}\n\n"
    "When the cake was ready, it was {big and golden|as big as a wheel}. {Everyone got a piece.|They cut it into five pieces.} \"{It is the best cake in the world|I never ate a better cake},\" said the <G>. \"{That is because we all made it|Because we made it together},\" said <N>.",
    # moving away
    "{One day|In autumn} <his> best friend <F>, {a|the little} <G>, {had to move away|was going far away}. \"{I will miss you|Who will play with me now},\" said <N>, and {a tear ran down <his> face|both of them cried}. <F> gave <him> a <T>. \"{When you look at it, think of me|So you will not forget me},\" said <F>.\n\n"
    "{Winter came|The days were long}, and <N> was alone. Every {evening|day} <he> looked at the <T>. Then one day {the postman brought a letter|a letter came}. \"Dear <N>, {I think of you every day|I miss you too}. {Come and visit me|I will come in spring}. Your friend <F>.\" <N> {read it ten times|was so happy that <he> danced}.\n\n"
    "When spring came, they {met again|saw each other again}. {They ran to each other and laughed|How they laughed and talked}! \"{A friend is a friend, near or far|Good friends stay friends, even far away},\" said <N>.",
)  # fmt: skip

THING_PLOTS = (
    "{Once upon a time|Once} there was a little <T>. {It was not very big|It was old}, but it {was very brave|had a good heart}. {All the other <T>s were bigger, and they laughed|The others laughed} at it. \"{You are too small|You can do nothing},\" they said.\n\n"
    "{One day|One night} a {boy|girl} named <N> came by and was crying. \"{I need help|Who can help me},\" said <N>, \"{my little dog is lost|I cannot find my mother}.\" The big ones {did not listen|said nothing}. But the little <T> said, \"{I will help you|Come with me}!\"\n\nTogether they looked {everywhere|behind every tree}, and {at last|after a long time} they {found what they were looking for|were lucky}. <N> {danced with joy|laughed again}. \"{You may be little|You are small},\" said <N>, \"{but you are the best <T> of all|but you are my friend}.\" {And the little <T> was very proud.|And from that day nobody laughed at the little <T>.}",
    "{Once there was|There was once} a {boy|girl} {named|called} <N>. {More than anything <N> loved a <T>|<N> had a <T>}. {Every day|Every morning} <N> looked at the <T> and {said good morning to it|smiled}. {One day|But one day} the <T> {was gone|was not there}. \"{Where is it?|Where can it be?}\" asked <N>.\n\n"
    "<N> asked {mother, but she|father, but he} did not know. <N> asked the <G>. \"{Look behind the hill|Go down to the river},\" said the <G>. So <N> {walked and walked|went a long way}. And there was the <T>! {It shone in the evening sun|It looked more beautiful than ever}.\n\n\"{I have missed you|There you are},\" said <N>. {They went home together|Then <N> went home with a happy heart}, and {that night|in the evening} <N> {slept very well|told everyone about it}.",
    "{Once upon a time|Long ago} two friends, <N> and <F>, {found|saw} a <T>. \"It is mine,\" said <N>. \"No, it is mine,\" said <F>. {They pulled this way and that way|They began to fight}. {They were so angry that they did not speak any more.|Soon both were crying.}\n\nThen an old {woman|man} came by and asked, \"{Why do you fight|What is the matter}?\" \"{We both want the <T>|We cannot share the <T>},\" they said. \"{What is a <T> good for without a friend?|A <T> is nice, but a friend is nicer,}\" said the old one.\n\n"
    "<N> looked at <F>, and <F> looked at <N>. \"{You may have it|Let us share it},\" they both said {at the same time|together}. Then they {laughed|had to laugh}. {From that day on the <T> belonged to both of them.|And they were friends again.}",
    "There was once an old <T>. {Nobody wanted it any more|Everyone had forgotten it}. It stood {all alone|alone} in {a corner|the rain} and {was sad|dreamed of better days}. \"{I am no good for anything|Nobody needs me},\" it thought.\n\n"
    "{One day|One morning} a little <G> {named|called} <N> came along. \"{What a fine <T>|What a beautiful <T>}!\" said <N>. \"{May I stay with you|Can I live here}? I have no home.\" {The old <T> was so glad|The <T> had never been so happy}. <N> {cleaned it and painted it red|made it clean and bright}, and soon it looked {like new|better than before}.\n\n"
    "{Now they were never alone again.|From then on they were always together.} And when {people passed by|somebody came by}, they said, \"{Look, what a lovely <T>|Who would have thought that the old <T> was so pretty}!\"",
    "<N> {got|was given} a <T> for <his> birthday. It was {red and blue|the most beautiful thing <he> had ever seen}. {<He> took it everywhere.|<He> did not let anyone touch it.} \"{May I play too|Can I see it},\" asked <his> {sister|brother|friend} <F>. \"No,\" said <N>, \"it is mine.\"\n\n"
    "So <N> played alone. {But it was not much fun|After a while it was boring}. <He> looked out of the window and saw the others. They {had only an old box|had nothing but a stick}, but they {laughed and laughed|had so much fun}. <N> {thought for a while|felt sorry}. Then <he> {took the <T> and went outside|went out to them}.\n\n"
    "\"{Do you want to play with my <T>|Shall we all play with my <T>}?\" <he> asked. {They all shouted with joy.|\"Yes!\" they cried.} {It was the best day of all.|And <N> found out that it was twice as nice to share.}",
)  # fmt: skip

ASKS = (
    "tell me a story about <X>", "tell me a story about <X>", "tell me a short story about <X>", "can you tell me a story about <X>",
    "write a story about <X>", "write a short story about <X>", "please tell me a story about <X>", "I would like a story about <X>",
    "I want to hear a story about <X>", "tell a story about <X>", "make up a story about <X>", "do you know a story about <X>",
    "give me a story about <X>", "tell me a bedtime story about <X>", "a story about <X>", "tell us a story with <X>",
    "could you tell me a little story about <X>", "can you write a story about <X>", "story about <X>", "tell me about <X> in a story",
    "tell me a nice story about <X>", "I want a story about <X>", "write me a story about <X>", "tell me a tale about <X>",
)  # fmt: skip
ANY = (
    "tell me a story", "tell me a short story", "can you tell me a story", "please tell me a story", "tell me a bedtime story", "write a story",
    "I want to hear a story", "do you know a story", "tell me another story", "a story, please", "read me a story", "tell us a story", "once upon a time",
    "make up a story", "tell me something nice", "I would like to hear a story",
)  # fmt: skip


_QUESTION = re.compile(r'"((?:who|where|why|can|may|will|shall|what(?! an? ))\b[^"?!.]*)[,.]"', re.IGNORECASE)


def _fill(plot: str, slots: dict[str, str]) -> str:
    text = _QUESTION.sub(r'"\1?"', re.sub(r"<(\w+)>", lambda m: slots[m[1]], plot))
    return re.sub(r" +", " ", re.sub(r"\ba(?= [aeiou])", "an", re.sub(r"\bA(?= [aeiou])", "An", text))).strip()


class Told(NamedTuple):
    """A story, what it is about, and whom it names. `friend` is the kind of the second figure."""

    topic: str
    name: str
    friend: str
    story: str


def made_story(rng: random.Random, topic: str | None = None) -> Told:
    """A hero's plot, or a thing's when `topic` is a thing; a topic is drawn when none is given."""
    if topic is None:
        topic = rng.choice(HEROES) if rng.random() < 0.82 else rng.choice(THINGS)
    pronoun = HUMAN.get(topic) or rng.choice(("he", "she"))
    name = rng.choice(NAMES_OF[pronoun])
    friend = rng.choice([n for n in NAMES if n != name])
    kind = rng.choice([k for k in GOOD_SHARE if k != topic])
    him, his = ("him", "his") if pronoun == "he" else ("her", "her")
    slots = {
        "N": name, "K": topic, "A": rng.choice(ADJECTIVES), "he": pronoun, "him": him, "his": his, "He": pronoun.capitalize(),
        "His": his.capitalize(), "F": friend, "G": kind, "P": rng.choice(PLACES), "E": rng.choice(FOODS), "T": rng.choice(TREASURES),
        "M": rng.choice([k for k in ("hen", "cow", "cat", "crow", "pony") if k not in (topic, kind)]),
    }  # fmt: skip
    if topic in THINGS:
        slots["T"] = topic
        if topic in ("moon", "sun"):
            plot = THING_PLOTS[1].replace("a <T>", "the <T>")
        else:
            plot = rng.choice(THING_PLOTS)
    else:
        plot = OPEN + rng.choice(PLOTS)
    return Told(topic, name, kind, _fill(expand(plot, rng), slots))


def _ask(topic: str, rng: random.Random, told: Told | None = None) -> str:
    noun = f"the {topic}" if topic in ("moon", "sun") else with_article(topic)
    roll = rng.random()
    if told is not None and topic in HEROES and roll < 0.12 and told.friend in told.story:
        noun += f" and {with_article(told.friend)}"
    elif told is not None and topic in HEROES and roll < 0.22:
        noun += f" {rng.choice(('called', 'named'))} {told.name}"
    elif rng.random() < 0.25 and topic not in ("moon", "sun"):
        noun = noun.replace(" ", f" {rng.choice(('little', 'small', 'big', 'brave', 'happy', 'funny', 'good'))} ", 1)
        noun = re.sub(r"^an? (?=[^aeiou])", "a ", noun)
    return vary(rng.choice(ASKS).replace("<X>", noun), rng)


_ROUGH = re.compile(r"\.\.|!!|\?\?| [,.!?]|(?:^|[.!?] )[a-z]|,[a-z]|[.!?][a-zA-Z]|\b[Ii] |oooo|aaaa", re.MULTILINE)
"""Marks of a text that was typed in a hurry, or told in the first person: not what a reply should look like."""


def real_stories(texts: list[Text], longest: int = 1500) -> list[tuple[str, str]]:
    """(topic, story) from the picture stories and short fables: complete, at most `longest` characters, about one hero or thing.

    The topic is the hero or thing of the lists above that the story names most often, at least three times.
    """
    found = []
    words = [w for w in HEROES + THINGS if w not in ("child", "sun", "river", "house")]
    for text in texts:
        if text.kind != "picture" or text.grade > 6.5:
            continue
        body = text.text.removeprefix(text.title).strip()
        if not 250 <= len(body) <= longest or body[-1] not in '.!?"' or _ROUGH.search(body):
            continue
        lower = body.lower()
        counts = {w: len(re.findall(rf"\b{w}s?\b", lower)) for w in words}
        topic = max(words, key=lambda w: counts[w])
        if counts[topic] >= 3:
            found.append((topic, re.sub(r"\n\n+", "\n\n", body)))
    return found


def story_rows(texts: list[Text], seed: int, made: int = 9000) -> list[ChatRecord]:
    """Conversations that ask for a story and get one: `made` told from plots, and every real one twice."""
    rng = random.Random(seed)
    rows = []
    for _ in range(made):
        told = made_story(rng)
        ask = vary(rng.choice(ANY), rng) if rng.random() < 0.12 else _ask(told.topic, rng, told)
        turns = [ask, told.story]
        if rng.random() < 0.06:
            again = made_story(rng)
            turns += [
                vary(
                    rng.choice(
                        ("tell me another story", "another one", "another story, please", "one more story", "one more")
                    ),
                    rng,
                ),
                again.story,
            ]
        elif rng.random() < 0.08:
            turns += [vary(rng.choice(("thank you", "thanks", "that was nice", "what a nice story", "I liked it", "good story")), rng),
                      rng.choice(("You are welcome!", "You are welcome. I am glad that you liked it.", "I am glad that you liked it."))]  # fmt: skip
        rows.append(ChatRecord.pairs(*turns, source="herd"))
    for topic, story in real_stories(texts) * 2:
        rows.append(ChatRecord.pairs(_ask(topic, rng), story, source="African Storybook / Pratham Books"))
    rng.shuffle(rows)
    return rows
