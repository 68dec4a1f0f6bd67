"""What a case is, where it plays, and what can come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# What may come of a case. The first two are what the library owes; every other is a fault.
CLEAN, RIGHT = GOOD = ("clean error", "right")
WRONG, RAW, ABORT, HANG, MEMORY, ESCAPE, LEFTOVER = BAD = (
    "wrong",
    "raw traceback",
    "abort",
    "hang",
    "memory",
    "escape",
    "leftover",
)
OUTCOMES = (*GOOD, *BAD)

# What a case is owed. "refused": a clean error. "right": the number of the untouched file. "either" of the two. "safe": any
# number, if what the variant says now is no longer what the untouched file says; but no fault.
Owed = Literal["refused", "right", "either", "safe"]


class HarnessError(Exception):
    """A case could not be played: a defect of these tests, and not of the library."""


@dataclass(frozen=True)
class Place:
    """The folder of one case, new for each.

    Attributes:
        root: The folder itself.
        base: The untouched model folder, for reading only.
    """

    root: Path
    base: Path

    @property
    def model(self) -> Path:
        """The model folder that the variant is made of: a copy of the untouched one, then changed."""
        return self.root / "in" / "model"

    @property
    def edits(self) -> Path:
        """An edits file that a variant may write; its arrays lie beside it."""
        return self.root / "in" / "edits.json"

    @property
    def result(self) -> Path:
        """The JSON file of a sweep's result that a variant may write."""
        return self.root / "in" / "result.json"

    @property
    def out(self) -> Path:
        """What a route may write. Nothing is there at first."""
        return self.root / "written" / "out"

    @property
    def cache(self) -> Path:
        """graphlens's cache folder."""
        return self.root / "cache"

    @property
    def temporary(self) -> Path:
        """The folder for temporary files, empty again at the end."""
        return self.root / "tmp"

    @property
    def outside(self) -> Path:
        """A folder that nothing may open: weights and secrets as they would lie beside the model."""
        return self.root / "outside"

    @property
    def log(self) -> Path:
        """What the case wrote to its standard output and error."""
        return self.root / "log"


@dataclass(frozen=True)
class Case:
    """One variant on one route.

    Attributes:
        id: Its name, the same in every run: group/variant/route.
        group: The group that it is counted in.
        prepare: Makes the variant in the place.
        use: Goes the route; returns what differs from what is right, nothing where all is right. An error it may raise.
        owed: What the case is owed.
        about: What was made, for people.
    """

    id: str
    group: str
    prepare: Callable[[Place], None]
    use: Callable[[Place], list[str]]
    owed: Owed
    about: str = ""


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Attributes:
        outcome: One of OUTCOMES.
        detail: The message of the error, or what is wrong.
        seconds: How long it took.
    """

    outcome: str
    detail: str
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """True for what the library owes."""
        return self.outcome in GOOD


@dataclass(frozen=True)
class Variant:
    """One hostile or damaged folder.

    Attributes:
        name: Its name within the group.
        make: Changes the place, in which a copy of the untouched model lies.
        owed: What a route that reads the changed part is owed.
        part: What was changed: "graph", "weights", "tokenizer", "settings".
    """

    name: str
    make: Callable[[Place], None]
    owed: Owed = "refused"
    part: str = "graph"


Variants = Iterator[Variant]
