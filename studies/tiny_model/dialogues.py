"""Dialogues for the embedded model: a user states facts, small talk fills the space, questions ask facts back."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

NOUNS = tuple(
    "cat dog horse parrot rabbit sister brother aunt uncle teacher doctor neighbour cousin boss town village street "
    "school shop garden river island boat car bike band team ship guitar robot book game hotel company daughter son "
    "grandmother grandfather".split()
) + ("best friend", "favourite singer")


@dataclass(frozen=True)
class Kind:
    """What a fact can be about, and how it is said, asked, answered, and not known. `{v}` is the value."""

    says: tuple[str, ...]
    asks: tuple[str, ...]
    answer: str
    unknown: str
    echo: str


def _called(noun: str) -> Kind:
    return Kind(
        says=(
            f"My {noun} is called {{v}}.",
            f"My {noun}'s name is {{v}}.",
            f"The name of my {noun} is {{v}}.",
            f"I have a {noun} called {{v}}.",
            f"My {noun} is {{v}}.",
        ),
        asks=(
            f"What is my {noun} called?",
            f"What is my {noun}'s name?",
            f"What is the name of my {noun}?",
            f"Do you remember what my {noun} is called?",
            f"What was the name of my {noun}?",
        ),
        answer=f"Your {noun} is called {{v}}.",
        unknown=f"I do not know what your {noun} is called.",
        echo=f"So your {noun} is called {{v}}.",
    )


KINDS = (
    *(_called(noun) for noun in NOUNS),
    Kind(
        says=("My name is {v}.", "I am {v}.", "I am called {v}."),
        asks=("What is my name?", "What am I called?", "Do you remember my name?"),
        answer="Your name is {v}.",
        unknown="I do not know your name.",
        echo="Nice to meet you, {v}.",
    ),
    Kind(
        says=("I live in {v}.", "My home is in {v}."),
        asks=("Where do I live?", "Do you remember where I live?"),
        answer="You live in {v}.",
        unknown="I do not know where you live.",
        echo="So you live in {v}.",
    ),
    Kind(
        says=("I was born in {v}.", "I come from {v}."),
        asks=("Where was I born?", "Where do I come from?"),
        answer="You were born in {v}.",
        unknown="I do not know where you were born.",
        echo="So you were born in {v}.",
    ),
    Kind(
        says=("I work in {v}.", "My work is in {v}."),
        asks=("Where do I work?", "Do you remember where I work?"),
        answer="You work in {v}.",
        unknown="I do not know where you work.",
        echo="So you work in {v}.",
    ),
)

ACKNOWLEDGED = (
    "Noted.",
    "I will remember that.",
    "Good to know.",
    "Thank you for telling me.",
    "All right.",
    "I see.",
    "That is a nice name.",
    "Okay, noted.",
)

SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You answer in short sentences.",
    "You remember what the user tells you.",
    "Be kind and brief.",
    "You are a tiny demonstration model.",
)

_WORDS: dict[str, tuple[str, ...]] = {
    "weather": ("cold", "warm", "grey", "bright", "windy", "calm", "rainy", "sunny", "foggy", "wet"),
    "food": (
        "soup",
        "bread",
        "rice",
        "fish",
        "beans",
        "cake",
        "cheese",
        "apples",
        "eggs",
        "potatoes",
        "pasta",
        "salad",
    ),
    "drink": ("tea", "coffee", "milk", "water", "juice", "cocoa"),
    "place": ("park", "market", "station", "lake", "library", "hill", "beach", "museum", "bridge", "forest", "castle"),
    "late": ("train", "bus", "post", "meeting", "film", "ferry", "plane", "doctor"),
    "topic": (
        "stars",
        "birds",
        "trees",
        "ships",
        "kings",
        "maps",
        "bees",
        "trains",
        "music",
        "rivers",
        "whales",
        "rocks",
    ),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "brown", "purple", "orange"),
    "hobby": ("painting", "singing", "running", "cooking", "reading", "swimming", "sailing", "dancing", "fishing"),
    "mood": ("happy", "tired", "hungry", "sad", "excited", "bored", "busy", "curious"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"),
    "thing": ("chair", "table", "lamp", "coat", "hat", "clock", "basket", "blanket", "window", "door", "cup", "kite"),
}

# (user, assistant); a word list in braces is the same word on both sides
SMALL_TALK = (
    ("Hello!", "Hello! How are you?"),
    ("Hi there.", "Hi! What is new?"),
    ("Good morning.", "Good morning!"),
    ("Good evening.", "Good evening! How was your day?"),
    ("How are you?", "I am well, thank you."),
    ("Thank you.", "You are welcome."),
    ("Thanks a lot.", "You are welcome."),
    ("Who are you?", "I am a tiny demonstration model. I remember names that you tell me."),
    ("What can you do?", "Tell me some names, and ask me for them later. I know as long as I can still read them."),
    ("What are you?", "I am a tiny demonstration model. I remember names that you tell me."),
    ("The weather is {weather} today.", "A {weather} day can be nice."),
    ("It was {weather} and {weather2} all week.", "I hope it will not stay {weather}."),
    ("Tomorrow will be {weather}.", "Then plan for a {weather} day."),
    ("I had {food} for lunch.", "I like the sound of {food}."),
    ("We had {food} and {food2} for dinner.", "{Food} and {food2} go well together."),
    ("I do not like {food}.", "Then have something other than {food}."),
    ("Can you cook {food}?", "I can not cook, but {food} sounds good."),
    ("I drank a cup of {drink}.", "A cup of {drink} is a good idea."),
    ("I would like some {drink}.", "I can not pour {drink}, I am sorry."),
    ("We walked to the {place}.", "A walk to the {place} is good for you."),
    ("Yesterday I saw the {place}.", "What did you like at the {place}?"),
    ("I got lost near the {place}.", "I am glad you found the way back from the {place}."),
    ("The {late} was very late.", "I am sorry about the {late}."),
    ("I missed the {late} again.", "There will be another {late}."),
    ("I am reading about {topic}.", "There is a lot to learn about {topic}."),
    ("Do you know anything about {topic}?", "Only a little about {topic}."),
    ("My book is about {topic} and {topic2}.", "I would read about {topic} first."),
    ("I like {hobby}.", "{Hobby} is a fine hobby."),
    ("I went {hobby} with friends.", "{Hobby} with friends is fun."),
    ("I started {hobby} last year.", "Have fun with {hobby}."),
    ("I feel {mood} today.", "Tell me why you feel {mood}."),
    ("Everyone was {mood} this week.", "That happens, and then it passes."),
    ("On {day} I will visit friends.", "Have a good time on {day}."),
    ("We meet every {day}.", "Then I wish you a nice {day}."),
    ("What do you do on {day}?", "The same as on any day: I listen."),
    ("I bought a {colour} {thing}.", "A {colour} {thing} looks good."),
    ("I painted the {thing} {colour}.", "So now the {thing} is {colour}."),
    ("The old {thing} is broken.", "Maybe the {thing} can be mended."),
    ("I found {number} coins in the {thing}.", "{Number} coins is a nice find."),
    ("I waited {number} hours for the {late}.", "{Number} hours is a long time."),
    ("We saw {number} boats on the lake.", "{Number} boats is a fine sight."),
    ("I lost my keys.", "Look in the pockets of your coat."),
    ("The music was too loud.", "Quiet is good for the ears."),
    ("I slept badly.", "I hope that tonight is better."),
    ("It is getting late.", "Then rest well."),
    ("I have a lot of work.", "One thing after the other."),
    ("That is funny.", "I am glad that you like it."),
    ("Let us talk about something else.", "Gladly. What is on your mind?"),
    ("Tell me something.", "A calm day is worth a lot."),
    ("I am not sure.", "Take your time."),
)


def small_talk(rng: random.Random) -> tuple[str, str]:
    """What the user says and what the assistant answers."""
    values: dict[str, str] = {}
    for key, options in _WORDS.items():
        first, second = rng.sample(options, 2)
        values |= {key: first, key + "2": second, key.capitalize(): first.capitalize()}
    said, answer = rng.choice(SMALL_TALK)
    return said.format_map(values), answer.format_map(values)


@dataclass
class Turn:
    """A user's message and the answer; the names that the message tells; the one that the answer must recall, if it must."""

    user: str
    assistant: str
    value: str | None = None
    told: list[str] = field(default_factory=list)


@dataclass
class Fact:
    """What was stated, and under which value."""

    kind: Kind
    value: str


def state(rng: random.Random, fact: Fact, echo: float) -> Turn:
    """The turn that states a fact; the assistant repeats it with the probability `echo`."""
    said = rng.choice(fact.kind.says).format(v=fact.value)
    if rng.random() < echo:
        return Turn(said, fact.kind.echo.format(v=fact.value), fact.value, [fact.value])
    return Turn(said, rng.choice(ACKNOWLEDGED), None, [fact.value])


def ask(rng: random.Random, fact: Fact) -> Turn:
    """The turn that asks a stated fact."""
    return Turn(rng.choice(fact.kind.asks), fact.kind.answer.format(v=fact.value), fact.value)


def state_two(rng: random.Random, first: Fact, second: Fact) -> Turn:
    """Two facts in one message."""
    said = rng.choice(first.kind.says).format(v=first.value)[:-1]
    more = rng.choice(second.kind.says).format(v=second.value)
    joined = f"{said} and {more if more.startswith('I ') else more[0].lower() + more[1:]}"
    text = joined if rng.random() < 0.5 else f"{said}. {more}"
    return Turn(text, rng.choice(ACKNOWLEDGED), None, [first.value, second.value])


class Dialogue:
    """An endless training dialogue. Facts come early or throughout, questions ask any of them, some ask what was never said."""

    def __init__(self, rng: random.Random, name: Callable[[random.Random], str], talk: float, most_facts: int) -> None:
        """talk: share of small talk among the turns; most_facts: how many facts at most."""
        self.rng, self.name = rng, name
        self.talk = talk
        self.open = rng.sample(KINDS, rng.randint(min(2, most_facts), most_facts))
        self.unstated = [kind for kind in KINDS if kind not in self.open]
        self.facts: list[Fact] = []
        # the chance of a new fact in a turn that is no small talk
        self.early = rng.choice((0.9, 0.6, 0.35))
        self.echo = rng.choice((0.0, 0.2, 0.5))

    def turn(self) -> Turn:
        """The next turn; now and then small talk comes before what the user wants to say."""
        turn = self._turn()
        if self.rng.random() < 0.08:
            turn.user = small_talk(self.rng)[0] + self.rng.choice((" ", "\n", "\n\n")) + turn.user
        return turn

    def _turn(self) -> Turn:
        rng = self.rng
        if rng.random() < self.talk:
            return Turn(*small_talk(rng))
        if self.open and (not self.facts or rng.random() < self.early):
            fact = self._new_fact()
            if self.open and rng.random() < 0.15:
                return state_two(rng, fact, self._new_fact())
            return state(rng, fact, self.echo)
        if rng.random() < 0.08:
            kind = rng.choice(self.unstated)
            return Turn(rng.choice(kind.asks), kind.unknown)
        # often the fact that was not mentioned for longest; the list is in the order of the last mention
        fact = self.facts.pop(0 if rng.random() < 0.4 else rng.randrange(len(self.facts)))
        self.facts.append(fact)
        return ask(rng, fact)

    def _new_fact(self) -> Fact:
        fact = Fact(self.open.pop(), self.name(self.rng))
        self.facts.append(fact)
        return fact
