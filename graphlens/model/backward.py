"""Gradients of a metric with respect to activations: the seed that a metric gives, and which hook points have a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT, as_array
from graphlens.analysis.metric import Metric
from graphlens.analysis.numerics import counted_pairs
from graphlens.engine.plan import Plan
from graphlens.errors import InputError
from graphlens.file.io_names import DENSE, LOSS, SEED, SEED_POSITIONS, SEED_TOKENS, SPARSE, gradient_output
from graphlens.file.names import NamesFilter
from graphlens.model.request import Request
from graphlens.model.text import Input
from graphlens.runtime.types import Callback

if TYPE_CHECKING:
    from graphlens.engine.engine import Engine
    from graphlens.model.runner import Runner


@dataclass(frozen=True)
class Seed:
    """What a backward pass starts from.

    Attributes:
        kind: How it is fed: "dense", "sparse" or "loss"; see surgery.differentiate.
        feeds: The arrays that it is fed as, by input name.
    """

    kind: str
    feeds: Mapping[str, Array]

    @classmethod
    def dense(cls, gradient: Array) -> Seed:
        """A seed that gives the gradient with respect to every logit.

        Args:
            gradient: [b, p, V], in the dtype that the model computes in.
        """
        return cls(DENSE, {SEED: gradient})

    def repeated(self, times: int) -> Seed:
        """The seed of ``Request.repeated``: that of the one run, for each copy of its prompts.

        Args:
            times: How many copies.
        """
        return Seed(self.kind, {name: np.concatenate([array] * times) for name, array in self.feeds.items()})


class Differentiable(Protocol[ArrayT]):
    """A metric of one's own that has a derivative."""

    def gradient(self, logits: ArrayT) -> ArrayT:
        """d(metric)/d(logits) at these logits.

        Args:
            logits: [b, p, V].

        Returns:
            [b, p, V], finite numbers.
        """


# What users hand in to be differentiated. A plain function of the logits has no derivative: it is refused, with the reason.
Differentiated: TypeAlias = Metric | Differentiable[ArrayT] | Callable[[ArrayT], Any]


class Gradients(dict[str, ArrayT]):
    """Gradients by hook name.

    Attributes:
        straight_through: Operators that round -> how many of them the gradients passed as if they did not. Of a quantised
            model they are those of the products with the dequantised weights: what a small change of the activation would do
            if nothing were rounded. Empty where every gradient is the derivative itself.
    """

    straight_through: Mapping[str, int] = MappingProxyType({})

    def renamed(self, called: Callable[[str], str]) -> Gradients[ArrayT]:
        """The same gradients under other names.

        Args:
            called: Hook name -> what it is called.
        """
        found: Gradients[ArrayT] = Gradients({called(name): value for name, value in self.items()})
        found.straight_through = self.straight_through
        return found


def differentiable(engine: Engine, plan: Plan) -> set[str]:
    """The hook points that have one gradient in runs of a plan: they hold floats and fire once.

    Args:
        engine: The model's engine.
        plan: The kind of run.
    """
    entries = engine.hooks(plan)
    several = {name.partition("@")[0] for name in entries if "@" in name}
    return {name for name in entries if entries[name].dtype.startswith("float")} - several


def metric_seed(runner: Runner[ArrayT], request: Request, metric: Differentiated[ArrayT], each: bool = False) -> Seed:
    """The gradient of a metric with respect to the logits of a run.

    A metric whose derivative depends on the logits takes a forward first, with what is active.

    Args:
        runner: Runs the model.
        request: The run.
        metric: One of graphlens.metrics with a mean over the batch, or an object with ``gradient(logits)``.
        each: True takes a metric with a number for each prompt too, and gives each one's own gradient in its row.

    Returns:
        A sparse seed for a metric that reads some tokens only, else a dense one.

    Raises:
        InputError: For a metric without a derivative, or one that does not fit the run.
    """
    batch, length = request.shape
    dtype, width = np.dtype(runner.config.dtype), runner.config.d_vocab_out
    if not isinstance(metric, Metric):
        return Seed.dense(_own_gradient(runner, request, metric, (batch, length, width)).astype(dtype))
    if not each:
        _ensure_one(metric)
    metric = runner.bound(metric, request.mask)
    metric.check(width)
    needs = metric.needs(batch, length)
    positions = np.arange(length) if needs.positions is None else needs.positions
    positions = np.broadcast_to(positions, (batch, positions.shape[-1]))
    if metric.linear:  # its derivative is the same at all logits
        columns = width if needs.tokens is None else needs.tokens.shape[-1]
        scores = np.zeros((batch, positions.shape[-1], columns))
    else:
        scores = needs.gather(runner.run(request).logits)
    slopes = metric.slopes(scores).astype(dtype)
    if needs.tokens is not None:
        tokens = np.broadcast_to(needs.tokens[:, None], slopes.shape)
        return Seed(SPARSE, {SEED: slopes, SEED_POSITIONS: np.array(positions), SEED_TOKENS: np.array(tokens)})
    dense = np.zeros((batch, length, width), dtype)
    np.add.at(dense, (np.arange(batch)[:, None], positions), slopes)
    return Seed.dense(dense)


def _ensure_one(metric: Metric) -> None:
    """Raises InputError for a metric that is not one number."""
    if metric.reduction != "mean":
        raise InputError(f"{metric!r} is a number for each prompt; a gradient is of one: reduction='mean'.")


def class_seed(runner: Runner[ArrayT], request: Request, metric: Differentiated[ArrayT]) -> Seed:
    """The gradient of a metric with respect to the class logits [b, C] of a run over images.

    Args:
        runner: Runs the model.
        request: The run.
        metric: One of graphlens.metrics with a mean over the batch, which reads the logits as those of one position; or an
            object with ``gradient(logits)``, which gets them as they are.

    Raises:
        InputError: For a metric without a derivative, or one that does not fit the run.
    """
    batch, classes = request.shape[0], runner.config.d_vocab_out
    dtype = np.dtype(runner.config.dtype)
    if not isinstance(metric, Metric):
        return Seed.dense(_own_gradient(runner, request, metric, (batch, classes)).astype(dtype))
    _ensure_one(metric)
    metric = runner.bound(metric, None)
    metric.check(classes)
    needs = metric.needs(batch, 1)
    slopes = metric.slopes(needs.gather(runner.run(request).logits[:, None]))
    dense = np.zeros((batch, classes), dtype)
    tokens = np.arange(classes)[None] if needs.tokens is None else needs.tokens
    np.add.at(dense, (np.arange(batch)[:, None], np.broadcast_to(tokens, (batch, tokens.shape[-1]))), slopes[:, 0])
    return Seed.dense(dense)


def _has_gradient(metric: object) -> TypeGuard[Differentiable[Any]]:
    # Not isinstance: a protocol does not see what a proxy finds through __getattr__.
    return hasattr(metric, "gradient")


def _own_gradient(
    runner: Runner[ArrayT],
    request: Request,
    metric: Differentiable[ArrayT] | Callable[[ArrayT], Any],
    shape: tuple[int, ...],
) -> Array:
    if not _has_gradient(metric):
        raise InputError(
            f"{getattr(metric, '__name__', type(metric).__name__)!r} has no derivative: take one of graphlens.metrics, "
            "an object with gradient(logits), or on the torch face metric(model(tokens)).backward()."
        )
    found = as_array(metric.gradient(runner.border.to_user(runner.run(request).logits)))
    if found.shape != shape:
        raise InputError(f"gradient(logits) gave {list(found.shape)}; it must have the logits' shape, {list(shape)}.")
    if not np.isfinite(found).all():
        raise InputError("gradient(logits) gave NaN or infinities.")
    return found


def gradients(
    runner: Runner[ArrayT],
    input: Input[ArrayT],
    metric: Differentiated[ArrayT],
    names: NamesFilter,
    **forward_options: Any,
) -> Gradients[ArrayT]:
    """The gradients of a metric with respect to hook points; see HookedTransformer.gradients.

    Args:
        runner: Runs the model.
        input: Whole prompts.
        metric: What is differentiated.
        names: Which hook points; None for all that hold floats.
        **forward_options: The arguments of ``forward`` by name.

    Returns:
        Hook name -> gradient, shaped like the activation. No two share memory.

    Raises:
        InputError: Where no hook point of floats is asked for, and what ``metric_seed`` and Runner.run_backward raise.
    """
    request = runner.whole_prompts(input, **forward_options)
    asked = runner.select(names, request)
    if names is None or callable(names):
        possible = differentiable(runner.engine, request.plan)
        asked = [name for name in asked if name in possible]
    if not asked:
        raise InputError("names picks no hook point of floats: there is nothing to differentiate.")
    seed = (class_seed if runner.config.is_vision else metric_seed)(runner, request, metric)
    ran = runner.run_backward(request, seed, asked)
    values: Gradients[ArrayT] = Gradients()
    values.straight_through = ran.straight_through
    seen: set[int] = set()
    for name in asked:  # hook points that share a value get arrays of their own
        value = ran.values[gradient_output(name)]
        values[name] = runner.border.to_user(value.copy() if id(value) in seen else value)
        seen.add(id(value))
    return values


def loss_seed(request: Request, dtype: str) -> Seed:
    """The seed of the mean next-token loss of a run.

    Args:
        request: The run; its mask says which pairs of neighbouring tokens count.
        dtype: The dtype that the model computes in.

    Returns:
        A weight [b, p] for each next-token loss; together they are 1.

    Raises:
        InputError: For a run with a KV cache or without tokens.
    """
    if request.cache is not None or request.tokens is None:
        raise InputError(
            "gradients are of whole prompts: without past_kv_cache, and with start_at_layer pass tokens= for the loss."
        )
    counted = counted_pairs(request.mask, request.shape)
    weights = np.zeros(request.shape, dtype)
    weights[:, :-1] = counted / counted.sum()
    return Seed(LOSS, {SEED: weights, SEED_TOKENS: np.roll(request.tokens, -1, axis=1)})


def noting(name: str, callback: Callback, changing: list[str]) -> Callback:
    """A callback that also notes whether it changes what it is given.

    Args:
        name: The hook point's name.
        callback: What is called.
        changing: Gets the name appended each time that the activation changes.
    """

    def run(activation: Array) -> Array:
        before = activation.copy()
        after = callback(activation)
        if not np.array_equal(before, after, equal_nan=True):
            changing.append(name)
        return after

    return run
