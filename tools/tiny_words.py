"""The words that the embedded models' texts are made of, and the pairs of names that its training never sees together."""

from __future__ import annotations

import itertools
import random
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

PAIR_HOLD_OUT = 0.15
_PAIR_SEED = 20


def name_pairs(split: Split) -> list[tuple[str, str]]:
    """Unordered name pairs of one split, each in the order of ``NAMES``; (Mary, John) is always held out."""
    pairs = list(itertools.combinations(NAMES, 2))
    random.Random(_PAIR_SEED).shuffle(pairs)
    classic = ("Mary", "John")
    pairs.remove(classic)
    pairs.insert(0, classic)
    cut = round(PAIR_HOLD_OUT * len(pairs))
    return pairs[:cut] if split == "held_out" else pairs[cut:]


PAIRS: dict[Split, list[tuple[str, str]]] = {"train": name_pairs("train"), "held_out": name_pairs("held_out")}
HELD_OUT_PAIRS = frozenset(frozenset(pair) for pair in PAIRS["held_out"])


def sample_pair(rng: random.Random, split: Split = "train") -> tuple[str, str]:
    """Two different names that form a pair of ``split``, in random order."""
    first, second = rng.choice(PAIRS[split])
    return (first, second) if rng.random() < 0.5 else (second, first)


def with_article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def is_female(name: str) -> bool:
    """Whether the name takes "she" and "her"."""
    return name in FEMALE_NAMES
