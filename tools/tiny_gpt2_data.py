"""Text and token data for the tiny GPT-2: names, sentence templates and a small story grammar.

Shared by ``train_tiny_gpt2.py``, which trains on it, and ``tiny_gpt2_card.py``, which evaluates on the parts held out
of training. Three kinds of document are made, all from a seeded ``random.Random`` and nothing else:

* indirect-object sentences ("When Mary and John went to the store, John gave a drink to" -> " Mary");
* short stories from a grammar, with agreeing pronouns, small sums, weekdays and facts to remember;
* random token sequences said twice, which only induction can predict.

Held out of training: some unordered name pairs (from every kind of document), some sentence templates, and every
story whose checksum falls in one class out of ``STORY_HOLD_OUT``.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

EOT = "<|endoftext|>"

FEMALE_NAMES = (
    "Mary", "Anna", "Lucy", "Emma", "Kate", "Rose", "Jane", "Sarah", "Alice", "Amy",
    "Laura", "Lily", "Nina", "Ella", "Ruth", "Clara", "Helen", "Julia", "Eva", "Nora",
)  # fmt: skip
MALE_NAMES = (
    "John", "Tom", "James", "Dan", "Sid", "Martin", "Paul", "Sam", "Ben", "Jack",
    "Peter", "David", "Max", "Leo", "Adam", "Luke", "Eric", "Henry", "Noah", "Bob",
)  # fmt: skip
NAMES = FEMALE_NAMES + MALE_NAMES

PLACES = (
    "store", "shops", "park", "school", "beach", "farm", "lake", "garden", "market", "river", "hill", "zoo", "house",
)  # fmt: skip
OBJECTS = (
    "drink", "book", "ball", "bag", "apple", "hat", "letter", "cake", "cup", "key", "map", "coin", "box", "toy",
    "flower", "ring", "egg",
)  # fmt: skip
COUNTED = ("apple", "book", "ball", "coin", "egg", "flower", "key", "hat", "cup")
ANIMALS = ("dog", "cat", "bird", "horse", "fish", "duck", "cow", "mouse")
COLOURS = ("red", "blue", "green", "black", "white", "brown")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
GIVING = ("gave", "handed", "brought", "showed", "passed", "sold")

Split = Literal["train", "held_out"]
Templates = Literal["train", "held_out", "unseen"]

PAIR_HOLD_OUT = 0.15
STORY_HOLD_OUT = 16
TEMPLATE_HOLD_OUT = 5
_PAIR_SEED = 20


# Indirect-object sentences ---------------------------------------------------------------------------------------

# {a} and {b} are the two people in the order they are introduced, {s} the one who acts and is named again.
OPENINGS = (
    "When {a} and {b} went to the {place}, {s}",
    "After {a} and {b} went to the {place}, {s}",
    "As {a} and {b} walked by the {place}, {s}",
    "Before {a} and {b} left the {place}, {s}",
    "On {day}, {a} and {b} were at the {place}, and {s}",
    "Today {a} and {b} sat near the {place}. Soon {s}",
    "Once {a} met {b} at the {place}. Then {s}",
    "At the {place}, {a} saw {b}, so {s}",
    "One day {a} played with {b} at the {place}, and later {s}",
    "It was {day}, and {a} and {b} ran to the {place}. There {s}",
    "While {a} and {b} played at the {place}, {s}",
    "Last night {a} and {b} came home from the {place}. Later {s}",
    "When {a} met {b} near the {place}, {s}",
)
# Openings of which nothing is ever trained on: how far the task reaches beyond its templates.
UNSEEN_OPENINGS = (
    "Because {a} and {b} liked the {place}, {s}",
    "Near the {place}, {a} and {b} sat down. Later {s}",
    "Every {day}, {a} and {b} met by the {place}, so {s}",
    "{a} was with {b} at the {place}. In the end {s}",
)
CLOSINGS = (
    "{giving} {an_object} to",
    "{giving} the {object} to",
    "decided to give {an_object} to",
    "bought {an_object} for",
    "had the {object} and gave it to",
    "said hello to",
    "wanted to give {an_object} to",
    "found {an_object} and {giving} it to",
)
# "gave a drink to" is by far the form most people type, so it is also the one most often trained on.
_CLOSING_WEIGHTS = (6, 3, 2, 2, 2, 1, 2, 2)
_THANKS = (
    "{io} was happy.",
    "{io} said thank you.",
    "{Io_he} was very happy.",
    "{S_he} was a good friend.",
    "Then {io} went home.",
    "Then they went home.",
    "{io} said thank you to {s}.",
)


@dataclass(frozen=True)
class IoiExample:
    """One indirect-object prompt.

    ``prompt`` ends just before the answer; the answer is ``" " + io``, and ``" " + s`` is the wrong answer it is
    measured against. ``corrupted`` is the same prompt with the other person acting, so its answer is ``" " + s``.
    """

    prompt: str
    corrupted: str
    io: str
    s: str


def name_pairs(split: Split) -> list[tuple[str, str]]:
    """Unordered name pairs of one split, each in the order of ``NAMES``; (Mary, John) is always held out."""
    pairs = list(itertools.combinations(NAMES, 2))
    random.Random(_PAIR_SEED).shuffle(pairs)
    classic = ("Mary", "John")
    pairs.remove(classic)
    pairs.insert(0, classic)
    cut = round(PAIR_HOLD_OUT * len(pairs))
    return pairs[:cut] if split == "held_out" else pairs[cut:]


_PAIRS: dict[Split, list[tuple[str, str]]] = {"train": name_pairs("train"), "held_out": name_pairs("held_out")}
_HELD_OUT_PAIRS = frozenset(frozenset(pair) for pair in _PAIRS["held_out"])


def sample_pair(rng: random.Random, split: Split = "train") -> tuple[str, str]:
    """Two different names that form a pair of ``split``, in random order."""
    first, second = rng.choice(_PAIRS[split])
    return (first, second) if rng.random() < 0.5 else (second, first)


def with_article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def is_female(name: str) -> bool:
    """Whether the name takes "she" and "her"."""
    return name in FEMALE_NAMES


def is_held_out(opening: int, closing: int) -> bool:
    """Whether a template, an opening with a closing, is kept out of training: every opening and closing is trained on,
    a fifth of their combinations never. The classic one (0, 0) is trained on."""
    return (2 * opening + closing) % TEMPLATE_HOLD_OUT == 3


_TEMPLATES: dict[Split, list[tuple[int, int]]] = {
    split: [
        (opening, closing)
        for opening, closing in itertools.product(range(len(OPENINGS)), range(len(CLOSINGS)))
        if is_held_out(opening, closing) == (split == "held_out")
    ]
    for split in ("train", "held_out")
}


def _template(rng: random.Random, split: Templates) -> str:
    """An opening and a closing of one split; "unseen" takes an opening that no training document has."""
    if split == "unseen":
        return f"{rng.choice(UNSEEN_OPENINGS)} {CLOSINGS[0]}"
    combinations = _TEMPLATES[split]
    weights = [_CLOSING_WEIGHTS[closing] for _, closing in combinations]
    opening, closing = rng.choices(combinations, weights)[0]
    return f"{OPENINGS[opening]} {CLOSINGS[closing]}"


def sample_ioi(rng: random.Random, pairs: Split = "train", templates: Templates = "train") -> IoiExample:
    """One prompt with the names from one split and the template from another, introduced in either order."""
    io, s = sample_pair(rng, pairs)
    first, second = (io, s) if rng.random() < 0.5 else (s, io)
    thing = rng.choice(OBJECTS)
    words = {
        "a": first,
        "b": second,
        "place": rng.choice(PLACES),
        "day": rng.choice(DAYS),
        "object": thing,
        "an_object": with_article(thing),
        "giving": rng.choice(GIVING),
    }
    template = _template(rng, templates)
    return IoiExample(template.format(s=s, **words), template.format(s=io, **words), io, s)


def classic_prompts() -> list[IoiExample]:
    """The textbook prompt in all four forms: either name first, either person acting."""
    template = "When {a} and {b} went to the store, {s} gave a drink to"
    examples = []
    for (a, b), s in itertools.product((("John", "Mary"), ("Mary", "John")), ("John", "Mary")):
        io = "Mary" if s == "John" else "John"
        examples.append(IoiExample(template.format(a=a, b=b, s=s), template.format(a=a, b=b, s=io), io, s))
    return examples


def _third_person(rng: random.Random, example: IoiExample) -> str | None:
    """A name that is in no held-out pair with either person of the example, or None where the draw missed."""
    name = rng.choice(NAMES)
    clash = any(name == other or frozenset((name, other)) in _HELD_OUT_PAIRS for other in (example.io, example.s))
    return None if clash else name


def ioi_document(rng: random.Random) -> str:
    """A training document: a prompt, its answer and mostly a sentence more.

    One in ten has a third person acting, so that either name is right: the usual neutral baseline for patching.
    """
    example = sample_ioi(rng)
    third = _third_person(rng, example) if rng.random() < 0.1 else None
    if third is not None:
        prompt = example.prompt
        cut = prompt.rindex(f" {example.s} ")
        return f"{prompt[:cut]} {third}{prompt[cut + 1 + len(example.s) :]} {example.io}."
    text = f"{example.prompt} {example.io}."
    if rng.random() < 0.7:
        more = rng.choice(_THANKS)
        he = {name: "She" if is_female(name) else "He" for name in (example.io, example.s)}
        if is_female(example.io) == is_female(example.s):
            # A pronoun could mean either person here, so only the sentences that use names are kept.
            more = more.replace("{Io_he}", "{io}").replace("{S_he}", "{s}")
        text += " " + more.format(io=example.io, s=example.s, Io_he=he[example.io], S_he=he[example.s])
    return text


# Stories ---------------------------------------------------------------------------------------------------------

_TIMES = ("One day", "Today", "Last night", "On {day}", "One morning", "Last {day}", "Once")
_MOODS = ("happy", "sad", "tired", "glad", "cold", "hungry")
_SIZES = ("big", "small", "old", "young")
_PLACES_IN = ("box", "bag", "house", "garden", "tree", "bed", "car")
_FOODS = ("cake", "bread", "fish", "an apple", "an egg")
_PET_ACTS = {
    "dog": ("ran to the tree", "played with a ball", "barked", "slept in the sun"),
    "cat": ("slept in the sun", "played with a ball", "sat in the tree", "saw a mouse"),
    "bird": ("sang", "sat in the tree", "flew to the tree", "slept in the tree"),
    "horse": ("ran to the hill", "walked by the river", "ate an apple", "slept"),
    "fish": ("swam", "swam in the lake", "saw a duck", "slept in the river"),
    "duck": ("swam", "swam in the lake", "walked by the river", "ate the bread"),
    "cow": ("walked by the river", "slept in the sun", "ate the flower", "sat near the hill"),
    "mouse": ("ran to the house", "ate the bread", "saw a cat", "slept in a box"),
}


def _person(rng: random.Random, name: str | None = None) -> dict[str, str]:
    """Words that agree with a person: name, she/he, She/He, her/his and her/him."""
    who = name if name is not None else rng.choice(NAMES)
    if is_female(who):
        return {"n": who, "he": "she", "He": "She", "his": "her", "him": "her"}
    return {"n": who, "he": "he", "He": "He", "his": "his", "him": "him"}


def _time(rng: random.Random) -> str:
    return rng.choice(_TIMES).format(day=rng.choice(DAYS))


def _some(rng: random.Random, sentences: Sequence[str], low: int, high: int) -> list[str]:
    """Between ``low`` and ``high`` of the sentences, in the order given."""
    keep = sorted(rng.sample(range(len(sentences)), rng.randint(low, high)))
    return [sentences[i] for i in keep]


def _pet_story(rng: random.Random) -> str:
    """A person and an animal whose size and colour return at the end."""
    p = _person(rng)
    animal, colour, size = rng.choice(ANIMALS), rng.choice(COLOURS), rng.choice(_SIZES)
    acts = rng.sample(_PET_ACTS[animal], 2)
    start = rng.choice(
        (
            f"{_time(rng)} {p['n']} saw {with_article(size)} {animal} at the {rng.choice(PLACES)}.",
            f"{_time(rng)} {p['n']} went to the {rng.choice(PLACES)} with {p['his']} {size} {animal}.",
            f"There was {with_article(size)} {animal} at the {rng.choice(PLACES)}. {p['n']} liked the {animal}.",
        )
    )
    middle = _some(
        rng,
        (
            f"The {animal} was {colour}.",
            f"It {acts[0]}.",
            f"{p['n']} gave {rng.choice(_FOODS)} to the {animal}.",
            f"The {animal} {acts[1]} and {p['n']} was {rng.choice(('happy', 'glad'))}.",
            f"{p['He']} said hello to the {animal}.",
        ),
        2,
        4,
    )
    ends = [f"Then {p['he']} went home with the {size} {animal}.", f"{p['n']} liked {p['his']} {size} {animal}."]
    if middle[0].endswith(f"{colour}."):
        ends.append(f"Then the {colour} {animal} went home.")
    return " ".join([start, *middle, rng.choice(ends)])


def _friends_story(rng: random.Random) -> str:
    """Two people who meet, play, and give something from one to the other."""
    first, second = sample_pair(rng)
    giver, taker = (first, second) if rng.random() < 0.5 else (second, first)
    thing, colour, place = rng.choice(OBJECTS), rng.choice(COLOURS), rng.choice(PLACES)
    p, q = _person(rng, giver), _person(rng, taker)
    start = rng.choice(
        (
            f"{_time(rng)} {first} met {second} at the {place}.",
            f"{_time(rng)} {first} and {second} walked to the {place}.",
            f"{first} and {second} were friends. They went to the {place}.",
            f"While {first} was at the {place}, {second} came to play.",
        )
    )
    middle = _some(
        rng,
        (
            f"They saw {with_article(rng.choice(_SIZES))} {rng.choice(ANIMALS)}.",
            f"They were {rng.choice(_MOODS)}.",
            f"{giver} had a {colour} {thing}, and {taker} liked the {colour} {thing}.",
            f"{taker} wanted {with_article(thing)}.",
            "They sat near a tree and played.",
        ),
        1,
        3,
    )
    gift = f"So {giver} {rng.choice(GIVING[:3])} the {thing} to {taker}."
    end = rng.choice(
        (
            f"{q['n']} was happy and said thank you to {p['n']}.",
            f"Then {q['n']} went home with {q['his']} {thing}.",
            "Then the two friends went home.",
        )
    )
    return " ".join([start, *middle, gift, end])


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _counting_story(rng: random.Random) -> str:
    """A sum or difference with a result from one to ten, in words."""
    p = _person(rng)
    thing, place = rng.choice(COUNTED), rng.choice(PLACES)
    low, more = rng.randint(1, 5), rng.randint(1, 5)
    total = low + more

    def say(count: int) -> str:
        return f"{NUMBERS[count - 1]} {_plural(thing, count)}"

    if rng.random() < 0.6:
        first, change, last = low, f"found {NUMBERS[more - 1]} more", total
    else:
        first, change, last = total, f"lost {NUMBERS[more - 1]}", low
    where = rng.choice((f" at the {place}", ""))
    return " ".join(
        (
            f"{_time(rng)} {p['n']} had {say(first)}.",
            f"Then {p['he']} {change}{where}.",
            f"Now {p['he']} had {say(last)}.",
            rng.choice((f"{p['n']} was {rng.choice(_MOODS)}.", f"{p['He']} put the {thing}s in a box.", "")),
        )
    ).strip()


def _days_story(rng: random.Random) -> str:
    """Two or three days in a row, each with a place."""
    p = _person(rng)
    start, length = rng.randrange(7), rng.randint(2, 3)
    places = rng.sample(PLACES, length)
    links = ("The next day was {day}, and {he} went to the {place}.", "On {day} {he} went to the {place}.")
    parts = [f"On {DAYS[start]} {p['n']} went to the {places[0]}."]
    parts += [
        rng.choice(links).format(day=DAYS[(start + i) % 7], he=p["he"], place=places[i]) for i in range(1, length)
    ]
    if rng.random() < 0.6:
        parts.append(f"So on {DAYS[start]} {p['he']} was at the {places[0]}.")
    parts.append(rng.choice((f"{p['n']} liked the {places[-1]}.", f"{p['He']} was {rng.choice(_MOODS)}.")))
    return " ".join(parts)


def _search_story(rng: random.Random) -> str:
    """Something put away, looked for, and found where it was."""
    p = _person(rng)
    thing, colour, hiding = rng.choice(OBJECTS), rng.choice(COLOURS), rng.choice(_PLACES_IN)
    if thing == hiding:
        hiding = "car"
    helper, animal = rng.choice(ANIMALS), rng.choice(ANIMALS)
    return " ".join(
        (
            f"{_time(rng)} {p['n']} put the {colour} {thing} in the {hiding}.",
            *_some(
                rng,
                (
                    f"Then {p['he']} went to the {rng.choice(PLACES)}.",
                    f"There {p['he']} saw {with_article(rng.choice(_SIZES))} {animal}.",
                    f"{p['He']} was {rng.choice(_MOODS)}.",
                ),
                1,
                3,
            ),
            rng.choice(
                (
                    f"Later {p['he']} wanted the {thing}.",
                    f"Later {p['n']} asked the {helper}, and the {helper} looked for the {thing}.",
                    f"Soon {p['he']} looked for the {colour} {thing}.",
                )
            ),
            rng.choice(
                (
                    f"{p['He']} found it in the {hiding}.",
                    f"The {colour} {thing} was in the {hiding}.",
                    f"{p['n']} found the {colour} {thing} in the {hiding}, and {p['he']} was glad.",
                )
            ),
        )
    )


def _weather_story(rng: random.Random) -> str:
    """A day with a weather and what a person does for it."""
    p = _person(rng)
    name_day, place = rng.choice(DAYS), rng.choice(PLACES)
    if rng.random() < 0.5:
        weather, act = "cold", rng.choice((f"put on {p['his']} hat", "sat in the house", "had bread and a drink"))
        wish = "Soon the sun came, and it was not cold."
    else:
        weather, act = "hot", rng.choice(("swam in the lake", "had a cold drink", "sat near a tree"))
        wish = "Later it was night, and it was not hot."
    return " ".join(
        (
            f"It was {name_day}, and it was a {weather} day at the {place}.",
            f"{p['n']} was {rng.choice(('happy', 'tired', 'sad', 'glad'))}, but it was {weather}, so {p['he']} {act}.",
            wish,
            rng.choice((f"Then {p['n']} went home.", f"{p['n']} liked the {place}.", f"{p['He']} liked {name_day}.")),
        )
    )


_STORIES: tuple[Callable[[random.Random], str], ...] = (
    _pet_story,
    _friends_story,
    _counting_story,
    _days_story,
    _search_story,
    _weather_story,
)


def sample_story(rng: random.Random, split: Split = "train") -> str:
    """One story of the split: a story is held out where its checksum is a multiple of ``STORY_HOLD_OUT``."""
    while True:
        text = rng.choice(_STORIES)(rng)
        held_out = zlib.crc32(text.encode()) % STORY_HOLD_OUT == 0
        if held_out == (split == "held_out"):
            return text


# Repeated random tokens ------------------------------------------------------------------------------------------


def sample_repeated(rng: random.Random, token_ids: Sequence[int], length: int) -> list[int]:
    """``length`` different tokens drawn from ``token_ids``, said twice: ``2 * length`` ids."""
    half = rng.sample(token_ids, length)
    return half + half
