"""Seeded generator of connected English prose over a small vocabulary, for training and scoring tiny language models.

Each passage keeps a cast, a place and a few objects in mind and refers back to them, so remembering the text pays off.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

MIN_TARGET_WORDS = 125
MAX_TARGET_WORDS = 345

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "orange", "silver")
TRAITS = ("quiet", "brave", "kind", "clever", "honest", "lazy", "patient", "careful", "stubborn", "cheerful")
OWNED = ("coat", "hat", "bag", "lamp", "basket", "scarf", "bell", "cup", "blanket", "umbrella", "box", "kite")
ADJECTIVES = ("old", "heavy", "small", "long", "ugly", "strange", "broken", "new", "fine", "dirty", "odd", "wide")
SEASONS = ("spring", "summer", "autumn", "winter")
ADVERBS = ("slowly", "quickly", "quietly", "gently", "carefully", "loudly")
PETS = ("dog", "cat", "goat", "horse", "donkey", "owl", "goose")
FAR_KINDS = ("town", "city")
KIN_MIXED = ("friends", "cousins", "neighbours", "partners")
KIN_FEMALE = (*KIN_MIXED, "sisters", "sisters")
KIN_MALE = (*KIN_MIXED, "brothers", "brothers")
PRONOUNS = {"f": ("she", "her", "her"), "m": ("he", "his", "him")}
IRREGULAR_PLURALS = {
    "loaf": "loaves",
    "potato": "potatoes",
    "knife": "knives",
    "sheep": "sheep",
    "goose": "geese",
    "man": "men",
    "woman": "women",
    "child": "children",
    "brush": "brushes",
    "bush": "bushes",
}

# Countable nouns: a list "food" gives the slots {food}, {a_food}, {foods} and {n_food}.
NOUNS = {
    "food": ("apple", "egg", "onion", "orange", "pear", "cake", "pie", "loaf", "carrot", "potato"),
    "animal": ("horse", "goat", "dog", "cat", "sheep", "hen", "cow", "goose", "donkey", "owl"),
    "tool": ("hammer", "saw", "axe", "knife", "rope", "ladder", "nail", "brush"),
    "person": ("boy", "girl", "man", "woman", "child", "guest", "neighbour", "stranger"),
    "plant": ("tree", "flower", "rose", "oak", "bush"),
}

# Plain choices: a list "how" gives the slot {how}.
CHOICES = {
    "number": NUMBERS,
    "colour": COLOURS,
    "adj": ADJECTIVES,
    "feeling": ("happy", "sad", "tired", "angry", "proud", "afraid", "hungry", "calm", "worried", "glad"),
    "air": ("cold", "wet", "windy", "warm", "dry", "hot", "dark", "bright"),
    "sky": ("rain", "wind", "snow", "fog", "storm"),
    "taste": ("salty", "sweet", "thin", "hot"),
    "nth": ("second", "third", "fourth", "fifth", "sixth"),
    "adverb": ADVERBS,
    "how": (*ADVERBS, "at once", "with a smile"),
    "trait": TRAITS,
    "time": ("hours", "days", "weeks", "years"),
    "short": ("minutes", "hours"),
    "when": (
        "in the morning",
        "that evening",
        "at noon",
        "after a while",
        "before dark",
        "the next day",
        "late at night",
        "a little later",
        "on the way home",
    ),
    "spot": (
        "by the door",
        "under the table",
        "near the window",
        "on the shelf",
        "behind the wall",
        "beside the fire",
        "in the corner",
        "at the gate",
        "on the floor",
        "in front of the house",
    ),
    "shade": ("a little darker than", "much brighter than", "almost the same as"),
}


class Topic(NamedTuple):
    """One subject to write about: its people, places and things, and its templates in the order of events."""

    roles: tuple[str, ...]
    places: tuple[str, ...]
    objects: tuple[str, ...]
    goods: tuple[str, ...]
    opening: tuple[str, ...]
    middle: tuple[str, ...]
    closing: tuple[str, ...]


# Slots about people: {S} subject (name, pronoun or role), {he} {his} {him} agree with it, {mine} its
# possession; {P} the first two characters together; {O} somebody else, {theirs} that person's possession.
# Slots about things: {X} the topic's object, {Z} its counted goods, {pet}, {far}: introduced at the first mention.
# {here} is the home place; {was} and {it} agree with the latest {n_...} count.

INTRO_FIRST = (
    "{S} was {who} who lived in {home} and owned {owned}.",
    "In {home} there lived {who} called {S}, who always carried {owned}.",
    "{number} years ago {who} called {S} came to {home} with {owned}.",
    "Everyone in {home} knew {S}, {who} with {owned}.",
    "One {air} morning {S}, {who}, walked through {home} with {owned}.",
    "This is the story of {S}, {who} from {home}, and of {owned}.",
    "{S} had lived in {home} for {number} years; {he} was {who}, and {he} had {owned}.",
    "When the {season} came to {home}, {who} called {S} bought {owned}.",
)
INTRO_OTHER = (
    "{S} was {who} and never went out without {owned}.",
    "{S}, {who}, had {owned} and liked to talk with {O}.",
    "There was also {S}, {who}, who had once found {owned} near {place}.",
    "{O} often worked with {S}, {who} with {owned}.",
    "Not far from {O} lived {S}, {who}, who kept {owned} {spot}.",
    "Then {S} came in; {he} was {who}, and {he} had {owned} with {him}.",
    "{O} had a good friend called {S}, {who} who was known for {owned}.",
    "{S} was new in {here}, {who} with {owned} and few words.",
)
INTRO_PAIR = (
    "{names} were {kin}.",
    "{names} had been {kin} for {number} years.",
    "People in {here} knew that {names} were {kin}, and good ones.",
    "As {kin}, {names} did almost everything together.",
)
TRANSITIONS = (
    "{number} days went by in {place}, and the {sky} did not stop.",
    "The next morning was {air}, and {here} was full of people.",
    "{number} {short} later {S} was back with {mine}.",
    "Then something changed, and {O} was the first to see it.",
    "By the end of the week everyone in {place} was talking about {O}.",
    "On the other side of {here}, {S} was still waiting for {O}.",
    "It was {air} again when {S} opened the door and looked for {mine}.",
    "In the meantime {O} had heard some news from {far}.",
    "After a long night the {sky} was gone, and {P} could go on.",
    "Early the next day {S} put {mine} {spot} and went out.",
)
GENERAL = (
    "{S} was {feeling}, but {he} did not say a word about it.",
    "{S} looked at {O} and felt {feeling}.",
    "{S} said that {he} had never been so {feeling} in all {his} life.",
    "{S} asked {O} what the time was.",
    "{S} told {O} that {theirs} was {spot}.",
    "{S} thought about {far} and about the people {he} had known there.",
    "{S} put {mine} {spot} and sat down for {number} minutes.",
    "{S} could not find {mine}, and {he} looked for it everywhere.",
    "{when} {S} found {mine} {spot}, just where {he} had left it.",
    "{S} held {mine} in both hands and waited.",
    "{S} wanted to know why {O} was so {feeling}.",
    "{S} was {a_role}, so {he} knew what to do.",
    "{S} had always been {trait_of}, and this day was no different.",
    "Nobody in {here} was as {otrait} as {O}.",
    "Everyone in {place} knew that {plain} was {ocolour}.",
    "{S} remembered well that {plain} was {ocolour}.",
    "Who could help now, if not {O}?",
    "Where was {theirs}?",
    "Why did {O} want to leave {place}?",
    "What would {O} say about it?",
    "{when} the {sky} came over {here}, and it was {air} for {number} {time}.",
    "The day was {air}, and the {sky} was near.",
    "{n_person} {was} waiting {spot}.",
    "{n_person} from {far} {was} asking for {O}.",
    "{n_animal} {was} asleep {spot}, and nobody moved {it}.",
    "{pet} ran after {O} and then slept {spot}.",
    "{S} gave {pet} some bread and called it {how}.",
    "{P} talked for {number} {short} about {far}.",
    "{P} were both {feeling} and {feeling} that day.",
    "{P} shared {n_food} and said little.",
    "{P} walked {how} through {here} and looked at the {sky}.",
    "{P} were not alone, for {pet} was with them.",
    "{S} had left {far} {number} years before, and {he} still remembered it well.",
    "{S} smiled {how}, for {he} had not forgotten {theirs}.",
    "{S} asked if {O} had seen {mine}.",
    "{O} said nothing; {theirs} lay {spot}.",
    "It took {number} {short}, but {S} was {trait_of} and did not give up.",
    "{S} promised {O} to be back in {number} {time}.",
    "{S} took {theirs} by mistake and gave it back {how}.",
    "{S} liked {colour} things, but most of all {he} liked {mine}.",
    "The colour of {theirs} was {shade} the sky over {place}.",
    "{S} said that {O} was {otrait}, and that was true.",
    "A letter came from {far}, and it was for {O}.",
    "{S} read a letter from {far} {how} and put it in {his} pocket.",
    "There was {a_food} {spot}, and {S} ate it {how}.",
    "{number} {persons} and {a_animal} went by, but {O} was not with them.",
    "{S} drank some tea, took {mine} and went to look for {O}.",
    "For {a_role}, {S} knew a lot about {animals}.",
    "{S} heard a bell; it was {number} in the morning, and {he} was still {feeling}.",
    "The {adj} road from {place} to {far} was {air} and empty.",
)
CLOSING = (
    "{when} {S} went home to sleep, with {mine} beside {him}.",
    "And that is how {O} came to be known from {place} to {far}.",
    "{P} never forgot that {season} in {place}.",
    "Was {S} {feeling} in the end?",
    "Only {theirs} was left {spot}, and the night was {air}.",
    "From that day on {S} and {O} were good friends.",
    "In the end {S} gave {mine} to {O}, who was {feeling}.",
    "{number} years later people in {place} still told the story of {O}.",
)

VILLAGE = Topic(
    ("baker", "farmer", "weaver", "miller", "keeper"),
    ("village", "valley"),
    ("letter", "key", "ring", "picture"),
    ("chairs", "candles", "jars", "coins"),
    (
        "{here} had {number} houses, one well and {a_adj} bridge.",
        "Each {season} the people of {place} held a feast, and {O} had to plan it.",
        "Life in {here} was quiet, and most people had known {O} for {number} years.",
        "There was trouble in {place}, for {X} had been lost.",
    ),
    (
        "{S} got up early, took {mine} and went to the well.",
        "At the well {S} met {O}, and they talked about the feast.",
        "{S} wanted {Z} for the feast, but nobody in {place} had so many.",
        "{P} went from house to house and asked for {Z}.",
        "{a_person} at the bridge gave {S} {n_food} and said that {it} {was} for the feast.",
        "{S} found {X} under the bridge and showed it to {O}.",
        "{O} was sure that {X} had once been in {far}.",
        "The old people of {here} sat {spot} and talked about {X}.",
        "{S} swept the street with a brush and hung {colour} flowers over the door.",
        "{P} put {Z} in front of the church.",
        "{a_person} had lost {a_animal}, and {S} helped to look for it.",
        "{S} lent {mine} to a neighbour, who soon brought it back.",
        "{O} baked {n_food} and put {it} {spot}.",
        "The children ran round the well with {pet} behind them.",
        "{S} hid {X} {spot}, so that only {O} would find it.",
        "At the feast {P} danced until the candles were low.",
        "{O} counted {Z}, and one was not there.",
        "{S} told the whole village about {theirs} and about {X}.",
    ),
    (
        "When the feast was over, {S} took {Z} back to the neighbours.",
        "{X} was put in the church, and there it is to this day.",
        "{P} closed the gate of {here} and walked home under the {colour} sky.",
        "{S} hung {mine} by the door, and {here} was quiet again.",
    ),
)

SEA = Topic(
    ("captain", "sailor", "cook", "doctor", "fisher"),
    ("harbour", "island"),
    ("map", "sail", "anchor", "rope"),
    ("barrels", "ropes", "oars", "sacks"),
    (
        "The ship lay at {place}, ready to sail for {far}.",
        "{S} had waited {number} days for a good wind.",
        "{P} carried {Z} on to the ship before it left.",
        "It was {air} when the ship left {place} with {number} {persons} on board.",
    ),
    (
        "{S} stood on the deck with {mine} and looked back at {place}.",
        "{S} showed {X} to {O} and asked which way to go.",
        "The wind was good, and the ship went {how} over the {colour} water.",
        "{S} tied down {Z}, for the waves were growing.",
        "On the {nth} day {O} saw an island in the fog.",
        "{pet} sat on the deck and looked at the fish.",
        "Then the storm came, and {S} held on to {X}.",
        "A wave came over the deck and took {theirs} with it.",
        "{S} caught {theirs} just before it fell into the sea.",
        "{P} pulled at the ropes for {number} hours, and their hands were wet.",
        "One of {Z} broke and rolled across the deck.",
        "{S} was sick and lay below with {mine} over {his} head.",
        "{O} cooked {foods} for everyone, though the ship would not stay still.",
        "{when} the sea was calm, and {S} could mend {X}.",
        "{number} white birds came down on the mast, so land was near.",
        "{S} climbed the mast and called that {he} could see {far}.",
        "{O} let down the boat and filled it with {Z}.",
        "{P} rowed to land and left the ship with {pet} on guard.",
    ),
    (
        "At last the ship came to {far}, and {S} was the first on land.",
        "{S} sold {Z} at {far} and began the long way home to {place}.",
        "{S} kept {X} for the rest of {his} life, for it had saved the ship.",
        "{P} stood on the deck as the lights of {place} came near.",
    ),
)

KITCHEN = Topic(
    ("cook", "baker", "farmer", "gardener", "doctor"),
    ("village", "town"),
    ("pot", "pan", "spoon", "bowl"),
    ("plates", "bowls", "spoons", "jars"),
    (
        "{number} guests from {far} were coming to dinner, and {S} had to cook.",
        "{S} had a small kitchen in {place} with one window and {X}.",
        "The best soup in {here} was made by {O}, and nobody knew how.",
        "{S} wanted to learn to cook, so {he} went to see {O}.",
    ),
    (
        "First {S} washed {n_food} and cut {it} with {a_adj} knife.",
        "{S} took {X} from the shelf and filled it with water.",
        "{O} lit the fire and put {X} over it.",
        "{S} asked {O} how much salt the soup needed.",
        "{O} said that {number} spoons of salt were too many.",
        "{S} put {n_food} and some butter into {X}.",
        "There was no flour left, so {S} sent {O} to the miller.",
        "{O} came back with flour in {theirs} and snow on the shoes.",
        "{S} beat {number} eggs {how} and left them {spot}.",
        "{pet} took {a_food} from the table and ran out of the kitchen.",
        "The kitchen was {air} and smelled of {foods} and fresh bread.",
        "{S} burned {his} hand on {X} and dropped it on the floor.",
        "{P} washed {Z} and put them on the table.",
        "{S} tasted the soup and found that it was too {taste}.",
        "{O} thought that it needed {a_food} and a little milk.",
        "{S} covered the bread with {a_colour} cloth and let it rest for {number} minutes.",
        "{S} counted {Z} again, for the guests were at the gate.",
        "The guests sat down, and {O} filled {Z} with soup.",
    ),
    (
        "The guests said that the soup was better than any in {far}.",
        "When the guests had gone, {P} washed {Z} and laughed.",
        "{S} gave {X} to {O} and said that a good cook should have it.",
        "{S} ate the last {food} {how} and put out the fire.",
    ),
)

SCHOOL = Topic(
    ("teacher", "student", "painter", "writer", "gardener"),
    ("village", "town"),
    ("picture", "map", "letter"),
    ("books", "pencils", "pens"),
    (
        "The school in {place} had one room, {number} children and {a_adj} stove.",
        "On the first day of {season} {S} came to school before everyone else.",
        "{S} wanted to teach the children of {place} about {animals}.",
        "{O} was late for school because {pet} had run away.",
    ),
    (
        "{S} hung {mine} {spot} and opened the windows.",
        "The children took {Z} from the shelf and sat down.",
        "{S} drew {a_animal} on the board, and the class laughed.",
        "{S} asked the class how many legs {number} {animals} have.",
        "{O} knew the answer but was too {feeling} to say it.",
        "{a_person} at the back of the room had written {number} words.",
        "{S} lost {X} and thought that {O} had taken it.",
        "{O} said that {X} had been {spot} all morning.",
        "At noon {P} sat under a tree and shared {n_food}.",
        "{pet} came into the class and ate {a_food}, and nobody could work.",
        "{S} read a story about {a_trait} king and {his} {colour} horse.",
        "{O} asked why the king in the story was so {feeling}.",
        "{S} wrote the answer on the board in {colour} letters.",
        "The test had {number} questions, and {O} could answer all but one.",
        "{S} helped {O} with the last question, though it was not allowed.",
        "{number} children painted {theirs}, and every picture was different.",
        "{S} put {X} on the wall next to the picture of {far}.",
        "It was {air} outside, so {P} played in the school until evening.",
    ),
    (
        "When the bell rang, {S} put {Z} away and closed the school.",
        "{S} gave {X} to {O}, who had learned the most that day.",
        "{P} walked home from school and talked about the king and the {colour} horse.",
        "{S} said that there would be no school for {number} days, and the class was {feeling}.",
    ),
)

FARM = Topic(
    ("farmer", "shepherd", "miller", "gardener", "smith"),
    ("valley", "village"),
    ("cart", "wagon", "barrow"),
    ("sheep", "hens", "geese", "goats"),
    (
        "{S} had a farm near {place} with {number} {animals} and {a_adj} barn.",
        "That {season} there was little rain, and the fields of {here} were {colour}.",
        "{S} needed help on the farm, so {he} asked {O}.",
        "{P} bought {Z} at {far} and brought them to the farm.",
    ),
    (
        "Before the sun was up, {S} went to the barn with {mine}.",
        "{S} milked {number} cows and gave them some hay.",
        "{O} fed {Z} and counted them twice.",
        "One of the {animals} was sick, and {S} stayed with it all night.",
        "{S} filled {X} with apples from the {adj} tree.",
        "{pet} got out of the barn and ate the flowers in the garden.",
        "{P} ran after {pet} across the field, but it was too quick.",
        "{S} mended the fence with {a_tool} and {number} nails.",
        "{O} found {number} eggs in the straw under {theirs}.",
        "The field was wet, and {X} would not move.",
        "{P} pushed {X} out of the mud.",
        "{S} cut the corn {how} while {O} tied it.",
        "A fox came from the wood at night and was after {Z}.",
        "{S} lit a fire and stood guard over {Z} until morning.",
        "{when} {n_animal} {was} born, and {S} called {O} to see {it}.",
        "{S} covered the young {animal} with {mine} to keep it warm.",
        "{O} planted {n_plant} beside the barn, and {S} gave {it} water.",
        "The corn was dry, and {P} carried it to the mill in sacks.",
    ),
    (
        "When the barn was full, {S} gave {O} {number} sacks of corn.",
        "{S} closed the barn, and {pet} lay down before the door.",
        "It had been a good year for the farm, and {P} were {feeling}.",
        "{S} put {X} in the barn and looked at the {colour} fields.",
    ),
)

MARKET = Topic(
    ("trader", "weaver", "farmer", "baker", "smith"),
    ("town", "harbour"),
    ("clock", "mirror", "chair", "carpet"),
    ("coins", "jars", "candles", "sacks"),
    (
        "On market day {here} was full of {persons} and {animals}.",
        "{S} went to the market of {place} to buy {X}.",
        "{S} put {Z} on a table in the market and waited.",
        "Traders came from {far} to sell {foods} and {colour} cloth.",
    ),
    (
        "{S} asked how much {X} cost.",
        "{O} wanted {number} coins for {X}, and that was too much.",
        "{S} said that {he} would pay {number} coins and no more.",
        "{a_person} bought {n_food} and put {it} in {a_colour} bag.",
        "{S} showed {mine} to {a_person}, but it was not for sale.",
        "{O} called {how} that the {foods} were fresh and cheap.",
        "A thief took {theirs} and ran into the crowd.",
        "{P} ran after the thief and caught him {spot}.",
        "The thief said that he was {feeling} and that he had {number} children.",
        "{S} gave the thief {a_food} and let him go.",
        "It began to rain, and {S} covered {Z} with a cloth.",
        "A horse pulled a cart with {number} sacks of flour through the market.",
        "{S} sold half of {Z} before noon.",
        "{O} looked at {X} and saw that it was {adj} but good.",
        "A trader from {far} wanted to trade {n_animal} for {theirs}.",
        "{S} counted the money in {his} pocket; it was {number} coins.",
        "{P} shared a hot pie and watched the crowd.",
        "{S} paid {O} for {X} and put it under {his} arm.",
    ),
    (
        "When the market closed, {S} had sold everything but {mine}.",
        "{S} carried {X} home from the market, and {he} was {feeling}.",
        "{P} swept the street and counted the money.",
        "{O} went back to {far} with an empty cart and {number} coins.",
    ),
)

BAND = Topic(
    ("singer", "drummer", "piper", "teacher", "painter"),
    ("town", "city"),
    ("drum", "fiddle", "horn", "pipe"),
    ("songs", "drums", "horns", "chairs"),
    (
        "{S} played in a band that was known from {place} to {far}.",
        "{P} wanted to start a band, but they had only {X}.",
        "The band of {place} needed a new singer, and {O} was asked to come.",
        "In {number} days the band was to play for the king in {far}.",
    ),
    (
        "{S} played {X} every morning, and the neighbours were {feeling}.",
        "{O} wrote a song about {theirs} and sang it {how}.",
        "{S} said that the song was too long and too sad.",
        "{P} played it again, this time a little more {adverb}.",
        "The band knew {Z} by heart, and {O} wanted more.",
        "{S} dropped {X} on the road, and it would not make a sound.",
        "{a_person} with {a_tool} mended {X} in {number} minutes.",
        "{pet} did not like the music and went to sleep {spot}.",
        "{S} could not sing, for {he} had been out in the {sky}.",
        "{O} made hot milk for {S} and told {him} to rest.",
        "The hall in {far} was full; there were even people {spot}.",
        "{S} put {mine} on a chair and took {X} in {his} hands.",
        "The first song was about {a_animal} and {a_trait} girl.",
        "{O} forgot the words of the {nth} song and laughed.",
        "{number} {persons} got up and began to dance.",
        "{S} played so {adverb} that the crowd was still.",
        "{O} threw {theirs} into the air at the end of the song.",
        "The people in the hall wanted {number} more songs.",
    ),
    (
        "After the last song {S} put {X} back in its box.",
        "The king gave {O} {number} coins and {a_colour} flower.",
        "{P} sang all the way from {far} to {place}.",
        "The band played for many years, and {S} still has {X}.",
    ),
)

MOUNTAIN = Topic(
    ("guide", "shepherd", "hunter", "writer", "doctor"),
    ("valley", "village"),
    ("rope", "map", "tent", "pole"),
    ("candles", "ropes", "poles", "blankets"),
    (
        "Above {place} stood a mountain, and {S} wanted to climb it.",
        "The {season} had been {air}, and there was snow on the mountain over {here}.",
        "{P} left {place} before the sun was up and took {Z} with them.",
        "Nobody had crossed the mountain to {far} for {number} years.",
    ),
    (
        "{S} walked in front with {mine}, and {O} came behind.",
        "The path was {adj}, and there were stones on it.",
        "{S} stopped by a river and drank the cold water.",
        "{O} looked at {X} and said that the way was wrong.",
        "{n_animal} {was} standing on the path, and {S} sent {it} away.",
        "The clouds were {colour}, and the wind grew strong.",
        "{S} tied {X} round a rock and climbed up {how}.",
        "{O} fell and hurt a foot, and {theirs} rolled down the mountain.",
        "{S} climbed down to find {theirs} and came back {feeling}.",
        "{P} sat under a rock until the {sky} was over.",
        "{S} covered {O} with {mine}, for the night was cold.",
        "{P} had only {n_food} left and ate {it} {how}.",
        "{pet} found a cave, and {O} lit a fire there with {Z} around it.",
        "In the cave {S} saw {a_colour} light and the bones of {a_animal}.",
        "In the morning the sky was bright, and {O} could see {far}.",
        "{number} {short} later {P} stood on the top of the mountain.",
        "{S} put {a_colour} stone on the top and wrote {his} name on it.",
        "The way down was easy, but {O} walked {how}.",
    ),
    (
        "When {P} came down to {place}, people ran out to meet them.",
        "{S} hung {X} on the wall and never climbed the mountain again.",
        "{S} could see the mountain from {his} window, and it was {colour} in the evening sun.",
        "{O} said that the mountain was high but that {here} was home.",
    ),
)

WORKSHOP = Topic(
    ("carpenter", "smith", "weaver", "painter", "trader"),
    ("town", "village"),
    ("table", "door", "clock", "wheel"),
    ("boards", "nails", "wheels", "doors"),
    (
        "{S} had a workshop in {place}, full of {tools} and dust.",
        "{a_person} from {far} asked {S} to build {X} in {number} days.",
        "{S} wanted to build {a_adj} house for {O}.",
        "{P} worked side by side in the workshop and seldom talked.",
    ),
    (
        "{S} took {a_tool} from the wall and began to work.",
        "First {S} measured {Z} and marked them with {a_colour} pencil.",
        "{O} held the wood while {S} cut it with a saw.",
        "{S} needed {number} nails, but the box was empty.",
        "{O} went to the smith and came back with {Z}.",
        "The {tool} broke, and {S} had to borrow another from {O}.",
        "{S} cut {his} hand and tied it up with {a_colour} cloth.",
        "{O} said that {X} was not straight.",
        "{S} looked at {X} from every side and had to agree.",
        "{S} took {X} apart and began again.",
        "{pet} slept in the dust, and {O} fell over it.",
        "{P} carried {Z} up the ladder one by one.",
        "The roof was {adj}, and water came through on {theirs}.",
        "{S} moved {mine} out of the rain and put {a_tool} in its place.",
        "{O} painted {X} {colour} and left it {spot} to dry.",
        "{S} wanted it to be {colour}, but {he} did not say so.",
        "The glue was too {air}, and one of {Z} came off.",
        "{S} worked until night, with only {a_adj} lamp for light.",
    ),
    (
        "At last {X} was ready, and {S} showed it to {O}.",
        "{a_person} paid {number} coins for {X}, and {S} was {feeling}.",
        "{P} swept the workshop and hung the {tools} on the wall.",
        "{S} built many more things, but {X} was the best of them.",
    ),
)

HOSPITAL = Topic(
    ("doctor", "nurse", "student", "driver", "cook"),
    ("town", "city"),
    ("letter", "picture", "ring", "key"),
    ("beds", "blankets", "bottles", "cups"),
    (
        "The hospital in {place} had {number} rooms and a garden.",
        "{S} worked at the hospital and had not slept for {number} hours.",
        "One night {O} was brought to the hospital with a broken arm.",
        "There was a fever in {here}, and the hospital needed {Z}.",
    ),
    (
        "{S} washed {his} hands and went into the first room.",
        "{a_person} lay in bed and said that {X} had been lost.",
        "{S} asked {O} where it hurt.",
        "{O} said that the pain was bad, but that it would pass.",
        "{S} gave {O} something from {a_colour} bottle, and it was not sweet.",
        "{number} {persons} were waiting {spot}, and all of them were sick.",
        "{S} brought {Z} from the other room and counted them.",
        "A child with a fever asked for {a_food}.",
        "{S} sat by the bed and told the child about {pet}.",
        "{pet} was not allowed in the hospital, but {O} let it in.",
        "{S} put {mine} on a chair and looked at the arm again.",
        "The arm had to rest for {number} weeks, and {O} was {feeling}.",
        "{P} carried {a_person} up to a bed near the window.",
        "The fever grew at night, and {S} held the hand of the sick child.",
        "A driver came from {far} with {Z} and {n_food}.",
        "{S} found {X} under the bed and brought it back {how}.",
        "In the garden {O} walked {how} for the first time in {number} days.",
        "{S} was {feeling}, for {number} people could go home.",
    ),
    (
        "When the fever was over, the hospital was quiet and {S} could sleep.",
        "{O} left the hospital with {theirs} and a new friend.",
        "{S} kept {X}, for it came from someone {he} had helped.",
        "{P} sat in the garden of the hospital and drank tea.",
    ),
)

LIBRARY = Topic(
    ("writer", "clerk", "teacher", "student", "keeper"),
    ("city", "town"),
    ("book", "map", "letter"),
    ("books", "shelves", "candles", "pages"),
    (
        "The library of {place} was {adj} and had {number} rooms.",
        "{S} loved to read and went to the library every {air} day.",
        "{S} was looking for {X} that nobody had read for {number} years.",
        "{O} kept the library of {place} and knew every page in it.",
    ),
    (
        "{S} asked {O} where the books about {animals} were.",
        "{O} pointed to the top shelf and went to get a ladder.",
        "{S} left {mine} at the door, for that was the rule.",
        "On the {nth} shelf {S} found {X}, and it was {adj}.",
        "{S} sat down {spot} and read for {number} hours.",
        "The story was about {a_person} who lived with {a_animal} in {far}.",
        "In the story {a_trait} {person} found {n_food} in a cave and gave {it} away.",
        "{S} turned the page and saw a picture of {a_colour} {plant}.",
        "{O} asked {S} to read more of the story.",
        "{P} put {Z} in order, from the old to the new.",
        "One page was gone, and {S} asked {O} about it.",
        "{O} had seen the page {spot}, under {theirs}.",
        "{pet} walked along the shelf, and {number} books fell down.",
        "{S} picked up the books and wrote down their names.",
        "It grew dark, and {O} lit one of the candles.",
        "{S} did not hear the bell, so {he} was locked in the library.",
        "{S} slept {spot} with {X} under {his} head.",
        "In the morning {O} opened the door and was {feeling} to see who was there.",
    ),
    (
        "{S} read the last page {how} and closed the book.",
        "{S} brought {X} back to the library after {number} weeks.",
        "{P} wrote a book of their own, and it stands in the library of {place}.",
        "{O} put {X} on the top shelf and locked the door.",
    ),
)

MATCH = Topic(
    ("teacher", "smith", "keeper", "driver", "student"),
    ("town", "village"),
    ("flag", "whistle", "horn"),
    ("shirts", "flags", "balls", "tickets"),
    (
        "The team of {place} was to play against {far}, and {S} was in goal.",
        "{S} had played football for {number} years and had never won a cup.",
        "{number} thousand people came to {place} to see the match.",
        "{O} was hurt, so {S} had to play in the match.",
    ),
    (
        "The team put on {colour} shirts and ran out to the field.",
        "{S} left {mine} on the bench next to {X}.",
        "It was {air}, and the grass was wet.",
        "In the {nth} minute {far} had the first goal.",
        "{S} shouted {how} that the goal was not fair.",
        "{O} took the ball and ran past {number} players.",
        "{S} passed the ball to {O}, who kicked it over the wall.",
        "{pet} ran across the field, and the match had to stop for {number} minutes.",
        "{P} played well together, and the crowd sang for them.",
        "Just before half time {S} made a goal with {his} head.",
        "At half time the players ate {foods} and drank water.",
        "{O} told the team to play more {adverb} and to watch the left side.",
        "{a_person} in the crowd threw {a_food} at {O}.",
        "{S} fell on the grass and hurt {his} leg, but {he} played on.",
        "The {sky} came, and {O} could not see the ball.",
        "{S} saved a hard ball with one hand.",
        "The people of {place} held up {Z} and sang {how}.",
        "In the last minute {O} kicked the ball into the goal.",
    ),
    (
        "{place} had won by {number} goals, and {S} was {feeling}.",
        "{place} had lost the match, but {P} shook hands with the other team.",
        "{S} gave {X} to a child from {far}.",
        "After the match {S} took {mine} from the bench and went home with {O}.",
    ),
)

TOPICS = (VILLAGE, SEA, KITCHEN, SCHOOL, FARM, MARKET, BAND, MOUNTAIN, WORKSHOP, HOSPITAL, LIBRARY, MATCH)


@dataclass
class Character:
    """A person of the story and what the text says about that person."""

    name: str
    gender: str
    role: str
    trait: str
    colour: str
    noun: str


def _article(phrase: str) -> str:
    """Put 'a' or 'an' before a phrase."""
    return f"an {phrase}" if phrase[0] in "aeiou" or phrase.startswith("honest") else f"a {phrase}"


def _plural(noun: str) -> str:
    return IRREGULAR_PLURALS.get(noun, f"{noun}s")


def _draw_table() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Map each slot drawn from a word list to the list's name and its forms."""
    table = {key: (key, words) for key, words in (NOUNS | CHOICES).items()}
    for key, words in NOUNS.items():
        table[f"{key}s"] = (key, tuple(_plural(word) for word in words))
    for key in (*NOUNS, "adj", "colour", "trait"):
        base, words = table[key]
        table[f"a_{key}"] = (base, tuple(_article(word) for word in words))
    return table


DRAWS = _draw_table()
# A pronoun may stand for the subject only at the head of a sentence.
PRONOUN_HEADS = ("{S}", "{when} {S}", "First {S}")


class _Scene:
    """The facts of one passage; indexing it by a slot name gives the slot's text and updates what is known."""

    def __init__(self, rng: random.Random, name: Callable[[], str], topic: Topic) -> None:
        self.rng = rng
        self.name = name
        size = rng.choice((2, 2, 3, 3, 4))
        self.cast = [
            Character(name(), rng.choice("fm"), role, trait, colour, noun)
            for role, trait, colour, noun in zip(
                rng.sample(topic.roles, size),
                rng.sample(TRAITS, size),
                rng.sample(COLOURS, size),
                rng.sample(OWNED, size),
                strict=True,
            )
        ]
        self.known: list[Character] = []
        self.place = name()
        self.place_kind = rng.choice(topic.places)
        self.far_kind = rng.choice([kind for kind in FAR_KINDS if kind != self.place_kind])
        self.object = rng.choice(topic.objects)
        self.object_adjective = rng.choice(ADJECTIVES)
        self.goods = rng.choice(topic.goods)
        self.goods_number = rng.choice(NUMBERS)
        self.pet = rng.choice(PETS)
        self.season = rng.choice(SEASONS)
        self.introduced: dict[str, str] = {}
        genders = {person.gender for person in self.cast[:2]}
        self.kin = rng.choice(KIN_MIXED if len(genders) == 2 else KIN_FEMALE if "f" in genders else KIN_MALE)
        self.kin_known = False
        self.last_subject: Character | str | None = None
        self.subject = self.cast[0]
        self.other: Character | None = None
        self.other_named = False
        self.pronoun_allowed = False
        self.singular = True
        self.used: set[tuple[str, int]] = set()

    def sentence(self, template: str, subject: Character | None = None) -> str:
        """Fill one template, about the given character or one chosen from those already known."""
        self.used.clear()
        self.other = None
        self.other_named = False
        last = self.last_subject
        if subject is not None:
            self.subject = subject
        elif not (isinstance(last, Character) and self.rng.random() < 0.55):
            self.subject = self.rng.choice(self.known)
        subject_first = template.startswith(PRONOUN_HEADS)
        self.pronoun_allowed = subject_first and last is self.subject
        text = template.format_map(self)
        if subject_first:
            self.last_subject = self.subject
        else:
            self.last_subject = "pair" if template.startswith("{P}") else None
        if "{S}" in template and self.subject not in self.known:
            self.known.append(self.subject)
        return text[0].upper() + text[1:]

    def new_paragraph(self) -> None:
        """Forget the last subject, so that the next sentence names its own."""
        self.last_subject = None

    def __getitem__(self, slot: str) -> str:
        handler = HANDLERS.get(slot)
        if handler is not None:
            return handler(self)
        if slot.startswith("n_"):
            return self._counted(slot[2:])
        return self._draw(slot)

    def _draw(self, slot: str) -> str:
        base, words = DRAWS[slot]
        index = self.rng.randrange(len(words))
        while (base, index) in self.used:
            index = self.rng.randrange(len(words))
        self.used.add((base, index))
        return words[index]

    def _counted(self, key: str) -> str:
        self.singular = self.rng.random() < 0.3
        return f"one {self._draw(key)}" if self.singular else f"{self._draw('number')} {self._draw(f'{key}s')}"

    def other_person(self) -> Character:
        if self.other is None:
            self.other = self.rng.choice([person for person in self.known if person is not self.subject])
        return self.other

    def subject_text(self) -> str:
        if self.pronoun_allowed and self.rng.random() < 0.7:
            return PRONOUNS[self.subject.gender][0]
        if self.subject in self.known and self.rng.random() < 0.2:
            return f"the {self.subject.role}"
        return self.subject.name

    def other_text(self) -> str:
        other = self.other_person()
        self.other_named = True
        return f"the {other.role}" if self.rng.random() < 0.2 else other.name

    def others_thing(self) -> str:
        other = self.other_person()
        if self.other_named:
            return f"the {other.colour} {other.noun}"
        self.other_named = True
        noun = f"{other.colour} {other.noun}" if self.rng.random() < 0.5 else other.noun
        return f"{other.name}'s {noun}"

    def own_thing(self) -> str:
        noun = self.subject.noun
        if self.rng.random() < 0.6:
            noun = f"{self.subject.colour} {noun}"
        return f"{PRONOUNS[self.subject.gender][1]} {noun}"

    def pair(self) -> str:
        if self.last_subject == "pair" and self.rng.random() < 0.75:
            return "they"
        if self.kin_known and self.rng.random() < 0.4:
            return f"the {self.kin}"
        return self.pair_names()

    def pair_names(self) -> str:
        return f"{self.cast[0].name} and {self.cast[1].name}"

    def kin_text(self) -> str:
        self.kin_known = True
        return self.kin

    def here(self) -> str:
        return self.place if self.rng.random() < 0.6 else f"the {self.place_kind}"

    def far(self) -> str:
        if "far" in self.introduced:
            return self.introduced["far"]
        self.introduced["far"] = self.name()
        return f"the {self.far_kind} of {self.introduced['far']}"

    def pet_text(self) -> str:
        if "pet" in self.introduced:
            return self.introduced["pet"] if self.rng.random() < 0.6 else f"the {self.pet}"
        self.introduced["pet"] = self.name()
        return f"{_article(self.pet)} called {self.introduced['pet']}"

    def object_text(self) -> str:
        full = f"{self.object_adjective} {self.object}"
        if "object" in self.introduced:
            return f"the {full if self.rng.random() < 0.5 else self.object}"
        self.introduced["object"] = full
        return _article(full)

    def goods_text(self) -> str:
        full = f"{self.goods_number} {self.goods}"
        if "goods" in self.introduced:
            return f"the {full if self.rng.random() < 0.6 else self.goods}"
        self.introduced["goods"] = full
        return full


HANDLERS: dict[str, Callable[[_Scene], str]] = {
    "S": _Scene.subject_text,
    "O": _Scene.other_text,
    "P": _Scene.pair,
    "X": _Scene.object_text,
    "Z": _Scene.goods_text,
    "names": _Scene.pair_names,
    "kin": _Scene.kin_text,
    "mine": _Scene.own_thing,
    "theirs": _Scene.others_thing,
    "here": _Scene.here,
    "far": _Scene.far,
    "pet": _Scene.pet_text,
    "place": lambda scene: scene.place,
    "season": lambda scene: scene.season,
    "home": lambda scene: f"the {scene.place_kind} of {scene.place}",
    "he": lambda scene: PRONOUNS[scene.subject.gender][0],
    "his": lambda scene: PRONOUNS[scene.subject.gender][1],
    "him": lambda scene: PRONOUNS[scene.subject.gender][2],
    "who": lambda scene: _article(f"{scene.subject.trait} {scene.subject.role}"),
    "owned": lambda scene: _article(f"{scene.subject.colour} {scene.subject.noun}"),
    "trait_of": lambda scene: scene.subject.trait,
    "a_role": lambda scene: _article(scene.subject.role),
    "otrait": lambda scene: scene.other_person().trait,
    "ocolour": lambda scene: scene.other_person().colour,
    "plain": lambda scene: f"{scene.other_person().name}'s {scene.other_person().noun}",
    "was": lambda scene: "was" if scene.singular else "were",
    "it": lambda scene: "it" if scene.singular else "them",
}


def _body(rng: random.Random, topic: Topic, target: int) -> list[str]:
    """Choose the middle templates of a passage: topic events in their order, general remarks between them."""
    events = min(len(topic.middle), max(4, target // 17))
    body = [topic.middle[index] for index in sorted(rng.sample(range(len(topic.middle)), events))]
    for remark in rng.sample(GENERAL, target // 20):
        body.insert(rng.randint(0, len(body)), remark)
    return body


def passage(rng: random.Random, name: Callable[[], str]) -> str:
    """Return one passage of one to three paragraphs; name() must give a fresh proper name at each call."""
    topic = rng.choice(TOPICS)
    scene = _Scene(rng, name, topic)
    target = rng.randint(MIN_TARGET_WORDS, MAX_TARGET_WORDS)
    breaks = 0 if target < 170 else rng.randint(0, 2)
    paragraphs: list[list[str]] = [[]]
    words = 0

    def write(template: str, subject: Character | None = None) -> None:
        nonlocal words
        text = scene.sentence(template, subject)
        words += text.count(" ") + 1
        paragraphs[-1].append(text)

    write(rng.choice(INTRO_FIRST), scene.cast[0])
    meetings = rng.sample(INTRO_OTHER, len(scene.cast))
    write(meetings.pop(), scene.cast[1])
    if rng.random() < 0.7:
        write(rng.choice(INTRO_PAIR))
    for template in sorted(rng.sample(topic.opening, 2), key=topic.opening.index):
        write(template)
    newcomers = scene.cast[2:]
    transitions = rng.sample(TRANSITIONS, breaks)
    for template in _body(rng, topic, target):
        if words >= target:
            break
        if len(paragraphs) <= breaks and words * (breaks + 1) >= target * len(paragraphs):
            paragraphs.append([])
            scene.new_paragraph()
            write(transitions.pop())
        elif newcomers and rng.random() < 0.3:
            write(meetings.pop(), newcomers.pop(0))
        write(template)
    for template in (rng.choice(topic.closing), rng.choice(CLOSING)):
        write(template)
    return "\n".join(" ".join(sentences) for sentences in paragraphs)


def sentence_words() -> set[str]:
    """Return the lower-case word forms, names left out, found in 3000 generated passages."""
    rng = random.Random(0)
    words: set[str] = set()
    for _ in range(3000):
        for token in passage(rng, lambda: "Name").lower().split():
            words.add(token.strip(".,;:?").removesuffix("'s"))
    return words - {"name"}
