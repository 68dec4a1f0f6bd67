"""The comparison of a drift: three runs side by side, a layer at a time, and the figures of each hook point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.drift_figures import Bools, Sums, apart, counted, sums
from graphlens.analysis.drift_result import Drifted, DriftResult
from graphlens.errors import InputError
from graphlens.experiments.drift_run import ENDS, LOGITS, OtherT, Progress, Side, step_of
from graphlens.experiments.stepped_run import At, Company, Firing, SteppedRun
from graphlens.file.names import split_name

RESID_PRE = "hook_resid_pre"


@dataclass(frozen=True)
class Kept:
    """What patches need of the runs.

    Attributes:
        right: The reference's logits, or the activation that counts in their place.
        wrong: The other model's.
        mended: The other model's ``unembed.hook_out`` less the unembedding's own error; None where there is no such hook point.
        end: What both were read at: LOGITS, or a hook point where one of the models gives none.
        residuals: The other model's residual stream before each block.
        real: bool [b, p], True at real tokens; None where all are.
    """

    right: Array
    wrong: Array
    mended: Array | None
    end: str
    residuals: dict[int, Array]
    real: Bools | None


@dataclass(frozen=True)
class Compared:
    """What a comparison found, as sums: those of several batches of prompts add up.

    Attributes:
        every: Hook point -> all error.
        fresh: Hook point -> the error that its step adds.
        logits: That of the logits, or of what counts in their place.
    """

    every: dict[str, Sums]
    fresh: dict[str, Sums]
    logits: Sums

    def __add__(self, other: Compared) -> Compared:
        """The sums over the prompts of both."""
        every = {name: found + other.every[name] for name, found in self.every.items()}
        fresh = {name: found + other.fresh[name] for name, found in self.fresh.items()}
        return Compared(every, fresh, self.logits + other.logits)


class Comparison(Generic[ArrayT, OtherT]):
    """The three runs, and what was found of each hook point.

    Args:
        right: The reference.
        wrong: The other model.
        keep: Whether to keep what patches need.

    Attributes:
        count: How many steps there are.

    Raises:
        InputError: The models have no hook point in common.
    """

    def __init__(self, right: Side[ArrayT], wrong: Side[OtherT], keep: bool) -> None:
        self._right, self._wrong, self._keep = right, wrong, keep
        there = set(right.names)
        self._shared = [name for name in wrong.names if name in there]
        if not self._shared:
            raise InputError("the two models have no hook point in common, so there is nothing to compare.")
        self._steps = step_of(right.names, right.runner.config.n_layers)
        self._unembedded = next((name for name in ENDS if name in self._shared), None)
        headless = [side for side in (right, wrong) if side.runner.engine.manifest.headless]
        self._end = self._shared[-1] if headless else LOGITS
        self._limit = 0
        self.count = right.runner.config.n_layers + 2
        # The reference's activations, until both other runs have seen them: activation, what counts, how many are to come.
        self._stored: dict[Firing, tuple[Array, Bools | None]] = {}
        self._left: dict[Firing, int] = {}
        self._all: dict[str, Sums] = {}
        self._fresh: dict[str, Sums] = {}
        self._ends: list[Array] = []
        self._residuals: dict[int, Array] = {}
        self._mended: Array | None = None

    def run(self, progress: Progress) -> None:
        """Makes the three runs, a layer of each at a time.

        Args:
            progress: Counts the layers.

        Raises:
            InputError: An activation has another shape in the other model.
        """
        read = self._end if self._keep or not self._ends_in_a_hook() else ""
        company = Company()
        first = self._stepped(self._right, self._store, self._early, read, company)
        second = self._stepped(self._wrong, self._compare, self._waits, read, company)
        third = self._stepped(self._wrong, self._force, self._waits, "", company)
        runs = [first, second, third]
        try:
            for step in range(self.count):
                self._limit = step
                for each in runs:
                    each.advance()
                progress.advance()
            while not all(each.done for each in runs):  # what fires later than the layer that it belongs to
                for each in runs:
                    each.advance()
        finally:
            company.over = True  # first: a Ctrl-C while one of them is waited for must not leave the others
            for each in runs:
                each.close()
        self._ends = [each.result for each in (first, second) if each.result is not None] if read else []

    def _stepped(
        self, side: Side[ArrayT] | Side[OtherT], at: At, waits: Callable[[Firing], bool], read: str, company: Company
    ) -> SteppedRun[Array | None]:
        """A run of a side, with a call at each shared hook point."""
        return SteppedRun(lambda passing: side.run(passing, self._shared, read), at, waits, company)

    def _ends_in_a_hook(self) -> bool:
        """True if the last hook point holds the logits, so that they need not be handed out."""
        if self._end != LOGITS:
            return True
        config = self._right.runner.config
        plain = config.output_logits_scale == 1 and config.output_logits_soft_cap <= 0
        return plain and self._unembedded is not None

    def _early(self, firing: Firing) -> bool:
        """True where a run would begin another layer than the one that it is to compute."""
        return self._steps[firing[0]] > self._limit

    def _waits(self, firing: Firing) -> bool:
        """True where a run also has to wait for the reference."""
        return self._early(firing) or firing not in self._stored

    # What the runs do at hook points

    def _store(self, firing: Firing, activation: Array) -> Array:
        """Of the reference: keeps its activation."""
        name, config = firing[0], self._right.runner.config
        entry = self._right.entries[name]
        seen = counted(name, entry.axes, activation, self._right.real, config.is_causal)
        self._stored[firing], self._left[firing] = (activation, seen), 2
        return activation

    def _compare(self, firing: Firing, activation: Array) -> Array:
        """Of the other model as it is."""
        name, n = firing
        reference, seen = self._taken(firing, activation)
        layer, rest = split_name(name)
        if self._keep and layer is not None and rest == RESID_PRE:
            self._residuals[layer] = activation.copy()
        if self._keep and name == self._unembedded:
            self._mended = activation.copy()
        if n == 0:
            self._all[name] = sums(reference, activation, seen, self._right.heads(name))
        return activation

    def _force(self, firing: Firing, activation: Array) -> Array:
        """Of the other model where each step reads what the reference has."""
        name, n = firing
        reference, seen = self._taken(firing, activation)
        if n == 0:
            self._fresh[name] = sums(reference, activation, seen, self._right.heads(name))
        if self._mended is not None and name == self._unembedded:
            self._mended -= activation - reference.astype(activation.dtype)
        return put_in(reference, activation, seen)

    def _taken(self, firing: Firing, activation: Array) -> tuple[Array, Bools | None]:
        """The reference's activation and what of it counts. The last run that asks gets it let go."""
        found = self._stored[firing]
        self._left[firing] -= 1
        if not self._left[firing]:
            del self._stored[firing], self._left[firing]
        if found[0].shape != activation.shape:
            raise InputError(
                f"{firing[0]!r} has shape {list(found[0].shape)} in the reference and {list(activation.shape)} in the other "
                "model: drift compares two versions of one model, entry by entry."
            )
        return found

    # What came of it

    def kept(self) -> Kept:
        """What patches need, after ``run`` of a comparison that keeps it."""
        right, wrong = self._ends
        return Kept(right, wrong, self._mended, self._end, self._residuals, self._right.real)

    def compared(self) -> Compared:
        """What was found, after ``run``."""
        return Compared(self._all, self._fresh, self._of_logits())

    def result(self, found: Compared | None = None, shape: tuple[int, int] | None = None) -> DriftResult:
        """The figures.

        Args:
            found: What was found, of other prompts too; None for what this comparison did, after ``run``.
            shape: How many prompts that were, and how many positions; None for this comparison's.
        """
        found = self.compared() if found is None else found
        every, fresh = ({hook: each.apart for hook, each in side.items()} for side in (found.every, found.fresh))
        names = [side.runner.config.model_name for side in (self._right, self._wrong)]
        if names[0] == names[1]:
            folders = [side.runner.engine.folder.name for side in (self._right, self._wrong)]
            names = folders if folders[0] != folders[1] else names
        shared = set(self._shared)
        nodes = {**self._right.nodes, **self._wrong.nodes}
        order = [name for name in self._right.names if name in shared]
        sites = tuple(
            Drifted(
                name,
                every[name].relative,
                every[name].cosine,
                fresh[name].relative,
                every[name].heads,
                fresh[name].heads,
                nodes=tuple(nodes.get(name, ())),
            )
            for name in order
        )
        return DriftResult(
            sites,
            found.logits.apart.relative,
            names[0],
            names[1],
            tuple(name for name in self._right.names if name not in shared),
            tuple(name for name in self._wrong.names if name not in shared),
            self._right.request.shape if shape is None else shape,
            notes=()
            if self._end == LOGITS
            else (f"one of the models gives no logits: {self._end} counts in their place.",),
        )

    def _of_logits(self) -> Sums:
        """The error of the logits."""
        if not self._ends:
            return self._all[self._unembedded or self._end]
        right, wrong = self._ends
        return sums(right, wrong, _seen(right, self._right.real))


def logits_apart(right: Array, wrong: Array, real: Bools | None) -> float:
    """The relative error of logits at real tokens.

    Args:
        right: The reference's, [b, p, V]; or of another shape, where a model ends in something else.
        wrong: The other model's.
        real: bool [b, p], or None for all.
    """
    return apart(right, wrong, _seen(right, real)).relative


def _seen(logits: Array, real: Bools | None) -> Bools | None:
    """Which logits are of real tokens."""
    return real[..., None] if real is not None and logits.ndim == 3 and logits.shape[:2] == real.shape else None


def put_in(reference: Array, activation: Array, seen: Bools | None) -> Array:
    """The reference's activation in an activation's place, in its dtype; what does not count stays as it is.

    Args:
        reference: The reference's.
        activation: The other model's, of the same shape.
        seen: What counts, of a shape that broadcasts; None for all.
    """
    new = reference
    if reference.dtype != activation.dtype:
        if activation.dtype == np.float16:
            largest = np.finfo(np.float16).max
            new = np.clip(reference, -largest, largest)
        new = new.astype(activation.dtype)
    return new if seen is None else np.where(seen, new, activation)
