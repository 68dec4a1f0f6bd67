"""Indirect-object sentences ("When Mary and John went to the store, John gave a drink to" -> " Mary").

A template is an opening, which names two people and the one who acts, and a closing, which ends before the answer.
Training draws openings from a grammar of some thousands, and in most of its documents the words around the names
are shaken: any of them may be another word, left out or said between others, so that only the names and their order tell the
answer. The held-out openings and closings below are whole frames, written by hand, that the grammar can't make: nothing
of them is trained on but their words, which occur elsewhere.
``leaks`` finds held-out frames and name pairs in a text.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tiny_words import (
    DAYS,
    GIVING,
    HELD_OUT_PAIRS,
    NAMES,
    OBJECTS,
    PLACES,
    Split,
    is_female,
    sample_pair,
    with_article,
)

# {a} and {b} are the two people in the order they are introduced, {s} the one who acts and is named again. No frame
# begins with a name: names are one token each after a space.
CLASSIC_OPENING = "When {a} and {b} went to the {place}, {s}"
CLASSIC_CLOSING = "{giving} {an_object} to"
_CONJUNCTIONS = ("When", "After", "As", "Before", "While", "Once", "Since", "The day")
_LEADS = (
    "Today ", "On {day}, ", "Last night ", "One day ", "One morning ", "Last {day} ", "At night, ",
    "It was {day}, and ", "Soon ", "Then ", "In the end ", "It was cold, but ", "The sun came, and ",
)  # fmt: skip
_SCENES = (
    "{a} and {b} went to the {place}",
    "{a} and {b} walked by the {place}",
    "{a} and {b} left the {place}",
    "{a} and {b} were at the {place}",
    "{a} and {b} were tired at the {place}",
    "{a} and {b} sat near the {place}",
    "{a} and {b} ran to the {place}",
    "{a} and {b} played at the {place}",
    "{a} and {b} came home from the {place}",
    "{a} and {b} looked for the {place}",
    "{a} and {b} had bread at the {place}",
    "{a} and {b} saw the {place2} and the {place}",
    "{a} and {b} walked from the {place2} to the {place}",
    "{a} and {b} met at the {place}",
    "{a} met {b} at the {place}",
    "{a} saw {b} near the {place}",
    "{a} played with {b} at the {place}",
    "{a} came to the {place} with {b}",
    "{a} walked home with {b}",
    "{a} looked for {b} at the {place}",
    "{a} found {b} at the {place}",
    "{a} said hello to {b} by the {place}",
    "{a} was at the {place} and saw {b}",
    "{a} ran from the {place} to {b}",
    "{a} and a dog saw {b} at the {place}",
    "{a}, {b} and a cat were at the {place}",
    "the {place} was near {a} and {b}",
    "the dog of {a} ran to {b} at the {place}",
    "{a} gave {an_object} to {b} at the {place}",
    "{a} sat down by {b} near the {place}",
    "{a} looked at {b} and the {place}",
    "there was {a}, and there was {b}, at the {place}",
    "with {an_object} for {b}, {a} went to the {place}",
    "a bird sang to {a}, a cat to {b}, at the {place}",
    "{a} was happy, {b} was tired, and it was cold at the {place}",
    "{a} liked {b}, a good friend, and the {place}",
    "{a} told {b} of the {place}",
    "near {a}, {b} played by the {place}",
    "{a} had a hat, and {b} had a cup, at the {place}",
    "two friends, {a} and {b}, saw the {place}",
    "a cow, a duck, {a}, and {b} walked to the {place}",
)
_LINKS = (
    ", and {s}", ". Then {s}", ", so {s}", ". Soon {s}", ". Later {s}", ", and later {s}", ". There {s}",
    ". The next day {s}", ", and soon {s}", ", but {s}", ". So {s}", ". On {day} {s}", ". After that, {s}",
)  # fmt: skip
# Between the one who acts and the closing: mostly nothing.
_MIDDLES = ("", "", "", "", " was happy and", " was glad and", " went home and", " came back and", " soon")
_CLOSINGS = {
    CLASSIC_CLOSING: 6,
    "{giving} the {object} to": 3,
    "decided to give {an_object} to": 2,
    "bought {an_object} for": 2,
    "had the {object} and gave it to": 2,
    "said hello to": 2,
    "wanted to give {an_object} to": 2,
    "found {an_object} and {giving} it to": 2,
    "sent {an_object} to": 2,
    "made {an_object} for": 2,
    "took the {object} to": 2,
    "had {an_object} for": 2,
    "asked for the {object} and gave it to": 2,
    "read a story to": 2,
    "wanted to play with": 2,
    "sang to": 2,
    "left {an_object} at the {place} for": 2,
    "kept the {object} in a hat for": 2,
    "took {an_object} from the {place} to": 2,
    "looked at the {place} and came to": 1,
    "asked for a red {object} and brought it to": 1,
    "said that the {object} was for": 2,
    "went to get {an_object} for": 2,
    "found {an_object} by the {place2} for": 2,
    "had a letter and read it to": 1,
    "put down the {object} and walked home with": 2,
    "saw the {object} in the {place} and gave it to": 1,
    "sat by the {place} and sang a song to": 1,
    "was a good friend to": 1,
    "ran from the {place2} to": 1,
    "gave bread and {an_object} to": 1,
    "brought a cup of tea for": 1,
}
HELD_OUT_OPENINGS = (
    "Because {a} and {b} liked the {place}, {s}",
    "Near the {place}, {a} and {b} sat down. Later {s}",
    "Every {day}, {a} and {b} met by the {place}, so {s}",
    "Now {a} was with {b} at the {place}. In the end {s}",
    "The {place} was cold when {a} came with {b}. Soon {s}",
    "Later {a} asked {b} to come to the {place}, and there {s}",
    "It was night when {a} and {b} found the {place}, so {s}",
    "There {a} had a friend, {b}, at the {place}. One day {s}",
)
HELD_OUT_CLOSINGS = (
    "looked for {an_object} and sent it to",
    "put {an_object} in a bag for",
    "told a story to",
)
SHAKEN_SHARE = 0.6
_SHAKES = (0.15, 0.4, 0.8)  # the share of words that change, drawn for each document
_FIRST_WORDS = (
    "When", "After", "As", "Before", "While", "Once", "Since", "Today", "Last", "One", "It", "Soon", "Then", "The", "On",
    "Because", "Near", "Every", "Now", "Later", "There", "At", "In", "So",
)  # fmt: skip
_THANKS = (
    "{io} was happy.",
    "{io} said thank you.",
    "{Io_he} was very happy.",
    "{S_he} was a good friend.",
    "Then {io} went home.",
    "Then they went home.",
    "{io} said thank you to {s}.",
)


def training_openings() -> Iterator[str]:
    """Every opening of the training grammar."""
    yield CLASSIC_OPENING
    for scene in _SCENES:
        yield from (f"{conjunction} {scene}, {{s}}" for conjunction in _CONJUNCTIONS)
        yield from (f"{lead}{scene}{link}" for lead, link in itertools.product(_LEADS, _LINKS))


@dataclass(frozen=True)
class IoiExample:
    """One indirect-object prompt.

    ``prompt`` ends just before the answer; the answer is ``" " + io``, and ``" " + s`` is the wrong answer it is
    measured against. ``corrupted`` is the same prompt with the other person acting, so its answer is ``" " + s``.
    ``opening`` is the frame it was made from.
    """

    prompt: str
    corrupted: str
    io: str
    s: str
    opening: str = CLASSIC_OPENING


def _opening(rng: random.Random, split: Split) -> str:
    if split == "held_out":
        return rng.choice(HELD_OUT_OPENINGS)
    if rng.random() < 0.03:
        return CLASSIC_OPENING
    scene, middle = rng.choice(_SCENES), rng.choice(_MIDDLES)
    if rng.random() < 0.4:
        return f"{rng.choice(_CONJUNCTIONS)} {scene}, {{s}}{middle}"
    return f"{rng.choice(_LEADS)}{scene}{rng.choice(_LINKS)}{middle}"


def _closing(rng: random.Random, split: Split) -> str:
    if split == "held_out":
        return rng.choice(HELD_OUT_CLOSINGS)
    return rng.choices(list(_CLOSINGS), list(_CLOSINGS.values()))[0]


def sample_ioi(
    rng: random.Random,
    pairs: Split = "train",
    openings: Split = "train",
    closings: Split = "train",
    shaken: bool = False,
) -> IoiExample:
    """One prompt with names, opening and closing each from its split, the names introduced in either order.

    ``shaken``: with other words around the names.
    """
    io, s = sample_pair(rng, pairs)
    first, second = (io, s) if rng.random() < 0.5 else (s, io)
    thing = rng.choice(OBJECTS)
    place, place2 = rng.sample(PLACES, 2)
    words = {
        "a": first,
        "b": second,
        "place": place,
        "place2": place2,
        "day": rng.choice(DAYS),
        "object": thing,
        "an_object": with_article(thing),
        "giving": rng.choice(GIVING),
    }
    opening = _opening(rng, openings)
    template = f"{opening} {_closing(rng, closings)}"
    template = _shaken(rng, template) if shaken else template
    return IoiExample(template.format(s=s, **words), template.format(s=io, **words), io, s, opening)


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
    clash = any(name == other or frozenset((name, other)) in HELD_OUT_PAIRS for other in (example.io, example.s))
    return None if clash else name


def _filler_words() -> tuple[str, ...]:
    """The words of all frames that may stand anywhere in a sentence, with objects, places and days."""
    frames = " ".join((*_SCENES, *_LINKS, *_CLOSINGS, *HELD_OUT_OPENINGS, *HELD_OUT_CLOSINGS))
    plain = {word for word in re.findall(r"[^\s,.]+", frames) if word.isalpha() and word.islower()}
    return (*sorted(plain), *OBJECTS, *PLACES, *DAYS, *GIVING)


FILLERS = _filler_words()  # each is one token after a space


def _shaken(rng: random.Random, template: str) -> str:
    """A template with other words around its names; the names, their order and the last word stay."""
    share = rng.choice(_SHAKES)
    first, *middle, last = template.split(" ")
    words = [first if first.startswith("{") or rng.random() > share else rng.choice(_FIRST_WORDS)]
    for word in middle:
        draw = rng.random()
        if re.search(r"\{[abs]\}", word) or rng.random() > share:
            words.append(word)
        elif draw >= 0.15:  # else it is left out
            stop = word[-1] if word[-1] in ",." else ""
            words.append(rng.choice(FILLERS) + stop)
            if draw > 0.85:
                words.append(rng.choice(FILLERS))
        # Commas move too: otherwise a name after one could only be the one who acts.
        if words[-1][-1] != "." and "{s}" not in words[-1] and rng.random() < 0.25 * share:
            words[-1] = words[-1][:-1] if words[-1].endswith(",") else f"{words[-1]},"
    return " ".join([*words, last])


def ioi_document(rng: random.Random) -> str:
    """A training document: a prompt, its answer and mostly a sentence more; never one that ``leaks``.

    One in ten has a third person acting, so that either name is right: the usual neutral baseline for patching.
    """
    while True:  # shaking may happen upon a held-out frame
        example = sample_ioi(rng, shaken=rng.random() < SHAKEN_SHARE)
        if not leaks(example.prompt):
            break
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


_ANY = {
    **dict.fromkeys(("a", "b", "s"), f"(?:{'|'.join(NAMES)})"),
    "place": f"(?:{'|'.join(PLACES)})",
    "day": f"(?:{'|'.join(DAYS)})",
    "an_object": f"an? (?:{'|'.join(OBJECTS)})",
}
_HELD_OUT_FRAMES = tuple(re.compile(frame.format(**_ANY)) for frame in (*HELD_OUT_OPENINGS, *HELD_OUT_CLOSINGS))
_NAME = re.compile(rf"\b(?:{'|'.join(NAMES)})\b")


def leaks(document: str) -> list[str]:
    """What the document has that training may not: a held-out opening or closing, whatever its words, or a pair."""
    found = [frame.pattern for frame in _HELD_OUT_FRAMES if frame.search(document)]
    pairs = itertools.combinations(sorted(set(_NAME.findall(document))), 2)
    return found + [" and ".join(pair) for pair in pairs if frozenset(pair) in HELD_OUT_PAIRS]
