"""The groups of hostile files, and the routes that each of them goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from graphlens import interventions
from tests.hostile import external_data, graphs, links, manifests, stored, tokenizer_files
from tests.hostile.cases import Case, Owed, Place, Variant, Variants
from tests.hostile.routes import EDIT, ROUTES, Expected, Route

# Besides these two every variant goes one of the others in turn; all of them where everything is played.
ALWAYS = ("open", "check")
OTHERS = tuple(name for name in ROUTES if name not in ALWAYS)
# What reads the part that was changed, for parts that few routes read. Where nothing was changed each route has to come to
# its end: one that always fails would refuse all that is hostile.
FIRST = {
    "edits": ("edits_file",),
    "tokenizer": ("tokenizer", "check_run"),
    "settings": ("bake", "strip"),
    "nothing": OTHERS,
}


@dataclass(frozen=True)
class Group:
    """One kind of hostile file.

    Attributes:
        name: Its name.
        variants: Makes so many of them, those made by hand first; every number gives the same first ones.
        few: How many are played in CI.
        many: How many at most are played where everything is.
    """

    name: str
    variants: Callable[[int], Variants]
    few: int
    many: int


def _untouched(_: int) -> Variants:
    """The folder as it is."""
    yield Variant("as-it-is", lambda place: None, "right", "nothing")


GROUPS = (
    Group("untouched", _untouched, 2, 1),
    Group("external data", external_data.variants, 44, 160),
    Group("graphs", graphs.variants, 56, 240),
    Group("graph bytes", stored.graph_bytes, 20, 500),
    Group("weights", stored.weights_bytes, 22, 200),
    Group("manifests", manifests.variants, 22, 300),
    Group("tokenizers", tokenizer_files.variants, 20, 160),
    Group("links", links.variants, 16, 200),
)


def spread(group: Group) -> list[tuple[int, Variant]]:
    """The few variants of a group that are played in CI, with their numbers: the first of them, and some of the rest."""
    every = list(enumerate(group.variants(group.many)))
    first = every[: group.few // 2]
    rest = every[group.few // 2 :]
    step = max(len(rest) // (group.few - len(first)), 1)
    return [*first, *rest[::step][: group.few - len(first)]]


def cases(expected: Callable[[], Expected], everything: bool, only: str | None = None) -> Iterator[Case]:
    """The cases of hostile files.

    Args:
        expected: The numbers of the untouched file.
        everything: Play all variants, those of the first few on every route; else the few of CI.
        only: The one group to make, as the names of its cases begin.
    """
    for group in GROUPS:
        if only not in (None, group.name.replace(" ", "-")):
            continue
        chosen = list(enumerate(group.variants(group.many))) if everything else spread(group)
        for index, variant in chosen:
            turn = OTHERS[index % len(OTHERS)]
            names = FIRST.get(variant.part, ()) if variant.part in FIRST else ()
            if everything and index < group.few:
                names = (*ALWAYS, *OTHERS)
            for name in dict.fromkeys((*ALWAYS, *names, turn)):
                yield _case(group, variant, ROUTES[name], expected)


def _case(group: Group, variant: Variant, route: Route, expected: Callable[[], Expected]) -> Case:
    owed: Owed = variant.owed
    if variant.part not in route.reads and owed == "refused":
        owed = "either"  # what it does not read it need not refuse
    return Case(
        f"{group.name.replace(' ', '-')}/{variant.name}/{route.name}",
        f"files: {group.name}",
        partial(_prepare, variant),
        lambda place: route.use(expected(), place),
        owed,
        f"{variant.make}",
    )


def _prepare(variant: Variant, place: Place) -> None:
    """Makes a variant of a copy of the untouched folder."""
    shutil.copytree(place.base, place.model)
    variant.make(place)
    if not _there(place):
        interventions.save([interventions.Ablate(EDIT["hook"], heads=EDIT["heads"])], place.edits)


def _there(place: Place) -> bool:
    """True if the variant made an edits file of its own, of whatever kind."""
    return any(place.edits.parent.glob("edits.*"))
