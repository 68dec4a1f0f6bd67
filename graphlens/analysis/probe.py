"""Linear probes of a harvest: what can be read off activations, tried on documents that the probe was not made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array, ArrayInput, as_array
from graphlens.analysis.harvest_labels import UNSAID, Labelled, Labels, labelled
from graphlens.analysis.harvest_means import grouped_means, pieces
from graphlens.analysis.probe_fit import FITTED, fit
from graphlens.analysis.probe_score import ProbeScore, score
from graphlens.errors import InputError, InputShapeError, checked_number, is_one_of
from graphlens.file.harvest_files import DOCUMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from graphlens.analysis.harvest import Harvest

KINDS = (*FITTED, "mean")


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A linear probe: a direction and a bias, and how well they tell documents that they were not made of.

    It is an array too, that of its direction: ``Steer(probe.hook, probe, coefficient=2)``.

    Attributes:
        hook: The hook point.
        kind: "logistic", "ridge" or "mean".
        direction: float32 [*shape]: towards True.
        bias: What is added to an activation's product with ``direction``; the sum is more than 0 where the probe says True.
        held_out: How well it tells the documents that were held out.
        training: How well it tells those that it was made of.
        test_documents: bool [documents], True for those that were held out.
    """

    hook: str
    kind: str
    direction: npt.NDArray[np.float32]
    bias: float
    held_out: ProbeScore
    training: ProbeScore
    test_documents: npt.NDArray[np.bool_]

    @property
    def accuracy(self) -> float:
        """The share of held-out tokens that it is right about."""
        return self.held_out.accuracy

    @property
    def auc(self) -> float:
        """The area under its ROC curve, of held-out tokens."""
        return self.held_out.auc

    def scores(self, activations: ArrayInput) -> npt.NDArray[np.float64]:
        """How far activations lie on the side of True.

        Args:
            activations: [..., *shape].

        Returns:
            float64 [...], more than 0 for True. Of a logistic probe, the logarithm of the odds.

        Raises:
            InputShapeError: The activations have another shape.
        """
        given, shape = as_array(activations), self.direction.shape
        leading = given.shape[: given.ndim - len(shape)]
        if given.ndim < len(shape) or given.shape[len(leading) :] != shape:
            raise InputShapeError(
                f"this probe is of activations [..., {str(list(shape))[1:]}, not {list(given.shape)}."
            )
        flat = given.reshape(-1, self.direction.size).astype(np.float64)
        return _numbers(flat, self.direction, self.bias).reshape(leading)

    def predict(self, activations: ArrayInput) -> npt.NDArray[np.bool_]:
        """What it says of activations.

        Args:
            activations: [..., *shape].

        Returns:
            bool [...].

        Raises:
            InputShapeError: The activations have another shape.
        """
        return self.scores(activations) > 0

    def score(self, harvest: Harvest, labels: Labels, *, by: str = "document", confidence: float = 0.95) -> ProbeScore:
        """How well it tells the tokens of another harvest.

        Args:
            harvest: The harvest, which has the probe's hook point.
            labels: What is true of its documents or tokens, as for ``Harvest.probe``.
            by: "document" or "token": what a label is of.
            confidence: Of the intervals, between 0 and 1.

        Raises:
            InputKeyError: The harvest has not this hook point.
            InputError: The labels are not so many bools, or all are alike.
        """
        found = labelled(harvest, labels, by)
        _ensure_both(found.by_document().sum(1), "this harvest")
        units = np.arange(harvest.n_documents)
        return _score(found, self.hook, self.direction, self.bias, units, _confidence(confidence))

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self.direction, dtype)

    def __repr__(self) -> str:
        low, high = self.held_out.accuracy_interval
        return (
            f"Probe({self.hook!r}, {self.kind}, held out: accuracy {self.accuracy:.3f} ({low:.3f} to {high:.3f}), "
            f"AUC {self.auc:.3f})"
        )

    def __rich__(self) -> Table:
        """A table of how well it does on both parts."""
        from graphlens.views.tables import probe_table

        return probe_table(f"{self.kind} probe at {self.hook}", {"held out": self.held_out, "training": self.training})


def probe(
    harvest: Harvest,
    labels: Labels,
    hook: str,
    by: str,
    kind: str,
    l2: float,
    test: float,
    groups: ArrayInput | None,
    seed: int,
    confidence: float,
) -> Probe:
    """See ``Harvest.probe``."""
    if not is_one_of(kind, KINDS):
        raise InputError(f"kind={kind!r}: a probe is {', '.join(map(repr, KINDS))}.")
    # Without l2 the weights of a logistic probe grow for ever where a plane parts the two kinds.
    l2, test = checked_number(l2, "l2", float, 1e-8), checked_number(test, "test", float, 0.01, 0.99)
    seed, confidence = checked_number(seed, "seed", least=0), _confidence(confidence)
    column = harvest[hook]  # raises where it was not harvested
    given = labelled(harvest, labels, by)
    counts = given.by_document()
    _ensure_both(counts.sum(1), "this harvest")
    units = _units(harvest, groups)
    held_out = _held_out(counts, units, test, seed)
    for part, chosen in (("the held-out part", held_out), ("the part that the probe is made of", ~held_out)):
        _ensure_both(counts[:, chosen].sum(1), part, of=counts)
    training = _part(given, ~held_out)
    width = harvest.plan.width(hook)
    if kind == "mean":
        (false, true), _ = grouped_means(harvest, hook, training.of_shard, 2)
        weights = true - false
        bias = -float(weights @ (true + false)) / 2
    else:

        def data() -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
            for values, kinds, _ in pieces(harvest, hook, training.of_shard):
                yield values, kinds

        weights, bias = fit(data, width, kind, l2)
    direction = weights.astype(np.float32).reshape(column.shape[1:])
    scores = [_score(part, hook, direction, bias, units, confidence) for part in (_part(given, held_out), training)]
    return Probe(hook, kind, direction, bias, scores[0], scores[1], held_out)


def _numbers(flat: npt.NDArray[np.float64], direction: npt.NDArray[np.float32], bias: float) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = flat @ direction.reshape(-1).astype(np.float64) + bias
    return found


def _confidence(given: float) -> float:
    return checked_number(given, "confidence", float, 0.01, 0.9999)


def _ensure_both(counts: Array, where: str, of: Array | None = None) -> None:
    """Raises InputError where no token is labelled True, or none False."""
    if counts.all():
        return
    has = (
        ""
        if of is None
        else f": there are {(of[0] > 0).sum():,} documents with False and {(of[1] > 0).sum():,} with True"
    )
    raise InputError(f"no token of {where} has the label {bool(counts[0])}{has}. A probe needs both.")


def _units(harvest: Harvest, groups: ArrayInput | None) -> npt.NDArray[np.int64]:
    """int64 [documents]: documents with the same number stay together."""
    if groups is None:
        return np.arange(harvest.n_documents)
    given, count = as_array(groups), harvest.n_documents
    if given.shape != (count,) or given.dtype == object:
        raise InputError(
            f"groups has a number or text for each of the {count:,} documents, not {given.dtype} {list(given.shape)}."
        )
    return np.unique(given, return_inverse=True)[1].astype(np.int64)


def _held_out(
    counts: npt.NDArray[np.int64], units: npt.NDArray[np.int64], share: float, seed: int
) -> npt.NDArray[np.bool_]:
    """bool [documents]: which are held out. A share is taken of the units with both labels, with True, and with False alone."""
    random = np.random.default_rng(seed)
    has = np.zeros((2, int(units.max(initial=-1)) + 1), bool)
    for kind in (0, 1):
        has[kind, units[counts[kind] > 0]] = True
    found = np.zeros(has.shape[1], bool)
    for alike in (has[0] & has[1], has[1] & ~has[0], has[0] & ~has[1]):
        of = random.permutation(np.flatnonzero(alike))
        found[of[: min(max(round(share * len(of)), 1), max(len(of) - 1, 0))]] = True
    return found[units]


def _part(given: Labelled, documents: npt.NDArray[np.bool_]) -> Labelled:
    """The labels of some documents alone."""
    if given.by == "document":
        return Labelled(given.harvest, given.by, np.where(documents, given.marks, np.int8(UNSAID)).astype(np.int8))
    marks = given.marks.copy()
    for index, start in enumerate(given.harvest.starts[:-1].tolist()):
        inside = documents[given.harvest.shard(index)[DOCUMENTS]]
        marks[start : start + len(inside)][~inside] = UNSAID
    return Labelled(given.harvest, given.by, marks)


def _score(
    part: Labelled,
    hook: str,
    direction: npt.NDArray[np.float32],
    bias: float,
    units: npt.NDArray[np.int64],
    confidence: float,
) -> ProbeScore:
    """The score of a direction on tokens with labels."""
    found = [
        (_numbers(values, direction, bias), kinds, documents)
        for values, kinds, documents in pieces(part.harvest, hook, part.of_shard)
    ]
    numbers, kinds, documents = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return score(numbers, kinds > 0, documents, units[documents], confidence)
