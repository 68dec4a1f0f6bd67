"""Running a sweep: which of its sites can be recomputed, and the values of its metrics as they are done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.sites import Site
from graphlens.analysis.sources import Source
from graphlens.engine.block_layout import BlockLayout
from graphlens.engine.block_pieces import WHOLE_BLOCKS, BlockPieces
from graphlens.errors import checked_number
from graphlens.experiments.corrupted_run import CorruptedRun, resolved_sites
from graphlens.experiments.feature_sweep import FeatureSweep, sae_of
from graphlens.experiments.later_runs import LaterRuns, needed_later
from graphlens.experiments.proof import needed_for_proof, prove, why_not_added
from graphlens.experiments.readout import Readout
from graphlens.experiments.recompute import MAX_BATCH_TOKENS, Recomputation
from graphlens.experiments.stages import STAGES, Variant, needed
from graphlens.experiments.sweep_metrics import Measure
from graphlens.file.names import split_name

if TYPE_CHECKING:
    from graphlens.model.runner import Runner

Done = tuple[list[int], list[Array]]  # indices of sites, and for each metric their values [site] or [site, b]


@dataclass
class SweepRun:
    """A sweep under way. Iterating computes it: (site indices, their values for each metric) as they are done.

    Attributes:
        metrics: The metrics, with token ids in place of text.
        corrupted: Their values of the corrupted run.
        clean: Their values of the clean run; None where the source does not give them.
        notes: Why sites took the general path, one forward per patch.
        quick: The number of sites that did not.
        steps: Computes the sweep as it is iterated over.
        straight_through: What the gradients of an estimate passed as if it did not round; known once it is under way.
    """

    metrics: list[Measure]
    corrupted: list[Array]
    clean: list[Array | None]
    notes: list[str]
    quick: int
    steps: Iterator[Done]
    straight_through: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Done]:
        return self.steps

    @classmethod
    def of(cls, run: CorruptedRun, notes: list[str], quick: int, steps: Iterator[Done]) -> SweepRun:
        """A sweep under way over a corrupted run.

        Args:
            run: The corrupted run.
            notes: Why sites take the general path.
            quick: The number of sites that do not.
            steps: Computes the sweep as it is iterated over.
        """
        measuring = run.measuring
        return cls(measuring.metrics, measuring.corrupted, measuring.clean, notes, quick, steps)


def start_sweep(
    runner: Runner[ArrayT],
    corrupted: Any,
    sites: Sequence[Site],
    source: Source,
    metrics: Sequence[Measure],
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    recompute: bool = True,
    **forward_options: Any,
) -> SweepRun:
    """Checks everything, runs the corrupted prompts once, and hands back the sweep to iterate over.

    Args:
        runner: Runs the model.
        corrupted: The corrupted prompts.
        sites: What is patched, one at a time.
        source: Where patched values come from.
        metrics: What is measured.
        max_batch_tokens: How many tokens are computed at once.
        recompute: True computes only what a patch can change, where that is possible.
        **forward_options: Those of ``forward``.

    Returns:
        The sweep under way.

    Raises:
        UnknownHookPoint: For a hook point that is not there.
        InputError: For what does not fit the model, the prompts or each other.
    """
    max_batch_tokens = checked_number(max_batch_tokens, "max_batch_tokens", least=1)
    request = runner.whole_prompts(corrupted, **forward_options)
    found = resolved_sites(runner, sites)
    quick, notes = _quick_hooks(runner, found, recompute)
    active = runner.active()
    if recompute and (one := sae_of(runner, found)) is not None:
        features = FeatureSweep.of(runner, request, found, source, metrics, one, max_batch_tokens)
        if not features.why:
            return SweepRun.of(features.run, [], len(found), features.steps())
        notes = [features.why]
    whole_blocks = runner.engine.manifest.adopted is not None or bool(active.saes)
    later = recompute and whole_blocks and active.plain
    keep = [*kept_for(runner, quick), *(needed_later(runner, found) if later else [])]
    run = CorruptedRun.of(runner, request, found, source, metrics, keep)
    return Sweeper(
        run, quick, notes, max_batch_tokens, LaterRuns(run, max_batch_tokens, notes) if later else None
    ).start()


def kept_for(runner: Runner[ArrayT], quick: Sequence[str]) -> list[str]:
    """The activations that a corrupted run must keep for hook points whose patches are recomputed.

    Args:
        runner: Runs the model.
        quick: These hook points, by their own names.
    """
    layout = BlockLayout.of(runner.engine)
    return [*needed(quick, layout), *needed_for_proof(runner.engine.proof, layout)] if quick else []


def _quick_hooks(runner: Runner[ArrayT], sites: Sequence[Site], recompute: bool) -> tuple[list[str], list[str]]:
    """(the hook points whose patches can be recomputed, why others cannot)."""
    hooks = list(dict.fromkeys(site.hook for site in sites))
    if not recompute:
        return [], ["recompute=False"]
    if not runner.active().plain:
        return [], ["hooks or interventions are active, which only whole runs honour"]
    if runner.active().saes:
        return [], ["SAEs are attached, so each patch takes a run from its block on"]
    if runner.engine.manifest.adopted is not None:
        return [], [f"this model was adopted: {WHOLE_BLOCKS}, so each patch takes a run from its block on"]
    if not runner.config.is_causal:
        return [], ["tokens of this model attend to later ones too, so that a patch changes every position"]
    if runner.config.positional_embedding_type == "shortformer":
        return [], ["position embeddings are added inside this model's attention"]
    if runner.config.normalises_residual:
        return [], [
            "this model normalises its residual stream after each sublayer, so that no patch is added to it as it is"
        ]
    others = sorted({split_name(hook)[1] for hook in hooks} - set(STAGES))
    notes = [f"no shortcut from {', '.join(others)}"] if others else []
    quick = [hook for hook in hooks if split_name(hook)[1] in STAGES]
    lacking = set(kept_for(runner, quick)) - set(runner.engine.hook_names)
    if lacking:
        return [], [*notes, f"this model has no hook point {sorted(lacking)[0]!r}, which would have to be kept"]
    return quick, notes


class Sweeper:
    """One sweep over the sites of a corrupted run.

    Args:
        run: The corrupted run.
        quick: The hook points whose patches can be recomputed.
        notes: Why others cannot.
        max_tokens: How many tokens are computed at once.
        later: Runs the patches that cannot be recomputed, where these need not be whole runs; None where they must.
    """

    def __init__(
        self,
        run: CorruptedRun,
        quick: Sequence[str],
        notes: list[str],
        max_tokens: int,
        later: LaterRuns | None = None,
    ) -> None:
        self._run, self._quick, self._notes, self._max_tokens = run, set(quick), notes, max_tokens
        self._later = later

    def start(self) -> SweepRun:
        """The sweep, ready to iterate over."""
        run = self._run
        self._leave_out(run)
        variants: list[Variant] = []
        idle: list[int] = []  # where the patch changes nothing
        general: list[int] = []
        for index, site in enumerate(run.sites):
            if site.hook not in self._quick:
                general.append(index)
                continue
            variant = run.variant(index)
            if variant is None:
                idle.append(index)
            else:
                variants.append(variant)
        steps: Iterator[Done] = iter(())
        if variants:
            pieces = BlockPieces(run.runner.engine, self._max_tokens)
            carrier = Recomputation(
                pieces, run.kept(), run.measuring.read(), self._max_tokens, run.runner.config.window_size
            )
            # What starts after the last position read changes nothing there.
            idle += [variant.index for variant in variants if variant.start >= carrier.end]
            variants = [variant for variant in variants if variant.start < carrier.end]
            proof = prove(run, pieces, self._max_tokens)
            if proof.why:
                self._notes.append(proof.why)
                general += [variant.index for variant in variants]
                variants = []
            steps = self._recomputed(carrier, Readout(run, pieces, proof.unembedding == "W_U"), variants)
        return SweepRun.of(run, self._notes, len(idle) + len(variants), self._steps(sorted(general), idle, steps))

    def _leave_out(self, run: CorruptedRun) -> None:
        """Takes the hook points out of the quick ones whose changes are not added to the residual stream as they are."""
        layout = BlockLayout.of(run.runner.engine)
        why = {hook: why_not_added(run, hook, layout) for hook in self._quick}
        self._quick = {hook for hook in self._quick if not why[hook]}
        self._notes += sorted({reason for reason in why.values() if reason})

    def _steps(self, general: list[int], idle: list[int], recomputed: Iterator[Done]) -> Iterator[Done]:
        if idle:
            yield idle, [np.broadcast_to(base, (len(idle), *base.shape)) for base in self._run.measuring.corrupted]
        yield from recomputed
        if self._later is not None:
            yield from self._later.steps(general)
            return
        for index in general:
            yield [index], [value[None] for value in self._whole_run(self._run.sites[index])]

    @staticmethod
    def _recomputed(carrier: Recomputation, readout: Readout, variants: list[Variant]) -> Iterator[Done]:
        for batch in carrier.groups(variants):
            for indices, start, residual in carrier.last_residuals(batch):
                yield indices, readout.values(indices, start, residual)

    def _whole_run(self, site: Site) -> list[Array]:
        """Each metric of one forward with the patch."""
        run = self._run
        with run.runner.editing(run.patch(site, run.patched[site.hook])):
            logits = run.runner.run(run.request).logits
        return [run.measuring.of(metric, logits) for metric in run.measuring.metrics]
