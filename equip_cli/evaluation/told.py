"""What the tasks of `facts` tell and ask: sentences with a gap for a value, and the talk that lies between."""

from __future__ import annotations

from typing import NamedTuple


class Told(NamedTuple):
    """A fact, what asks for it, how the answer begins, and the values it may have, all in the same form: `{0}` is its place."""

    fact: str
    question: str
    answer: str
    values: tuple[str, ...]


_CITIES = tuple("London Paris Berlin Madrid Rome Vienna Dublin Moscow Chicago Boston Tokyo Cairo Athens Sydney".split())
_COLOURS = tuple("red blue green yellow black white purple orange pink brown".split())
_DOGS = tuple("Max Bella Rocky Lucky Buddy Daisy Charlie Molly Rex Luna".split())
_DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
_MONTHS = tuple("January February March April May June July August September October November December".split())
_SURNAMES = tuple("Smith Brown Miller Taylor Wilson Moore Clark Lewis Walker Young King Wright".split())
_NAMES = tuple("Anna Peter Laura Simon Clara Oscar Helen Martin Julia Victor Sarah Paul".split())
_DRINKS = tuple("coffee tea milk water wine beer juice lemonade chocolate soda".split())
_THINGS = tuple("hammer clock lamp knife candle mirror book spoon ring shoe".split())
_JOBS = tuple("nurse teacher lawyer baker pilot farmer painter writer dentist chef".split())

# each of a kind of its own: a small model finds a fact by what it is about, but not yet by whose it is
IN_A_TEXT = (
    Told("The door of the house is {0}.", "What color is the door of the house?", "The door of the house is", _COLOURS),
    Told("The meeting will be held in {0}.", "Where will the meeting be held?", "The meeting will be held in", _CITIES),
    Told("The name of the dog is {0}.", "What is the name of the dog?", "The name of the dog is", _DOGS),
    Told("The library is closed on {0}.", "On which day is the library closed?", "The library is closed on", _DAYS),
    Told("The garden will be opened in {0}.", "When will the garden be opened?", "The garden will be opened in", _MONTHS),
    Told(
        "The doctor of the village is called {0}.",
        "What is the doctor of the village called?",
        "The doctor of the village is called",
        _SURNAMES,
    ),
    Told(
        "The box in the kitchen contains a {0}.",
        "What does the box in the kitchen contain?",
        "The box in the kitchen contains a",
        _THINGS,
    ),
    Told(
        "The favorite drink of the teacher is {0}.",
        "What is the favorite drink of the teacher?",
        "The favorite drink of the teacher is",
        _DRINKS,
    ),
)  # fmt: skip

IN_A_CHAT = (
    Told("My name is {0}.", "What is my name?", "Your name is", _NAMES),
    Told("I live in {0}.", "In which city do I live?", "You live in", _CITIES),
    Told("I work as a {0}.", "What is my job?", "You work as a", _JOBS),
    Told("My dog is called {0}.", "What is my dog called?", "Your dog is called", _DOGS),
    Told("I go swimming on {0}.", "On which day do I go swimming?", "You go swimming on", _DAYS),
    Told("My birthday is in {0}.", "In which month is my birthday?", "Your birthday is in", _MONTHS),
)  # fmt: skip

GREETING = "Hello! Before we start, let me tell you something about me. {0} Please remember this for later."
GREETING_ANSWER = "Nice to meet you! {0} I will remember this, and I am glad to help."

# what a user says, and what an assistant answers; nothing in it is a value of IN_A_CHAT
TALK = (
    ("How long should I boil an egg?", "For a soft egg six minutes are enough, and ten minutes for a hard one. Put it into cold water afterwards, so that it stops cooking."),
    ("My bicycle makes a strange noise when I turn the pedals.", "That is often a dry chain. Clean it with a cloth, put a little oil on it, and turn the pedals backwards a few times. If the noise stays, look at the bearings."),
    ("Can you explain what a prime number is?", "A prime number can be divided only by one and by itself. Two, three, five and seven are the first of them, and there is no largest one."),
    ("I would like to read more books this year.", "A good way is to read ten pages every evening before you sleep. Keep the book beside your bed, and leave your phone in another room."),
    ("Why is the sea salty?", "Rain washes minerals out of the rocks, and rivers carry them into the sea. The water evaporates again, but the salt stays behind, so it has grown over a very long time."),
    ("What can I do against the weeds between the stones of my path?", "Pull them out after rain, when the ground is soft, and fill the gaps with sand. Hot water helps too, and it does not harm the soil."),
    ("Give me an idea for a cheap dinner.", "Cook some lentils with onions, carrots and a can of tomatoes. Add salt and a little vinegar at the end, and eat it with bread. It is ready in half an hour."),
    ("How do planes stay in the air?", "The wings push air down as the plane moves forward, and so the air pushes the wings up. The engines only have to keep the plane moving fast enough."),
    ("I often wake up in the middle of the night.", "Try to go to bed at the same time every day, and avoid bright screens in the evening. If you lie awake for long, get up and read something quiet."),
    ("Which musical instrument is easy to learn?", "The ukulele is a good choice. It has only four strings, the chords are simple, and you can play your first song after a few days."),
    ("What is the difference between weather and climate?", "Weather is what happens outside right now or in the next days. Climate is the average of the weather over many years in one region."),
    ("My houseplant has dry leaves at the tips.", "The air in the room may be too dry, or it gets too much sun. Move it away from the window and spray some drops on its leaves once in a while."),
    ("How can I learn to speak in front of people?", "Start with small groups of friends and a topic that you know well. Speak slowly, look at one person at a time, and practise the first two sentences by heart."),
    ("Tell me something interesting about whales.", "Whales breathe air as we do, so they have to come up to the surface. Some of them can hold their breath for more than an hour, and they sing to each other over great distances."),
    ("How do I clean a burnt pan?", "Fill it with warm liquid and a spoon of baking powder, let it boil for a few minutes, and let it stand over night. Most of it will then come off with a soft brush."),
    ("What should I take with me on a hike?", "Take good shoes, a map, something to eat, enough to drink and a jacket against rain. Tell somebody where you go and when you want to be back."),
    ("Why do leaves change in autumn?", "The tree takes back what it needs from the leaves before winter comes. What is left in them can then be seen, until the wind blows them from the branches."),
    ("I want to save some money every week.", "Write down what you spend for two weeks first. Then put a fixed sum aside on the same day every week, before you buy anything else."),
    ("How does a magnet work?", "In a magnet many tiny particles point in the same direction, and their forces add up. In other metals they point in all directions and cancel each other out."),
    ("Can you recommend an exercise for my back?", "Lie on your stomach and lift your arms and legs a little for some seconds. Do this ten times, slowly, and stop if it hurts."),
    ("What is a good gift for my neighbor?", "Something that you made yourself is always nice, like a jar of jam or a small cake. A plant for the balcony is a good idea as well."),
    ("How was paper invented?", "People in China mixed plant fibers with liquid, spread them on a sieve and let them dry. The method came to Europe about a thousand years later."),
    ("My computer has become very slow.", "Close the programs that you do not need, and look at what starts by itself when you switch it on. If the disk is nearly full, delete old files or move them to another one."),
    ("Is it better to run in the evening or in the morning?", "Both are fine, and the best time is the one that you can keep up. In the morning fewer things come in between, and in the evening your muscles are warm."),
)  # fmt: skip
