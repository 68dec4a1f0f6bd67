"""Attribution: the runs that first-order estimates of patches are made of, and the sums that they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array
from graphlens.analysis.metrics import LogitDiff, Metric
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site, Sites, listed
from graphlens.analysis.sources import Source, as_source
from graphlens.edits import gate
from graphlens.edits.gate import Window
from graphlens.errors import InputError
from graphlens.experiments.sweep import MAX_BATCH_TOKENS, Measure, check_processing, collect
from graphlens.experiments.sweep_run import Done, Sweeper, SweepRun
from graphlens.file.io_names import gradient_output
from graphlens.file.names import axis_sizes
from graphlens.model.backward import GradientMethods
from graphlens.model.hooks import BACKWARD

Array = npt.NDArray[Any]


class AttributionMethods(GradientMethods):
    """The part of HookedTransformer that estimates patches for graphlens.attribution."""

    def _attributions(
        self, corrupted: Any, sites: Sequence[Site], source: Source, metrics: Sequence[Any], steps: int, **options: Any
    ) -> SweepRun:
        """An estimate of a sweep: each site's value is the corrupted baseline plus difference times gradient."""
        request = self._whole_prompts(corrupted, options)
        self._refuse_backward_hooks()
        found = self._resolved_sites(sites)
        entries = self._engine.hooks(request.plan)
        for site in found:
            if not entries[site.hook].dtype.startswith("float"):
                raise InputError(
                    f"{site.hook!r} holds {entries[site.hook].dtype}: there is no gradient with respect to it."
                )
        return _Attributer(self, request, found, source, metrics, MAX_BATCH_TOKENS, False).estimate(steps)

    def _refuse_backward_hooks(self) -> None:
        if self._hooks.standing(dir=BACKWARD):
            raise InputError("attribution takes gradients as they are: leave the block with bwd_hooks first.")


class _Attributer(Sweeper):
    """One estimate of a sweep."""

    def estimate(self, steps: int) -> SweepRun:
        """Ready to iterate over. ``steps`` 0 takes the gradient at the corrupted run alone, else the mean of as many
        between it and the patched one, at midpoints."""
        self.notes.clear()
        return SweepRun(self._metrics, self.corrupted, self.clean, [], len(self._sites), self._estimates(steps))

    def _estimates(self, steps: int) -> Iterator[Done]:
        by_hook: dict[str, list[int]] = {}
        for index, site in enumerate(self._sites):
            by_hook.setdefault(site.hook, []).append(index)
        hooks = list(by_hook)
        at_once = [self._gradients(hooks, metric) for metric in self._metrics] if not steps else None
        for hook in hooks:
            rows = []
            for place, metric in enumerate(self._metrics):
                gradient = at_once[place][hook] if at_once is not None else self._averaged(hook, metric, steps)
                rows.append(
                    self._sums(hook, by_hook[hook], self._apart(hook).astype(np.float64) * gradient)
                    + self.corrupted[place]
                )
            yield by_hook[hook], rows

    def _gradients(self, hooks: Sequence[str], metric: Any) -> dict[str, Array]:
        if isinstance(metric, Metric) and metric.reduction != "mean":
            raise InputError(f"{metric!r} is a number for each prompt; a gradient is of one: reduction='mean'.")
        seed = self._model._seed(self._request, metric)
        _, found = self._model._execute_gradients(self._request, (), hooks, seed, output=False)
        return {hook: found[gradient_output(hook)] for hook in hooks}

    def _averaged(self, hook: str, metric: Any, steps: int) -> Array:
        """The mean of the gradients on the straight way from the corrupted activation to the patched one."""
        base, apart = self._base[hook], self._apart(hook)
        total: Array | None = None
        for step in range(steps):
            value = np.where(self._changed(hook), base + apart * ((step + 0.5) / steps), base).astype(base.dtype)
            with self._model.intervene(Site(hook).patch(value)):
                gradient = self._gradients([hook], metric)[hook].astype(np.float64)
            total = gradient if total is None else total + gradient
        assert total is not None
        return total / steps

    def _apart(self, hook: str) -> Array:
        """What the patch adds to the activation; 0 at masked scores, which are -inf in both runs."""
        with np.errstate(invalid="ignore"):
            return np.where(self._changed(hook), self._patched[hook] - self._base[hook], 0)

    def _sums(self, hook: str, indices: Sequence[int], product: Array) -> Array:
        """The sum of a product over each site."""
        entry = self._engine.hooks(self._request.plan)[hook]
        window = Window(self._batch, 0, self._length, self._length, self._length)
        sizes = axis_sizes(self._config)
        folded: dict[tuple[int, ...], Array] = {}
        found = []
        fields = gate.selected_by(entry.axes)
        for index in indices:
            site = self._sites[index]
            at = _plain_index(site, [fields.get(axis) for axis in entry.axes], product.shape)
            if at is not None:  # most sites are one position or one head: no mask is needed
                rest = tuple(axis for axis, place in enumerate(at) if place == slice(None))
                if rest not in folded:
                    folded[rest] = product.sum(rest, keepdims=True, dtype=np.float64)
                found.append(float(folded[rest][tuple(0 if axis in rest else at[axis] for axis in range(len(at)))]))
                continue
            chosen = gate.compose([site.patch()], entry, sizes, window).get("where")
            if chosen is None:
                found.append(0.0)
                continue
            # Along axes of which a site takes all, the product is summed once for all sites.
            rest = tuple(axis for axis, size in enumerate(chosen.shape) if size == 1)
            if rest not in folded:
                folded[rest] = product.sum(rest, keepdims=True, dtype=np.float64)
            found.append(float(folded[rest][np.broadcast_to(chosen, folded[rest].shape)].sum()))
        return np.asarray(found)


def _plain_index(site: Site, fields: Sequence[str | None], shape: Sequence[int]) -> list[Any] | None:
    """The site as an index, one int or ``slice(None)`` for each axis; None where it takes more than that, or is not there."""
    selections = {"positions": site.position, "heads": site.head, "dims": site.dims}
    found: list[Any] = []
    for field, size in zip(fields, shape, strict=True):
        selection = selections.get(field or "")
        if selection is None:
            found.append(slice(None))
        elif isinstance(selection, int) and -size <= selection < size:
            found.append(selection)
        else:
            return None
    return found


def attribution_patch(
    model: Any,
    corrupted_tokens: Any,
    sites: Iterable[Site] | Site | Sites,
    source: Any,
    metric: Measure | Iterable[Measure] | Mapping[str, Measure],
    *,
    steps: int = 0,
    verbose: bool = True,
    **forward_options: Any,
) -> SweepResult:
    """Estimates what ``sweep`` would find, from one forward and backward: the corrupted baseline plus
    (source - corrupted) . gradient, summed over each site (attribution patching: Nanda 2023, Syed et al. 2023).

    The arguments are those of ``sweep``; a metric needs a derivative (see ``model.gradients``) and the mean over the batch.
    ``steps``: the mean of that many gradients on the straight way to the patched activation of the whole hook point, at
    midpoints (integrated gradients: Sundararajan et al. 2017), a forward and backward each for every hook point.

    This is an approximation. It is poor where the model bends: at saturated attention (whose gradient vanishes, so that
    q and k seem not to matter), at large patches such as the residual stream's first layers, and at MLP 0, which acts as
    a second embedding. ``compare_with_sweep`` measures it.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        raise InputError(f"steps={steps!r}: it is 0, or how many gradients to average.")
    places = listed(sites)
    check_processing(model, source)
    given = as_source(source)

    def start(measures: list[Measure], left: list[int]) -> Any:
        return model._attributions(
            corrupted_tokens, [places.sites[i] for i in left], given, measures, steps, **forward_options
        )

    return collect(model, places, metric, start, verbose)


def direct_logit_attribution(model: Any, input: Any, metric: LogitDiff, **forward_options: Any) -> SweepResult:
    """What each component writes to a logit difference directly: heads, MLPs, embeddings and biases, [component].

    Each output, centred and divided by the final norm's scale of this run, times the norm's weight and the difference of
    the two tokens' columns of W_U, averaged over the prompts. The values sum to the metric (to which "bias", all biases
    together, belongs). Direct effects alone: what later components make of an output is not in it.
    ``input`` and ``forward_options`` are forward's. Elhage et al. 2021; TransformerLens: ``logit_attrs``.
    Raises InputError for another metric.
    """
    if not isinstance(metric, LogitDiff) or metric.reduction != "mean":
        raise InputError(f"direct logit attribution is of a LogitDiff with a mean, not of {type(metric).__name__}.")
    logits, cache = model.run_with_cache(input, **forward_options)
    plain = as_array(logits)
    metric = metric.bound(model.to_single_token if model.tokenizer is not None else None)
    metric.check(plain.shape[-1])
    needs = metric.needs(*plain.shape[:2])
    assert needs.tokens is not None
    assert needs.positions is not None
    batch = plain.shape[0]
    positions = np.broadcast_to(needs.positions, (batch, 1))[:, 0]
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    components = np.asarray(stack)[:, np.arange(batch), positions].astype(np.float64)  # [n, b, D]
    scale = np.asarray(cache["ln_final.hook_scale"])[np.arange(batch), positions].astype(np.float64)
    w_u = np.asarray(model.W_U).T[needs.tokens].astype(np.float64)  # [b, 2, D]
    direction = w_u[:, 0] - w_u[:, 1]
    weight, bias = model.weights.get("ln_final.w"), model.weights.get("ln_final.b")
    scaled = direction if weight is None else direction * np.asarray(weight, np.float64)
    if model.cfg.normalization_type.startswith("LN"):
        components = components - components.mean(-1, keepdims=True)
    values = (components / scale * scaled).sum(-1).mean(-1)
    b_u = np.asarray(model.b_U, np.float64)[needs.tokens]
    constant = b_u[:, 0] - b_u[:, 1] + (0 if bias is None else (direction * np.asarray(bias, np.float64)).sum(-1))
    names = list(labels)
    values[names.index("bias")] += constant.mean()
    total = float(metric(plain))
    if abs(values.sum() - total) > 1e-2 * max(float(np.abs(values).max()), abs(total)):
        raise InputError(
            f"the components sum to {values.sum():.4g} and the metric is {total:.4g}: interventions, hooks or edits in the file "
            "change the residual stream or the logits on the way. Attribute the run without them."
        )
    metadata = {"model": model.cfg.model_name, "metrics": [metric.name], "total": total}
    return SweepResult(values, ("component",), {"component": names}, {"corrupted": 0.0}, metadata)
