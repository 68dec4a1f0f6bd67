"""Sweeps over an SAE's features: only what comes after the SAE is computed again, for many changed features side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.sites import Site, Sites
from graphlens.analysis.sources import Source
from graphlens.engine.block_layout import BlockLayout
from graphlens.engine.block_pieces import BlockPieces
from graphlens.errors import InputError, checked_number
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.proof import prove_from, why_not_added
from graphlens.experiments.readout import Readout
from graphlens.experiments.recompute import Recomputation
from graphlens.experiments.sae_in_run import InRun, in_run
from graphlens.experiments.stages import STAGES, Variant, needed
from graphlens.experiments.sweep_metrics import Measure
from graphlens.file.names import split_name

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.request import Request
    from graphlens.model.runner import Runner
    from graphlens.model.text import Input

Done = tuple[list[int], list[Array]]


def feature_sites(
    model: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    sae: Sae | str,
    *,
    by_position: bool = True,
    least: float = 0.0,
    most: int | None = None,
) -> Sites:
    """The features that are active in a run, as sites for ``sweep`` and ``attribution_patch``.

    Args:
        model: The model.
        input: The prompts, as the sweep will be given them.
        sae: The SAE; or the hook point that one reads which is attached already.
        by_position: True for a site for each position where a feature is active; False for one for each feature, at all
            positions.
        least: What an activation must exceed.
        most: How many sites: those of the largest activations; None for all.

    Returns:
        Sites along one axis "feature", labelled "17" or "17 at 3", by position and then by number.

    Raises:
        UnknownHookPoint: The model lacks a hook point of the SAE's.
        InputError: No feature is so active, and for what does not fit the model.
    """
    with in_run(model, sae) as (one,):
        request = model.runner.whole_prompts(input)
        acts = model.runner.run(request, [one.features], output=False).values[one.features]
    if request.mask is not None:
        acts = np.where(np.asarray(request.mask, bool)[..., None], acts, 0)
    peaks = acts.max(0) if by_position else acts.max((0, 1))[None]  # [p, d_sae]
    found = np.argwhere(peaks > least)
    if not len(found):
        raise InputError(f"no feature at {one.spliced.hook!r} is above {least} in these prompts.")
    if most is not None:
        largest = np.argsort(-peaks[tuple(found.T)], kind="stable")[: checked_number(most, "most", least=1)]
        found = found[np.sort(largest)]
    places = [(int(p) if by_position else None, int(f)) for p, f in found]
    labels = tuple(f"{one.numbers[f]}" if p is None else f"{one.numbers[f]} at {p}" for p, f in places)
    return Sites(tuple(Site(one.features, position=p, dims=f) for p, f in places), ("feature",), {"feature": labels})


def sae_of(runner: Runner[ArrayT], sites: Sequence[Site]) -> InRun | None:
    """The SAE whose features all sites are; None where some are not, or where sweeps over features are not quick.

    Args:
        runner: Runs the model.
        sites: What is patched, by the hook points' own names.
    """
    active, config = runner.active(), runner.config
    saes = runner.flags.saes.now
    if len(saes) != 1 or saes[0].beside or not active.plain or runner.engine.manifest.adopted is not None:
        return None
    one = InRun(saes[0])
    if not config.is_causal or split_name(one.spliced.writes)[1] not in STAGES:
        return None
    return one if all(site.hook == one.features for site in sites) else None


@dataclass(frozen=True)
class FeatureSweep:
    """A sweep over the features of one SAE.

    A changed feature changes what the SAE writes by the feature's direction alone. So the model's pieces carry on with that, and
    neither the SAE nor what is before it runs again.

    Attributes:
        run: The corrupted run, with the SAE's output as the activation of the hook point where it stands.
        one: The SAE.
        max_tokens: How many tokens are computed at once.
        pieces: The model in pieces.
        why: Why this must not be; "" if it may.
        by_columns: Whether single logits may be computed without the others.
    """

    run: CorruptedRun
    one: InRun
    max_tokens: int
    pieces: BlockPieces
    why: str
    by_columns: bool

    @classmethod
    def of(
        cls,
        runner: Runner[ArrayT],
        request: Request,
        sites: Sequence[Site],
        source: Source,
        metrics: Sequence[Measure],
        one: InRun,
        max_tokens: int,
    ) -> Self:
        """Runs the corrupted prompts once, and tries whether the rest of the model can be run in pieces.

        Args:
            runner: Runs the model.
            request: The run.
            sites: What is patched.
            source: Where patched values come from.
            metrics: What is measured.
            one: The SAE.
            max_tokens: How many tokens are computed at once.

        Raises:
            InputError: For what does not fit the model, the prompts or each other.
        """
        layout, host = BlockLayout.of(runner.engine), one.spliced.writes
        keep = needed([host], layout)
        lacking = set(keep) - set(runner.engine.hook_names)
        keep = [name for name in keep if name not in lacking]
        run = CorruptedRun.of(runner, request, sites, source, metrics, [*keep, one.output, one.input])
        run = replace(run, activations={**run.activations, host: run.activations[one.output]})
        pieces = BlockPieces(runner.engine, max_tokens)
        if lacking:
            return cls(run, one, max_tokens, pieces, f"this model has no hook point {sorted(lacking)[0]!r}", False)
        why = why_not_added(run, host, layout)
        if why:
            return cls(run, one, max_tokens, pieces, why, False)
        proof = prove_from(run, pieces, max_tokens, host)
        return cls(run, one, max_tokens, pieces, proof.why or "", proof.unembedding == "W_U")

    def steps(self) -> Iterator[Done]:
        """The values of each metric at the sites: (their indices, for each metric [site] or [site, b])."""
        run, idle, variants = self.run, [], []
        carrier = Recomputation(
            self.pieces, run.kept(), run.measuring.read(), self.max_tokens, run.runner.config.window_size
        )
        for index in range(len(run.sites)):
            variant = self._variant(index)
            if variant is None or variant.start >= carrier.end:
                idle.append(index)  # nothing changes, or nothing that is read
            else:
                variants.append(variant)
        if idle:
            yield idle, [np.broadcast_to(base, (len(idle), *base.shape)) for base in run.measuring.corrupted]
        readout = Readout(run, self.pieces, self.by_columns)
        for batch in carrier.groups(variants):
            for indices, start, residual in carrier.last_residuals(batch):
                yield indices, readout.values(indices, start, residual)

    def _variant(self, index: int) -> Variant | None:
        """The patched run of a site; None if the patch puts what is there already."""
        change, features = self._changes(self.run.sites[index])
        places = np.flatnonzero(change.any((0, 2)))
        if not len(places):
            return None
        host = self.one.spliced.writes
        chosen = change.any(-1).reshape(*change.shape[:2], *(1,) * (self.run.activations[host].ndim - 2))
        start, stop = int(places[0]), int(places[-1]) + 1
        return Variant(index, host, chosen, start, stop, lambda: self._written(change, features))

    def _changes(self, site: Site) -> tuple[Array, Array]:
        """How much each feature of a site changes: float32 [b, p, n], and the n features' numbers."""
        acts, patched = self.run.activations[site.hook], self.run.patched[site.hook]
        position, feature = site.position, site.dims
        if (
            isinstance(position, int | None) and isinstance(feature, int) and site.head is None
        ):  # most are: no mask is needed
            length = acts.shape[1]
            features = np.asarray([feature])
            change = np.broadcast_to(patched, acts.shape)[..., features] - acts[..., features]
            if position is not None:
                at = position if position >= 0 else position + length
                change = np.where((np.arange(length) == at)[:, None], change, 0)
        else:
            mask = self.run.chosen(site)
            wide = np.where(False if mask is None else mask, patched - acts, 0)
            features = np.flatnonzero(wide.any((0, 1)))
            change = wide[..., features]
        if self.one.spliced.excluded:
            left_out = np.isin(self.run.request.need_tokens(), self.one.spliced.excluded)
            change = np.where(left_out[..., None], 0, change)
        return change.astype(np.float32, copy=False), features

    def _written(self, change: Array, features: Array) -> Array:
        """What the SAE writes with some of its features changed, shaped like the hook point where it stands."""
        run, sae = self.run, self.one.sae
        scale = sae.output_scale(run.activations[self.one.input])
        more = change @ sae.directions[features]
        base: Array = run.activations[self.one.spliced.writes]
        more = more if scale is None else more * scale
        found: Array = base + more.reshape(base.shape).astype(base.dtype)
        return found
