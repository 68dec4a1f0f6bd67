"""Metrics as data: what to measure of the logits, as records that say which positions and tokens they need.

A sweep asks a metric what it needs, computes no other logits, and hands these to ``of``; called on whole logits, a
metric does the same by itself.

>>> metric = LogitDiff(correct=2, incorrect=0)
>>> float(metric(np.array([[[0.0, 1.0, 5.0], [1.0, 2.0, 4.0]]])))
3.0
>>> metric.normalised(clean=5.0, corrupted=1.0)
Normalised(metric=LogitDiff(correct=2, incorrect=0), clean=5.0, corrupted=1.0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array, like
from graphlens.analysis.metric_inputs import checked, ids_of, kept, log_probability, one_hot, picked
from graphlens.analysis.numerics import log_softmax, softmax
from graphlens.edits.record import Record
from graphlens.errors import InputError

Array = npt.NDArray[Any]
ToToken = Callable[[str], int]


@dataclass(frozen=True, eq=False, repr=False)
class Needs(Record):
    """What a metric reads of the logits [b, p, V].

    ``positions``: int64 [n] or, where prompts differ, [b, n], counted from 0; None for every position. ``tokens``: int64
    [b, k], the vocabulary columns of each prompt; None for the whole vocabulary.
    """

    positions: Array | None = None
    tokens: Array | None = None

    def gather(self, logits: Array) -> Array:
        """The needed part [..., b, n, k or V] of logits [..., b, p, V]."""
        if self.positions is not None:  # [n] and [b, n] alike, against rows [b, 1]
            logits = logits[..., np.arange(logits.shape[-3])[:, None], self.positions, :]
        return logits if self.tokens is None else picked(logits, self.tokens[:, None])


@dataclass(frozen=True, eq=False, repr=False)
class Metric(Record):
    """The base of the metrics: one number per prompt, of the logits at ``position``, computed in float64.

    ``position`` is an int, or ints [b], one for each prompt; negative ones count from the end of the sequence, padding
    included. ``reduction`` "mean" averages over the prompts, "none" keeps one value for each. A metric of one's own
    defines ``label``, ``_values`` and, unless it needs the whole vocabulary, ``_columns``; arrays in its fields are [b].
    """

    label: ClassVar[str] = "metric"
    token_fields: ClassVar[tuple[str, ...]] = ()  # the fields that hold token ids, or text until ``bound``
    anywhere: ClassVar[bool] = False  # whether ``position`` may be None: every position

    if TYPE_CHECKING:  # each metric has these as fields, after its operands: declared here, they would come before them

        @property
        def position(self) -> Any: ...  # noqa: D102
        @property
        def reduction(self) -> str: ...  # noqa: D102

    def __post_init__(self) -> None:
        if not (self.position is None and self.anywhere):
            position = checked(self.position, self._called("position"), "iu", (0, 1), "an int, or ints [b]")
            self._set("position", kept(position, np.int64))
        for field in self.token_fields:
            self._set(field, ids_of(getattr(self, field), self._called(field), every=self.position is None))
        if self.reduction not in ("mean", "none"):
            raise InputError(f"{self._called('reduction')} must be 'mean' or 'none', not {self.reduction!r}.")

    @property
    def name(self) -> str:
        """What to call it in a table or a plot."""
        return self.label

    @property
    def plain(self) -> Metric:
        """The metric without its normalisation: what its baselines are measured with."""
        return self

    def filled(self, clean: Any, corrupted: Any) -> Metric:
        """The metric with the baselines that it lacks: itself, unless it is normalised."""
        return self

    def normalised(self, clean: Any = None, corrupted: Any = None) -> Normalised:
        """(metric - corrupted) / (clean - corrupted): see ``normalised``."""
        return Normalised(self, clean, corrupted)

    def bound(self, to_single_token: ToToken | None) -> Self:
        """The metric with token ids in place of text. Raises InputError where there is text and no tokenizer."""
        changes: dict[str, Any] = {}
        for field in self.token_fields:
            value = getattr(self, field)
            if not isinstance(value, str | tuple):
                continue
            if to_single_token is None:
                raise InputError(f"{self._called(field)} is {value!r}, and there is no tokenizer: give token ids.")
            ids = [to_single_token(text) for text in ((value,) if isinstance(value, str) else value)]
            changes[field] = ids[0] if isinstance(value, str) else ids
        return replace(self, **changes) if changes else self

    def needs(self, batch: int, length: int) -> Needs:
        """What it reads of the logits [batch, length, V].

        Raises InputError for a position outside the prompts, for fields that hold one entry for each of another number
        of prompts, and for text that is not bound to token ids.
        """
        self._check_batch(batch)
        return Needs(self._positions(length), self._columns(batch))

    def check(self, d_vocab: int) -> None:
        """Raises InputError for token ids that a vocabulary of ``d_vocab`` does not have, and for unbound text."""
        for field in self.token_fields:
            highest = int(np.max(self._known(field)))
            if highest >= d_vocab:
                raise InputError(f"{self._called(field)} is {highest}: token ids go from 0 to {d_vocab - 1}.")

    def of(self, logits: Any) -> Array:
        """The values [..., b], float64, of logits [..., b, n, k or V] at exactly the positions and tokens it needs.

        Leading axes are variants of the same prompts. NaN logits give NaN. Raises InputError for logits that do not fit.
        """
        scores = checked(logits, "logits", "f", range(3, 33), "floating point [..., batch, position, token]", size=0)
        batch, count, width = scores.shape[-3:]
        self._check_batch(batch)
        if count != self._count:
            raise InputError(f"{self!r} needs the logits at {self._count} positions; these have {count}.")
        columns = self._columns(batch)
        if columns is None:
            self.check(width)
        elif width != columns.shape[1]:
            raise InputError(f"{self!r} needs the logits of {columns.shape[1]} tokens; these have {width}.")
        with np.errstate(invalid="ignore"):  # of infinite logits: the answer is NaN, and that says it
            return self._values(scores.astype(np.float64, copy=False))

    def reduced(self, values: Array) -> Array:
        """Values [..., b] averaged over the prompts [...] or, with reduction "none", as they are."""
        return values.mean(-1) if self.reduction == "mean" else values

    @property
    def linear(self) -> bool:
        """Whether its derivative is the same whatever the logits."""
        return False

    def slopes(self, logits: Any) -> Array:
        """The derivative of the mean over the prompts with respect to logits [b, n, k or V] (as ``of`` takes them), of
        their shape, float64. Raises InputError with reduction "none": that is no one number."""
        if self.reduction != "mean":
            raise InputError(f"{self!r} is a number for each prompt; a gradient is of one: reduction='mean'.")
        scores = as_array(logits).astype(np.float64)
        return self._slopes(scores) / len(scores)

    def _slopes(self, scores: Array) -> Array:
        """The derivatives of each prompt's value."""
        raise InputError(f"{type(self).__name__} has no derivative: define _slopes.")

    def __call__(self, logits: Any) -> Any:
        """The value of logits [b, p, V]: a float64 scalar, or [b] with reduction "none"; for a tensor, a tensor of its
        dtype and device, through which no gradient flows. Raises InputError for logits that do not fit."""
        scores = checked(logits, "logits", "f", (3,), "floating point [batch, position, vocabulary]")
        needs = self.needs(*scores.shape[:2])
        self.check(scores.shape[2])
        value = self.reduced(self.of(needs.gather(scores)))
        return like(logits, value) if hasattr(logits, "new_tensor") else value

    @property
    def _count(self) -> int:
        """How many positions it needs."""
        return 1

    def _positions(self, length: int) -> Array | None:
        """The positions [n] or [b, n] it needs, from 0."""
        given = np.asarray(self.position, np.int64)
        outside = given[(given < -length) | (given >= length)]
        if outside.size:
            raise InputError(
                f"{self._called('position')} is {outside[0]}: prompts of {length} tokens have positions 0 to "
                f"{length - 1}, or -{length} to -1 from the end."
            )
        return np.where(given < 0, given + length, given)[..., None]

    def _columns(self, batch: int) -> Array | None:
        """The tokens [b, k] it needs; None for all."""
        return None

    def _values(self, scores: Array) -> Array:
        """Values [..., b] of float64 logits [..., b, n, k or V] that fit."""
        raise NotImplementedError

    def _called(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"

    def _check_batch(self, batch: int) -> None:
        for field, value in self._state().items():
            if isinstance(value, tuple | np.ndarray) and len(value) != batch:
                raise InputError(f"{self._called(field)} is of {len(value)} prompts; there are {batch}.")

    def _known(self, field: str) -> Any:
        value = getattr(self, field)
        if isinstance(value, str | tuple):
            hint = "metric.bound(model.to_single_token) makes token ids of it."
            raise InputError(f"{self._called(field)} is {value!r}: {hint}")
        return value


@dataclass(frozen=True, eq=False, repr=False)
class LogitDiff(Metric):
    """The logit of ``correct`` minus that of ``incorrect``: their log odds, in nats.

    Each is a token id, ids [b], the text of a single token, or a list of b such texts.
    """

    label: ClassVar[str] = "logit difference"
    token_fields: ClassVar[tuple[str, ...]] = ("correct", "incorrect")

    correct: Any
    incorrect: Any
    position: Any = -1
    reduction: str = "mean"

    def _columns(self, batch: int) -> Array:
        return np.stack([np.broadcast_to(self._known(field), (batch,)) for field in self.token_fields], axis=1)

    def _values(self, scores: Array) -> Array:
        return scores[..., 0, 0] - scores[..., 0, 1]

    linear = property(lambda self: True)

    def _slopes(self, scores: Array) -> Array:
        return np.broadcast_to([1.0, -1.0], scores.shape)


@dataclass(frozen=True, eq=False, repr=False)
class Probability(Metric):
    """The probability of ``token``: a token id, ids [b], the text of a single token, or a list of b such texts."""

    label: ClassVar[str] = "probability"
    token_fields: ClassVar[tuple[str, ...]] = ("token",)

    token: Any
    position: Any = -1
    reduction: str = "mean"

    def _values(self, scores: Array) -> Array:
        return np.exp(log_probability(scores, self._known("token"))[..., 0])

    def _slopes(self, scores: Array) -> Array:
        every: Array = softmax(scores)
        hit = one_hot(self._known("token"), scores)
        return (every * hit).sum(-1, keepdims=True) * (hit - every)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, repr=False)
class CrossEntropy(Metric):
    """-log p(target), in nats, at ``position``; lower is better.

    ``target`` is a token id, ids [b], the text of a single token, or a list of b such texts. With ``position=None`` it
    is the prompts' own tokens [b, p], and a prompt's value is the mean loss of each next token, as
    ``utils.lm_cross_entropy_loss`` has it.
    """

    label: ClassVar[str] = "cross-entropy"
    token_fields: ClassVar[tuple[str, ...]] = ("target",)
    anywhere: ClassVar[bool] = True

    target: Any
    position: Any = -1
    reduction: str = "mean"

    @property
    def _count(self) -> int:
        return 1 if self.position is not None else int(self.target.shape[1]) - 1

    def _positions(self, length: int) -> Array | None:
        if self.position is not None:
            return super()._positions(length)
        if self.target.shape[1] != length:
            raise InputError(f"CrossEntropy.target has {self.target.shape[1]} tokens a prompt; the logits, {length}.")
        return np.arange(length - 1)  # what follows the last token is not known

    def _values(self, scores: Array) -> Array:
        ids = self.target[:, 1:] if self.position is None else self._known("target")
        return -log_probability(scores, ids).mean(-1)  # type: ignore[no-any-return]

    def _slopes(self, scores: Array) -> Array:
        ids = self.target[:, 1:] if self.position is None else self._known("target")
        return (softmax(scores) - one_hot(ids, scores)) / scores.shape[1]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, repr=False)
class KLDivergence(Metric):
    """D_KL(softmax(reference) || softmax(logits)), in nats: 0 where both predict the same.

    ``reference``: logits [b, p, V], or [b, V] at the position. ``position=None`` averages over all positions. NaN and
    infinities in the reference are an InputError.
    """

    label: ClassVar[str] = "KL divergence"
    anywhere: ClassVar[bool] = True

    reference: Any
    position: Any = -1
    reduction: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        axes, wanted = ((3,), "[b, p, V]") if self.position is None else ((2, 3), "[b, p, V] or [b, V]")
        reference = checked(self.reference, "KLDivergence.reference", "f", axes, f"floating point {wanted}")
        if not np.isfinite(reference).all():
            raise InputError("KLDivergence.reference holds NaN or infinities.")
        self._set("reference", kept(reference, reference.dtype))

    @property
    def _count(self) -> int:
        return 1 if self.position is not None else int(self.reference.shape[1])

    def _positions(self, length: int) -> Array | None:
        found = self.reference.shape[-2] if self.reference.ndim == 3 else length
        if found != length:
            raise InputError(f"KLDivergence.reference has {found} positions; there are {length} in the logits.")
        return None if self.position is None else super()._positions(length)

    def check(self, d_vocab: int) -> None:
        """Raises InputError unless the reference is of a vocabulary of ``d_vocab``."""
        if self.reference.shape[-1] != d_vocab:
            raise InputError(f"KLDivergence.reference has {self.reference.shape[-1]} tokens; there are {d_vocab}.")

    @cached_property
    def _expected(self) -> Array:
        """The reference's log-probabilities [b, n, V]: a sweep asks for them again and again."""
        known = self.reference.ndim == 2
        logits = self.reference[:, None] if known else self.needs(*self.reference.shape[:2]).gather(self.reference)
        return log_softmax(logits.astype(np.float64))

    def _values(self, scores: Array) -> Array:
        probabilities = np.exp(self._expected)
        # Where the probability is 0, so is the term, even against a logit of -inf.
        ratio = np.where(probabilities > 0, self._expected - log_softmax(scores), 0)
        return (probabilities * ratio).sum(-1).mean(-1)  # type: ignore[no-any-return]

    def _slopes(self, scores: Array) -> Array:
        return (softmax(scores) - np.exp(self._expected)) / scores.shape[1]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, repr=False)
class Normalised(Metric):
    """(metric - corrupted) / (clean - corrupted) of a reduced ``metric``, whose ``of`` it keeps: see ``normalised``."""

    metric: Metric
    clean: Any = None
    corrupted: Any = None

    position = property(lambda self: self.metric.position)
    reduction = property(lambda self: self.metric.reduction)

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric) or isinstance(self.metric, Normalised):
            raise InputError(f"what is normalised is a metric that is not so yet, not {self.metric!r}.")
        given = [field for field in ("clean", "corrupted") if getattr(self, field) is not None]
        axes = (0, 1) if self.metric.reduction == "none" else (0,)
        for field in given:
            wanted = "a number (or numbers [b], where the metric's reduction is 'none')"
            baseline = checked(getattr(self, field), self._called(field), "fiu", axes, wanted)
            if not np.isfinite(baseline).all():
                raise InputError(f"{self._called(field)} holds NaN or infinities: nothing can be normalised by it.")
            self._set(field, kept(baseline, np.float64))
        if len(given) == 2 and not np.all(np.not_equal(*self._pair())):
            raise InputError(
                f"the {self.metric.name} is the same on a clean and its corrupted prompt: patching cannot be normalised "
                f"by a difference of 0 ({self.clean} and {self.corrupted}). Measure it as it is, or take other prompts."
            )

    def _pair(self) -> tuple[Array, Array]:
        clean, corrupted = np.asarray(self.clean), np.asarray(self.corrupted)
        if clean.ndim and corrupted.ndim and clean.shape != corrupted.shape:
            raise InputError(f"the clean baseline is of {len(clean)} prompts, the corrupted of {len(corrupted)}.")
        return clean, corrupted

    @property
    def name(self) -> str:
        """What to call it in a table or a plot."""
        return f"normalised {self.metric.name}"

    @property
    def plain(self) -> Metric:
        """The metric without its normalisation: what its baselines are measured with."""
        return self.metric

    def filled(self, clean: Any, corrupted: Any) -> Normalised:
        """The same with these baselines in place of those left out. Raises InputError as the constructor does."""
        found = (clean if self.clean is None else self.clean, corrupted if self.corrupted is None else self.corrupted)
        return Normalised(self.metric, *found)

    def bound(self, to_single_token: ToToken | None) -> Self:
        """The metric with token ids in place of text. Raises InputError where there is text and no tokenizer."""
        return replace(self, metric=self.metric.bound(to_single_token))

    def needs(self, batch: int, length: int) -> Needs:
        """What ``metric`` needs. Raises InputError also for baselines of another number of prompts."""
        self._check_batch(batch)
        return self.metric.needs(batch, length)

    def check(self, d_vocab: int) -> None:
        """Raises InputError for token ids that a vocabulary of ``d_vocab`` does not have."""
        self.metric.check(d_vocab)

    def of(self, logits: Any) -> Array:
        """The values [..., b] of ``metric``, not normalised: ``reduced`` does that."""
        return self.metric.of(logits)

    linear = property(lambda self: self.metric.linear)

    def slopes(self, logits: Any) -> Array:
        """The derivative of the normalised value. Raises InputError without both baselines."""
        if self.clean is None or self.corrupted is None:
            raise InputError(f"{self!r} lacks a baseline: pass clean and corrupted.")
        return self.metric.slopes(logits) / (self.clean - self.corrupted)  # type: ignore[no-any-return]

    def reduced(self, values: Array) -> Array:
        """Values [..., b] reduced as ``metric`` does, then normalised. Raises InputError without both baselines."""
        if self.clean is None or self.corrupted is None:
            raise InputError(f"{self!r} lacks a baseline: pass clean and corrupted, or let a sweep measure them.")
        return (self.metric.reduced(values) - self.corrupted) / (self.clean - self.corrupted)  # type: ignore[no-any-return]


def normalised(metric: Metric, clean: Any = None, corrupted: Any = None) -> Normalised:
    """(metric - corrupted) / (clean - corrupted): 0 where a patch changes nothing, 1 where it restores everything.

    ``clean`` and ``corrupted`` are the metric's values without a patch, numbers or [b] for reduction "none"; a sweep
    measures those left out. Raises InputError where they are equal, not finite, or of another shape.
    """
    return Normalised(metric, clean, corrupted)
