"""A case on two commits in one run: measured in turns, so that the machine's drift falls on both alike."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from tools.bench.harness import Case, Figure, Setup, rounds
from tools.bench.machine import describe_machine
from tools.bench.peers import agreement
from tools.bench.ratios import Comparison, Pairs
from tools.bench.trees import Tree

REPEATS = 9  # at least, unless the user says otherwise: fewer pairs say little about their spread
_STARTS = 3
_WARMUP = 2


def comparable(case: Case) -> bool:
    """True if the case says how one commit is measured alone."""
    return case.works is not None or case.figures is not None


def compare(name: str, summary: str, case: Case, setup: Setup, trees: tuple[Tree, Tree]) -> Comparison:
    """Measures a case on both trees. Raises Disagreement where they do not find the same figures."""
    rows: list[Pairs] = []
    notes: list[str] = []
    starts = min(_STARTS, max(1, setup.repeats // _STARTS))
    if case.works is not None:
        found, notes = _works(name, setup, trees, starts)
        rows += found
    if case.figures is not None:
        rows += _figures(case, setup, trees)
        starts = starts if case.works is not None else setup.repeats
    old, new = trees
    machine = describe_machine()
    return Comparison(
        name, summary, setup.model.name, setup.repeats, starts, old.commit, new.commit, rows, machine, notes
    )


def _on(tree: Tree, setup: Setup) -> Setup:
    """The same setup with files that the tree's graphlens makes: an older one need not open what a newer one writes."""
    return replace(setup, model=setup.model.made_by(tree.folder, tree.child))


def _works(name: str, setup: Setup, trees: tuple[Tree, Tree], starts: int) -> tuple[list[Pairs], list[str]]:
    """Rows of the works, each tree's in a process that stays, and how far the results agree.

    The processes are started several times: how one's memory happens to lie speeds or slows all that it measures.
    """
    times: dict[str, dict[str, list[float]]] = {}
    notes: list[str] = []
    for start in range(starts):
        repeats = setup.repeats // starts + (start < setup.repeats % starts)
        with ExitStack() as stack:
            workers = {
                tree.name: stack.enter_context(tree.worker(name, _on(tree, setup).model.hooked, setup.workdir))
                for tree in (trees if start % 2 == 0 else trees[::-1])
            }
            checks = {tree.name: workers[tree.name].check for tree in trees}
            notes = agreement(checks)
            for label in workers[trees[0].name].labels:
                contenders = {tree.name: partial(workers[tree.name].measure, label) for tree in trees}
                row = times.setdefault(label, {tree.name: [] for tree in trees})
                for side, samples in rounds(contenders, repeats, _WARMUP).items():
                    row[side] += samples
    old, new = (tree.name for tree in trees)
    return [Pairs(label, "ms", row[old], row[new]) for label, row in times.items()], notes


def _figures(case: Case, setup: Setup, trees: tuple[Tree, Tree]) -> list[Pairs]:
    """Rows of the figures that fresh processes give."""
    measure = case.figures
    assert measure is not None

    def one_round(tree: Tree) -> list[Figure]:
        return list(measure(tree.child, setups[tree.name]))

    setups = {tree.name: _on(tree, setup) for tree in trees}
    found = rounds({tree.name: partial(one_round, tree) for tree in trees}, setup.repeats)
    old, new = (zip(*found[tree.name], strict=True) for tree in trees)
    return [
        Pairs(olds[0].label, olds[0].unit, [one.value for one in olds], [one.value for one in news])
        for olds, news in zip(old, new, strict=True)
    ]
