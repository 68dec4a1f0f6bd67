"""Hostile specs: edits and edits files, hook calls, arguments of runs, texts, and sweep results. Hypothesis draws them."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from graphlens import HookedTransformer
from tests.hostile import spec_calls, spec_edits, spec_files
from tests.hostile.cases import Case, Owed, Place
from tests.hostile.truth import Truth

CHUNK = 100  # examples that are drawn with one seed


@dataclass(frozen=True)
class Warm:
    """What children inherit: the untouched model opened by graphlens, and its truth."""

    model: HookedTransformer
    truth: Truth


@dataclass(frozen=True)
class Group:
    """One kind of spec.

    Attributes:
        name: Its name.
        strategy: Draws one: plain data.
        prepare: Writes what of it lies in files.
        use: Uses it; returns what differs from what is right.
        few: How many are played in CI.
        many: How many are played where everything is.
        owed: What a spec is owed: "either", where ``use`` itself tells what must be refused.
    """

    name: str
    strategy: st.SearchStrategy[Any]
    prepare: Callable[[Any, Place], None]
    use: Callable[[Any, Any, Place], list[str]]
    few: int
    many: int
    owed: Owed = "either"


def _nothing(_: Any, __: Place) -> None:
    """Nothing of the spec lies in files."""


GROUPS = (
    Group("edits", spec_edits.edit_runs(), _nothing, spec_edits.run, 600, 1500),
    Group("edit files", spec_files.edit_files(), spec_files.write_edits, spec_files.run_edits, 500, 1000),
    Group("hook calls", spec_calls.hook_calls(), _nothing, spec_calls.run_hooks, 300, 600),
    Group("run arguments", spec_calls.arguments(), _nothing, spec_calls.run_arguments, 250, 500),
    Group("texts", spec_calls.texts(), _nothing, spec_calls.run_text, 150, 300),
    Group("sweep results", spec_files.results(), spec_files.write_result, spec_files.read_result, 200, 400),
)


@functools.cache
def drawn(name: str, chunk: int) -> list[Any]:
    """The examples of one chunk of a group: the same in every run with the same hypothesis."""
    strategy = next(group.strategy for group in GROUPS if group.name == name)
    found: list[Any] = []

    @seed(int(hashlib.sha256(f"{name} {chunk}".encode()).hexdigest()[:12], 16))
    @settings(
        max_examples=CHUNK,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(example: Any) -> None:
        found.append(example)

    draw()
    return found


def _numbered(group: Group) -> Iterator[tuple[str, Any]]:
    """The examples of a group with their names, chunk after chunk, without end."""
    for chunk in itertools.count():
        for index, example in enumerate(drawn(group.name, chunk)):
            yield f"{chunk:03}-{index:03}", example


def cases(warm: Callable[[], Warm], everything: bool, only: str | None = None) -> Iterator[Case]:
    """The cases of hostile specs.

    Args:
        warm: What children inherit.
        everything: Play many, else the few of CI.
        only: The one group to make, as the names of its cases begin.
    """
    for group in GROUPS:
        if only not in (None, group.name.replace(" ", "-")):
            continue
        for number, example in itertools.islice(_numbered(group), group.many if everything else group.few):
            yield Case(
                f"{group.name.replace(' ', '-')}/{number}/spec",
                f"specs: {group.name}",
                functools.partial(group.prepare, example),
                functools.partial(_use, group, warm, example),
                group.owed,
                repr(example),
            )


def _use(group: Group, warm: Callable[[], Warm], example: Any, place: Place) -> list[str]:
    return group.use(warm(), example, place)
