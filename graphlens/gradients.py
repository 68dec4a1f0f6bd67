"""Gradients of a metric with respect to activations: the seed a metric gives, and the run that carries it back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.metrics import Metric
from graphlens.errors import InputError
from graphlens.gating import Window
from graphlens.gradient_names import DENSE, LOSS, SEED, SEED_POSITIONS, SEED_TOKENS, SPARSE, gradient_output
from graphlens.hooks import BACKWARD, HookRegistry
from graphlens.path_sweeping import PathMethods
from graphlens.requests import Request

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Seed:
    """What goes backward: its kind (surgery.differentiate) and the arrays it is fed as."""

    kind: str
    feeds: dict[str, Array]


class GradientMethods(PathMethods):
    """The part of HookedTransformer that differentiates."""

    _hooks: HookRegistry

    def gradients(self, input: Any, metric: Any, names: Any = None, **forward_options: Any) -> dict[str, Any]:
        """d(metric)/d(activation) for hook points: a mapping from each name to an array shaped like the activation.

        ``input`` and ``forward_options`` are forward's (whole prompts). ``metric``: one of graphlens.metrics with a mean over
        the batch, or an object with ``gradient(logits) -> d/d(logits)`` [b, p, V], for a metric of one's own.
        ``names`` as in run_with_cache; None is every hook point of floats. Gradients are total, through everything that
        depends on the activation, and those of runs with the active interventions and hooks, backward hooks included.
        A metric whose derivative depends on the logits takes a forward first, in which forward hooks are called too.
        Raises UnknownHookPoint, and InputError for a metric without a derivative and for hook points of integers.
        """
        request = self._whole_prompts(input, forward_options)
        asked = self._select(names, request)  # type: ignore[attr-defined]
        entries = self._engine.hooks(request.plan)
        if names is None or callable(names):
            asked = [name for name in asked if entries[name].dtype.startswith("float")]
        _, found = self._execute_gradients(request, (), asked, self._seed(request, metric), output=False)
        return {name: self._to_user(found[gradient_output(name)]) for name in asked}

    def _seed(self, request: Request, metric: Any) -> Seed:
        """The gradient of a metric with respect to the logits."""
        batch, length = request.shape
        dtype = np.dtype(self._engine.manifest.config.dtype)
        width = self._engine.manifest.config.d_vocab
        if not isinstance(metric, Metric):
            if not hasattr(metric, "gradient"):
                raise InputError(
                    f"{getattr(metric, '__name__', type(metric).__name__)!r} has no derivative: take one of graphlens.metrics, "
                    "an object with gradient(logits), or on the torch face metric(model(tokens)).backward()."
                )
            logits, _ = self._execute(request, (), True)  # type: ignore[attr-defined]
            dense = np.asarray(metric.gradient(logits))
            if dense.shape != (batch, length, width) or not np.isfinite(dense).all():
                raise InputError(
                    f"gradient(logits) gave {list(dense.shape)}, which must be the logits' {[batch, length, width]} and finite."
                )
            return Seed(DENSE, {SEED: dense.astype(dtype)})
        metric = metric.bound(self.to_single_token if self.tokenizer is not None else None)
        metric.check(width)
        needs = metric.needs(batch, length)
        positions = np.arange(length) if needs.positions is None else needs.positions
        positions = np.broadcast_to(positions, (batch, positions.shape[-1]))
        if metric.linear:  # any logits will do
            columns = width if needs.tokens is None else needs.tokens.shape[-1]
            scores = np.zeros((batch, positions.shape[-1], columns))
        else:
            logits, _ = self._execute(request, (), True)  # type: ignore[attr-defined]
            scores = needs.gather(logits)
        slopes = metric.slopes(scores).astype(dtype)
        if needs.tokens is not None:
            tokens = np.broadcast_to(needs.tokens[:, None], slopes.shape)
            return Seed(SPARSE, {SEED: slopes, SEED_POSITIONS: np.array(positions), SEED_TOKENS: np.array(tokens)})
        dense = np.zeros((batch, length, width), dtype)
        np.add.at(dense, (np.arange(batch)[:, None], positions), slopes)
        return Seed(DENSE, {SEED: dense})

    def _execute_loss(
        self, request: Request, fetch: Sequence[str], wrt: Sequence[str]
    ) -> tuple[Array, dict[str, Array]]:
        """(logits, activations and the gradients of the mean next-token loss as ``<name>_grad``)."""
        if request.cache is not None or request.tokens is None:
            raise InputError("gradients are of whole prompts of tokens: without past_kv_cache and start_at_layer.")
        counted = np.ones((request.shape[0], request.shape[1] - 1), bool)
        if request.mask is not None:
            counted = (request.mask[:, :-1] != 0) & (request.mask[:, 1:] != 0)
        weights = np.zeros(request.shape, self._engine.manifest.config.dtype)
        weights[:, :-1] = counted / counted.sum()
        targets = np.roll(request.tokens, -1, axis=1)
        seed = Seed(LOSS, {SEED: weights, SEED_TOKENS: targets})
        entries = self._engine.hooks(request.plan)
        wrt = [name for name in wrt if entries[name].dtype.startswith("float")]
        logits, found = self._execute_gradients(request, fetch, wrt, seed, output=True)
        assert logits is not None
        return logits, found

    _backward_later = False  # whether results have ``backward()``; torch's do

    def _backward_now(self) -> bool:
        """Whether a forward with a scalar result has backward hooks to call."""
        return not self._backward_later and bool(self._hooks.standing(dir=BACKWARD))

    def _output_to_user(self, output: Array, request: Request) -> Any:
        return self._to_user(output)

    def _execute_gradients(
        self, request: Request, fetch: Sequence[str], wrt: Sequence[str], seed: Seed, output: bool
    ) -> tuple[Array | None, dict[str, Array]]:
        """Runs forward and backward with the active edits and hooks: (logits, activations and ``<name>_grad``).

        Gradients of ``wrt`` are handed back; those of backward hooks are computed for them.
        """
        passed: Collection[str] = set(self._engine.names(request.plan))
        backward = self._hooks.backward_callbacks(self._to_user, self._from_user)
        for name in backward:
            if name not in passed:
                raise InputError(f"the backward hook at {name!r} would never fire: this run does not pass it.")
        callbacks = {
            **self._hooks.callbacks(self._to_user, self._from_user, passed),
            **{gradient_output(name): callback for name, callback in backward.items()},
        }
        chosen = {*wrt, *backward}
        order = [name for name in self._engine.names(request.plan) if name in chosen]
        batch, length = request.shape
        plan, edits = self._edits(request.plan, Window(batch, 0, length, length, length))
        plan = replace(plan, gradients=tuple(order), seed=seed.kind)
        wanted = [*fetch, *(gradient_output(name) for name in reversed(order) if name in set(wrt))]
        results = self._engine.run({**request.feeds, **seed.feeds}, wanted, callbacks, output, plan, edits)
        return results.output, results.values
