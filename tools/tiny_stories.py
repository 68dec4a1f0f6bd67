"""Short stories for the embedded models from a grammar: agreeing pronouns, small sums, weekdays, facts to remember.

A story is held out of training where its checksum is a multiple of ``STORY_HOLD_OUT``; the pairs of names held out in
``tiny_words`` meet in none.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence

from tiny_words import (
    ANIMALS,
    COLOURS,
    COUNTED,
    DAYS,
    GIVING,
    NAMES,
    NUMBERS,
    OBJECTS,
    PLACES,
    Split,
    is_female,
    sample_pair,
    with_article,
)

STORY_HOLD_OUT = 16

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
                    f"Near the {rng.choice(PLACES)}, a friend told {p['him']} to look for the {thing}.",
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
    mood = rng.choice(("happy", "tired", "sad", "glad"))
    return " ".join(
        (
            f"It was {name_day}, and it was a {weather} day at the {place}.",
            rng.choice(
                (
                    f"{p['n']} was {mood}, but it was {weather}, so {p['he']} {act}.",
                    f"Because it was {weather}, {p['n']} {act}.",
                    f"Every {rng.choice(ANIMALS)} sat down when it was {weather}, and {p['n']} {act}.",
                )
            ),
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
