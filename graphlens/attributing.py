"""Attribution: the runs that first-order estimates of patches are made of, and the sums that they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens import gating, hook_points
from graphlens.analysis.metrics import Metric
from graphlens.analysis.sites import Site
from graphlens.analysis.sources import Source
from graphlens.analysis.sweeps import MAX_BATCH_TOKENS
from graphlens.errors import InputError
from graphlens.gating import Window
from graphlens.gradient_names import gradient_output
from graphlens.gradients import GradientMethods
from graphlens.hooks import BACKWARD
from graphlens.sweeping import Done, Sweeper, SweepRun

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
        sizes = hook_points.axis_sizes(self._config)
        folded: dict[tuple[int, ...], Array] = {}
        found = []
        fields = gating.selected_by(entry.axes)
        for index in indices:
            site = self._sites[index]
            at = _plain_index(site, [fields.get(axis) for axis in entry.axes], product.shape)
            if at is not None:  # most sites are one position or one head: no mask is needed
                rest = tuple(axis for axis, place in enumerate(at) if place == slice(None))
                if rest not in folded:
                    folded[rest] = product.sum(rest, keepdims=True, dtype=np.float64)
                found.append(float(folded[rest][tuple(0 if axis in rest else at[axis] for axis in range(len(at)))]))
                continue
            chosen = gating.compose([site.patch()], entry, sizes, window).get("where")
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
