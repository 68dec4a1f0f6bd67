"""The base of the metrics, a record that says which logits it needs and what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, cast, overload

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, as_array, is_tensor, like
from graphlens.analysis.metric_inputs import Needs, checked, ids_of, kept, real_tokens, spanned
from graphlens.edits.record import Record
from graphlens.errors import InputError, is_one_of

if TYPE_CHECKING:
    from graphlens.analysis.normalised_metric import Normalised

ToToken = Callable[[str], int]
# Tokens of a metric: an id, the text of a single token, or one of these for each prompt.
TokenIds: TypeAlias = int | str | Sequence[int] | Sequence[str] | Array
# Positions of a metric: one, or one for each prompt; negative ones count from the end.
Positions: TypeAlias = int | Sequence[int] | Array
# A metric's value without a patch: a number, or one for each prompt [b].
Baseline: TypeAlias = float | Sequence[float] | Array | None


@dataclass(frozen=True, eq=False, repr=False)
class Metric(Record):
    """The base of the metrics: one number for each prompt, computed in float64 from the logits at ``position``.

    A metric of one's own defines ``label``, ``_values`` and, unless it needs the whole vocabulary, ``_columns``; arrays
    in its fields are [b]. For gradients it defines ``_slopes`` too. One that averages over positions leaves padding out
    by what ``masked`` gives it.

    Attributes:
        position: An int, or ints [b], one for each prompt; negative ones count from the end of the sequence, padding
            included.
        reduction: "mean" averages over the prompts, "none" keeps one value for each.
    """

    label: ClassVar[str] = "metric"
    token_fields: ClassVar[tuple[str, ...]] = ()  # the fields that hold token ids, or text until ``bound``
    anywhere: ClassVar[bool] = False  # whether ``position`` may be None: every position

    if TYPE_CHECKING:  # each metric has these as fields, after its operands: declared here, they would come before them

        @property
        def position(self) -> Positions | None: ...  # noqa: D102
        @property
        def reduction(self) -> str: ...  # noqa: D102

    def __post_init__(self) -> None:
        if not (self.position is None and self.anywhere):
            given = cast(Positions, self.position)  # None is refused here like any other value that is no int
            position = checked(given, self._called("position"), "iu", (0, 1), "an int, or ints [b]")
            self._set("position", kept(position, np.int64))
        for field in self.token_fields:
            self._set(field, ids_of(getattr(self, field), self._called(field), every=self.position is None))
        if not is_one_of(self.reduction, ("mean", "none")):
            raise InputError(f"{self._called('reduction')} must be 'mean' or 'none', not {self.reduction!r}.")

    @property
    def name(self) -> str:
        """What to call it in a table or a plot."""
        return self.label

    @property
    def plain(self) -> Metric:
        """The metric without its normalisation: what its baselines are measured with."""
        return self

    def filled(self, clean: Baseline, corrupted: Baseline) -> Metric:
        """The metric with the baselines that it lacks: itself, unless it is normalised.

        Args:
            clean: Its value on the clean prompts: a number, numbers [b], or None where it is not known.
            corrupted: Its value on the corrupted prompts, likewise.

        Returns:
            The metric, which measures in shares of the way between both where it is normalised.
        """
        return self

    def normalised(self, clean: Baseline = None, corrupted: Baseline = None) -> Normalised:
        """(metric - corrupted) / (clean - corrupted): see ``normalised``.

        Args:
            clean: Its value on the clean prompts: a number, numbers [b], or None for what a sweep measures.
            corrupted: Its value on the corrupted prompts, likewise.

        Returns:
            The metric in those shares.

        Raises:
            InputError: Where the two are equal, not finite, or of another shape.
        """
        from graphlens.analysis.normalised_metric import Normalised

        return Normalised(self, clean, corrupted)

    def bound(self, to_single_token: ToToken | None) -> Self:
        """The metric with token ids in place of text.

        Args:
            to_single_token: Gives the id of a text that is one token, as ``model.to_single_token`` does; None where
                there is no tokenizer.

        Raises:
            InputError: Where there is text and no tokenizer, or a text is not one token.
        """
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

    def masked(self, mask: ArrayInput | None) -> Self:
        """The metric of prompts with padding, which does not count. Whatever runs a model calls it with the run's mask.

        Args:
            mask: [b, p], 1 at real tokens, 0 at padding; None where there is none.

        Raises:
            InputError: For a mask of other prompts, and where ``position`` is padding, before a prompt or after it.
        """
        if mask is not None and self.position is not None:
            self._ensure_real(real_tokens(mask, "mask"))
        return self

    def _ensure_real(self, real: Array) -> None:
        """Raises InputError unless ``position`` lies, in each prompt, between its first real token and its last."""
        self._check_batch(len(real))
        if (positions := self._positions(real.shape[1])) is None:  # of a metric of one's own that reads all
            return
        at = np.broadcast_to(positions, (len(real), positions.shape[-1]))
        hits = np.take_along_axis(spanned(real), at, 1).all(-1)
        if not hits.all():
            row = int(np.flatnonzero(~hits)[0])
            raise InputError(
                f"{self._called('position')} is {self.position}, which is padding in prompt {row}: pad prompts on the left "
                "to read the last token at -1, or give a position for each prompt."
            )

    def needs(self, batch: int, length: int) -> Needs:
        """Which positions and tokens it reads of the logits [batch, length, V].

        Args:
            batch: The number of prompts.
            length: The number of tokens of each, padding included.

        Raises:
            InputError: For a position outside the prompts, for fields that hold one entry for each of another number
                of prompts, and for text that is not bound to token ids.
        """
        self._check_batch(batch)
        return Needs(self._positions(length), self._columns(batch))

    def check(self, d_vocab: int) -> None:
        """Refuses token ids that a vocabulary does not have.

        Args:
            d_vocab: The number of its tokens.

        Raises:
            InputError: For an id of ``d_vocab`` or more, and for text that is not bound to ids yet.
        """
        for field in self.token_fields:
            highest = int(np.max(self._known(field)))
            if highest >= d_vocab:
                raise InputError(f"{self._called(field)} is {highest}: token ids go from 0 to {d_vocab - 1}.")

    def of(self, logits: ArrayInput) -> Array:
        """The values of logits at exactly the positions and tokens that the metric needs.

        Args:
            logits: float [..., b, n, k or V], as ``Needs.gather`` gives them. Leading axes are variants of the same
                prompts.

        Returns:
            float64 [..., b]; NaN logits give NaN.

        Raises:
            InputError: For logits that do not fit.
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
        """Values of prompts, reduced as the metric says.

        Args:
            values: Float [..., b].

        Returns:
            Their mean over the prompts [...], or with reduction "none" as they are.
        """
        if self.reduction != "mean":
            return values
        return np.asarray(values.mean(-1) if self._shares is None else (values * self._shares).sum(-1))

    @property
    def _shares(self) -> Array | None:
        """What each prompt counts in the mean, [b], 1 together; None for all alike."""

    @property
    def linear(self) -> bool:
        """True if the derivative is the same whatever the logits."""
        return False

    def slopes(self, logits: ArrayInput) -> Array:
        """The derivative of the mean over the prompts with respect to the logits; with reduction "none", of each one's value.

        Args:
            logits: float [b, n, k or V], as ``of`` takes them.

        Returns:
            float64, of the logits' shape.

        Raises:
            InputError: The metric has no derivative.
        """
        scores = as_array(logits).astype(np.float64)
        if self.reduction == "none":
            return self._slopes(scores)
        share = 1 / len(scores) if self._shares is None else self._shares[:, None, None]
        return self._slopes(scores) * share

    def _slopes(self, scores: Array) -> Array:
        """The derivatives of each prompt's value."""
        raise InputError(f"{type(self).__name__} has no derivative: define _slopes.")

    @overload
    def __call__(self, logits: Array) -> Array: ...
    @overload
    def __call__(self, logits: ArrayT) -> ArrayT: ...
    def __call__(self, logits: Array | ArrayT) -> Array | ArrayT:
        """The value of whole logits.

        Args:
            logits: float [b, p, V], an array or a tensor.

        Returns:
            A float64 scalar, or [b] with reduction "none"; for a tensor, a tensor of its dtype and device, through
            which no gradient flows.

        Raises:
            InputError: For logits that do not fit.
        """
        scores = checked(logits, "logits", "f", (3,), "floating point [batch, position, vocabulary]")
        needs = self.needs(*scores.shape[:2])
        self.check(scores.shape[2])
        value = self.reduced(self.of(needs.gather(scores)))
        given_tensor: bool = is_tensor(logits)
        return like(logits, value) if given_tensor else value

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
        """A field's name in messages."""
        return f"{type(self).__name__}.{field}"

    def _check_batch(self, batch: int) -> None:
        """Raises InputError for fields that hold one entry for each of another number of prompts."""
        for field, value in self._state().items():
            if isinstance(value, tuple | np.ndarray) and len(value) != batch:
                raise InputError(f"{self._called(field)} is of {len(value)} prompts; there are {batch}.")

    def _known(self, field: str) -> int | Array:
        """The token ids of a field. Raises InputError for text."""
        value = getattr(self, field)
        if isinstance(value, str | tuple):
            hint = "metric.bound(model.to_single_token) makes token ids of it."
            raise InputError(f"{self._called(field)} is {value!r}: {hint}")
        return cast("int | Array", value)
