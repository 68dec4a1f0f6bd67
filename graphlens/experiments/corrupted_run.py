"""The corrupted run, with which every patched run is compared: its activations, the patches' values, its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.metric import Metric
from graphlens.analysis.sites import Site
from graphlens.analysis.sources import Source, ensure_same_side
from graphlens.edits import gate
from graphlens.edits.kinds import Patch
from graphlens.edits.operand import part_of
from graphlens.edits.selection import POSITION_AXES
from graphlens.errors import InputError
from graphlens.experiments.stages import Kept, Variant, position_axis
from graphlens.experiments.sweep_metrics import Measure, Measuring
from graphlens.file.manifest import HookEntry
from graphlens.file.names import MASKED_BELOW, SCORES, axis_sizes, select, split_name

if TYPE_CHECKING:
    from graphlens.model.request import Request
    from graphlens.model.runner import Runner

_PROBES = 8  # tokens


@dataclass(frozen=True)
class CorruptedRun:
    """One run of the corrupted prompts, and what is to be patched into it.

    Attributes:
        runner: Runs the model.
        request: The run, over whole prompts.
        sites: What is patched, by the hook points' own names.
        activations: Of the run, by hook name.
        patched: What the patches put in place, by hook name; broadcasts to the activation.
        measuring: The metrics, with their baselines.
        logits: [b, p, V], kept where a metric is a function of whole logits.
        probed: int64 [n], some tokens over the whole vocabulary.
        probe: Their logits at the last position, [b, 1, n].
    """

    runner: Runner[Any]
    request: Request
    sites: Sequence[Site]
    activations: Mapping[str, Array]
    patched: Mapping[str, Array]
    measuring: Measuring
    logits: Array | None
    probed: Array
    probe: Array
    _differences: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        runner: Runner[Any],
        request: Request,
        sites: Sequence[Site],
        source: Source,
        metrics: Sequence[Measure],
        keep: Sequence[str] = (),
    ) -> Self:
        """Runs the corrupted prompts once.

        Args:
            runner: Runs the model.
            request: The run.
            sites: What is patched.
            source: Where patched values come from.
            metrics: What is measured.
            keep: The activations to keep besides those at the sites.

        Raises:
            UnknownHookPoint: Where the source has nothing for a hook point.
            InputError: For metrics and values that do not fit, and for a vision model.
        """
        if runner.config.is_vision:
            raise InputError(
                "sweeps, attribution and paths are of models of tokens: for images use run_with_interventions and gradients."
            )
        hooks = list(dict.fromkeys(site.hook for site in sites))
        ensure_same_side(source, request.mask)
        ran = runner.run(request, list(dict.fromkeys([*keep, *hooks])))
        patched = {
            hook: _unmasked(hook, _value(source, hook, ran.values[hook], request), ran.values[hook]) for hook in hooks
        }
        measuring = Measuring(runner, request, metrics, ran.logits, source)
        whole = None if all(isinstance(metric, Metric) for metric in measuring.metrics) else ran.logits
        probed = np.linspace(0, runner.config.d_vocab_out - 1, _PROBES, dtype=np.int64)
        probe = ran.logits[:, -1:, probed].copy()
        return cls(runner, request, sites, ran.values, patched, measuring, whole, probed, probe)

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return self.request.shape[0]

    @property
    def length(self) -> int:
        """The number of positions, padding included."""
        return self.request.shape[1]

    @property
    def tokens(self) -> Array:
        """bool [b, p], True at real tokens."""
        mask = self.request.mask
        return np.ones(self.request.shape, bool) if mask is None else mask.astype(bool)

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self.runner.config.n_layers

    def kept(self) -> Kept:
        """What recomputation needs of the run."""
        return Kept(self.activations, self.tokens, self.patched)

    def entry(self, hook: str) -> HookEntry:
        """Axes and dtype of a hook point.

        Args:
            hook: Its own name.
        """
        return self._entries[hook]

    @cached_property
    def _entries(self) -> Mapping[str, HookEntry]:
        return self.runner.engine.hooks(self.request.plan)

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return axis_sizes(self.runner.config)

    def changed(self, hook: str) -> Array:
        """Which elements a patch of the whole activation would change.

        Args:
            hook: The hook point's own name.

        Returns:
            bool, shaped like the activation.
        """
        if hook not in self._differences:
            self._differences[hook] = np.asarray(self.patched[hook] != self.activations[hook])
        return self._differences[hook]

    def chosen(self, site: Site) -> Array | None:
        """The elements of a site.

        Args:
            site: One of the run's.

        Returns:
            bool, broadcasting to the activation; None if this run has none of them.
        """
        return gate.compose([site.patch()], self.entry(site.hook), self._sizes, self.request.window).get("where")

    def patch(self, site: Site, activation: Array) -> Patch:
        """The intervention that puts a site's part of an activation in its place.

        Args:
            site: One of the run's hook points and a part of it.
            activation: The whole activation, which broadcasts to that of the run.
        """
        whole = np.broadcast_to(activation, self.activations[site.hook].shape)
        return site.patch(part_of(site.patch(), whole, self.entry(site.hook).axes))

    def variant(self, index: int) -> Variant | None:
        """The patched run of a site, from the first position that it changes to the last.

        Args:
            index: Which of ``sites``.

        Returns:
            None if the patch puts what is there already.
        """
        site = self.sites[index]
        chosen = self.chosen(site)
        if chosen is None:
            return None
        axis = position_axis(site.hook)
        changed = chosen & self.changed(site.hook)
        positions = changed.any(tuple(i for i in range(changed.ndim) if i != axis))
        if not positions.any():
            return None
        places = np.flatnonzero(positions)
        return Variant(index, site.hook, chosen, int(places[0]), int(places[-1]) + 1)


def resolved_sites(runner: Runner[ArrayT], sites: Sequence[Site]) -> list[Site]:
    """The sites under their hook points' own names.

    Args:
        runner: Runs the model.
        sites: Where patches go, also under short names and aliases.

    Raises:
        UnknownHookPoint: For a hook point that is not there.
        InputError: For a position, head or dimension that is not there.
    """
    names, entries = runner.names(), runner.engine.hooks(runner.plan())
    sizes = axis_sizes(runner.config)
    known: dict[str, str] = {}
    found = []
    for site in sites:
        if site.hook not in known:
            (known[site.hook],) = select(names, site.hook, runner.config.n_layers)
        name = known[site.hook]
        site = site if name == site.hook else Site(name, None, site.position, site.head, site.dims)
        entry = entries[name]
        if not _plainly_there(site, entry.axes, entry.sizes(sizes)):
            value = 0 if entry.dtype.startswith("int") else 0.0  # any number: the source's are checked later
            gate.check([site.patch(value)], [entry], sizes)
        found.append(site)
    return found


def _plainly_there(site: Site, axes: Sequence[str], sizes: Mapping[str, int]) -> bool:
    """True for a site of at most one position, head and dimension, the last two within range: it needs no full check."""
    # Sweeps have thousands of sites, most of them like that.
    heads = next((sizes[axis] for axis in axes if axis.endswith("head_index")), 0)
    last = sizes.get(axes[-1], 0)
    return (
        (site.head is None or (isinstance(site.head, int) and 0 <= site.head < heads))
        and (site.position is None or (isinstance(site.position, int) and any(axis in POSITION_AXES for axis in axes)))
        and (site.dims is None or (isinstance(site.dims, int) and 0 <= site.dims < last))
    )


def _value(source: Source, hook: str, activation: Array, request: Request) -> Array:
    """What a source puts in an activation's place. Raises InputError for what does not broadcast to it."""
    value = np.asarray(source.value(hook, activation, request.mask))
    try:
        fits = np.broadcast_shapes(value.shape, activation.shape) == activation.shape
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"{type(source).__name__}.value gave {list(value.shape)} for {hook!r}: it must broadcast to the activation, "
            f"{list(activation.shape)}."
        )
    return value


def _unmasked(hook: str, value: Array, base: Array) -> Array:
    """The patched activation. Masked entries of attention scores (-inf) stay as they are, as they do at gates."""
    return np.where(base < MASKED_BELOW, base, value) if split_name(hook)[1] == SCORES else value
