"""Gradients of a metric with respect to activations: the seed a metric gives, and the run that carries it back."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array
from graphlens.analysis.metrics import Metric
from graphlens.edits.gate import Window
from graphlens.errors import InputError
from graphlens.experiments.paths import PathMethods
from graphlens.file.io_names import DENSE, LOSS, SEED, SEED_POSITIONS, SEED_TOKENS, SPARSE, gradient_output
from graphlens.model.hooks import BACKWARD, HookRegistry
from graphlens.model.request import Request
from graphlens.runtime.callbacks import Callback

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
        depends on the activation, and those of runs with the active interventions and backward hooks. A forward hook in
        Python has no derivative: gradients pass it as if it had added a constant, with a UserWarning if it changed anything.
        A metric whose derivative depends on the logits takes a forward first, in which forward hooks are called too.
        Raises UnknownHookPoint, and InputError for a metric without a derivative and for hook points of integers.
        """
        request = self._whole_prompts(input, forward_options)
        asked = self._select(names, request)  # type: ignore[attr-defined]
        if names is None or callable(names):
            asked = [name for name in asked if name in self._differentiable(request)]
        if not asked:
            raise InputError("names picks no hook point of floats: there is nothing to differentiate.")
        _, found = self._execute_gradients(request, (), asked, self._seed(request, metric), output=False)
        values = {name: found[gradient_output(name)] for name in asked}
        seen: set[int] = set()
        for name, value in values.items():  # hook points that share a value get arrays of their own
            values[name] = value.copy() if id(value) in seen else value
            seen.add(id(value))
        return {name: self._to_user(value) for name, value in values.items()}

    def _differentiable(self, request: Request) -> set[str]:
        """The hook points that have one gradient in such a run: of floats, and fired once."""
        entries = self._engine.hooks(request.plan)
        several = {name.partition("@")[0] for name in entries if "@" in name}
        return {name for name in entries if entries[name].dtype.startswith("float")} - several

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
            dense = as_array(metric.gradient(self._to_user(logits)))
            if dense.shape != (batch, length, width):
                raise InputError(
                    f"gradient(logits) gave {list(dense.shape)}; it must have the logits' shape, {[batch, length, width]}."
                )
            if not np.isfinite(dense).all():
                raise InputError("gradient(logits) gave NaN or infinities.")
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
            raise InputError(
                "gradients are of whole prompts: without past_kv_cache, and with start_at_layer pass tokens= for the loss."
            )
        counted = np.ones((request.shape[0], request.shape[1] - 1), bool)
        if request.mask is not None:
            counted = (request.mask[:, :-1] != 0) & (request.mask[:, 1:] != 0)
        weights = np.zeros(request.shape, self._engine.manifest.config.dtype)
        weights[:, :-1] = counted / counted.sum()
        targets = np.roll(request.tokens, -1, axis=1)
        seed = Seed(LOSS, {SEED: weights, SEED_TOKENS: targets})
        wrt = [name for name in wrt if name in self._differentiable(request)]
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
        possible = self._differentiable(request)
        for name in wrt:
            if name not in possible and self._engine.hooks(request.plan)[name].dtype.startswith("float"):
                raise InputError(
                    f"{name!r} fires for queries, keys and values apart while inputs are split, so it has no one gradient: "
                    "switch use_split_qkv_input and use_attn_in off, or take hook_q_input, hook_k_input and hook_v_input."
                )
        backward = self._hooks.backward_callbacks(self._to_user, self._from_user, possible)
        changing: list[str] = []
        forward = self._hooks.callbacks(self._to_user, self._from_user, passed)
        callbacks = {
            **{name: _noting(name, callback, changing) for name, callback in forward.items()},
            **{gradient_output(name): callback for name, callback in backward.items()},
        }
        chosen = {*wrt, *backward}
        order = [name for name in self._engine.names(request.plan) if name in chosen]
        batch, length = request.shape
        plan, edits = self._edits(request.plan, Window(batch, 0, length, length, length))
        if not order:  # nothing asked for, and no backward hook
            results = self._engine.run(request.feeds, fetch, callbacks, output, plan, edits)
            return results.output, results.values
        plan = replace(plan, gradients=tuple(order), seed=seed.kind)
        wanted = [*fetch, *(gradient_output(name) for name in reversed(order) if name in set(wrt))]
        results = self._engine.run({**request.feeds, **seed.feeds}, wanted, callbacks, output, plan, edits)
        if changing:
            warnings.warn(
                f"the forward hook at {changing[0]!r} changed its activation: a Python function has no derivative, so gradients "
                "pass it as if it had added a constant. Use interventions (model.intervene) for edits that count.",
                stacklevel=3,
            )
        return results.output, results.values


def _noting(name: str, callback: Callback, changing: list[str]) -> Callback:
    """A callback that notes whether it changes what it is given."""

    def run(activation: Array) -> Array:
        before = activation.copy()
        after = callback(activation)
        if not np.array_equal(before, after, equal_nan=True):
            changing.append(name)
        return after

    return run
