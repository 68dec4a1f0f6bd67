"""What each site of a drift costs: the reference's activation put in there, and how much of the logits' error goes away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.drift_figures import counted
from graphlens.analysis.drift_result import Drifted, DriftResult
from graphlens.errors import GraphlensError, InputError
from graphlens.experiments.drift_comparison import Kept, logits_apart, put_in
from graphlens.experiments.drift_run import ENDS, LOGITS, OtherT, Progress, Side, step_of
from graphlens.experiments.stepped_run import Company, Firing, SteppedRun
from graphlens.experiments.sweep_metrics import Measure, Measuring, called
from graphlens.file.names import split_name

# Hook points that hold all of the residual stream: a patch there takes away the error of everything before.
STREAM = frozenset(
    {
        *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_normalized_resid_post", "hook_full_embed"),
        *(
            "ln_final.hook_normalized",
            "unembed.hook_in",
            "mlm_head.ln.hook_normalized",
            "head.hook_in",
            "head.hook_out",
        ),
    }
)
SAME = 1e-3  # of the logits' error: how far an unpatched run from a layer on may be from the whole run


def patchable(result: DriftResult, top: int | None) -> list[Drifted]:
    """The sites to patch: those with the most fresh error that do not hold all of the residual stream.

    Sites without any fresh error are left out: a patch there can only take away what others added.

    Args:
        result: The comparison.
        top: How many; None is all.
    """
    sites = result.worst(max(1, len(result.sites)), "fresh")
    some = [site for site in sites if site.role not in STREAM and site.fresh > 0]
    return some if top is None else some[:top]


class _Given(Generic[ArrayT]):
    """The reference's logits, as what a sweep takes its clean values from."""

    def __init__(self, logits: Array) -> None:
        self.activations = {ENDS[0]: logits}

    def value(self, hook: str, activation: Array, mask: Array | None) -> Array:
        """The activation as it is: nothing is patched from here."""
        return activation


class Costs(Generic[ArrayT, OtherT]):
    """Runs of the other model with the reference's activation at one site.

    Args:
        right: The reference.
        wrong: The other model.
        kept: What was kept of the comparison.
        metric: What is measured besides the logits' error, or None.

    Attributes:
        metric: The metric's name with its value in the reference and in the other model; None without one.
        notes: What a reader should know, a sentence each.

    Raises:
        InputError: For a metric that does not fit.
    """

    def __init__(self, right: Side[ArrayT], wrong: Side[OtherT], kept: Kept, metric: Measure | None) -> None:
        self._right, self._wrong, self._kept = right, wrong, kept
        self.notes: list[str] = []
        self._error = logits_apart(kept.right, kept.wrong, kept.real)
        self._measuring: Measuring | None = None
        self.metric: tuple[str, float, float] | None = None
        if metric is not None and kept.end != LOGITS:
            raise InputError("a metric reads logits, and one of these models gives none: leave metric out.")
        if metric is not None:
            source: _Given[ArrayT] = _Given(kept.right)
            self._measuring = Measuring(wrong.runner, wrong.request, [metric], kept.wrong, source)
            clean = self._measuring.clean[0]
            assert clean is not None
            name = called(metric).strip("'\"")
            self.metric = name, float(clean.mean()), float(self._measuring.corrupted[0].mean())
        if self._error == 0:
            self.notes.append("the logits are equal, so there is no error that patches could take away.")
        config = wrong.runner.config
        # None: not known yet. An encoder and a vision model have no run of some layers alone.
        self._from_layers: bool | None = False if config.is_encoder or config.is_vision else None

    def of(self, sites: Sequence[Drifted], progress: Progress) -> dict[str, tuple[float, float | None]]:
        """How much of the error goes away at each site.

        Args:
            sites: The sites.
            progress: Counts them.

        Returns:
            Hook point -> share of the logits' error, and of the metric's.
        """
        found: dict[str, tuple[float, float | None]] = {}
        if self._error == 0:
            return found
        last = next((site.hook for site in sites if site.hook in ENDS), None)
        if last is not None and self._kept.mended is not None:
            found[last] = self._shares(self._finished(self._kept.mended))
            progress.advance()
        hooks = [site.hook for site in sites if site.hook not in ENDS]
        step = step_of(self._right.names, self._right.runner.config.n_layers)
        stored: dict[str, Array] = {}

        def store(firing: Firing, activation: Array) -> Array:
            if firing[1] == 0:
                stored[firing[0]] = activation
            return activation

        limit, company = 0, Company()
        reference = SteppedRun(
            lambda passing: self._right.run(passing, hooks), store, lambda firing: step[firing[0]] > limit, company
        )
        try:
            for limit in sorted({step[hook] for hook in hooks}):
                while not reference.done and any(step[hook] == limit and hook not in stored for hook in hooks):
                    reference.advance()
                for hook in [hook for hook in hooks if hook in stored]:
                    found[hook] = self._shares(self._patched(hook, stored.pop(hook)))
                    progress.advance()
        finally:
            company.over = True  # before a step at which a Ctrl-C may come
            reference.close()
        return found

    # Runs

    def _patched(self, hook: str, reference: Array) -> Array:
        """The other model's logits with the reference's activation at a hook point."""
        entry, config = self._right.entries[hook], self._right.runner.config
        seen = counted(hook, entry.axes, reference, self._kept.real, config.is_causal)

        def put(name: str, activation: Array) -> Array:
            return put_in(reference, activation, seen)

        side = self._starting(split_name(hook)[0])
        output = side.run(put, [hook], self._kept.end)
        assert output is not None
        return output

    def _starting(self, layer: int | None) -> Side[OtherT]:
        """The other model's run, from a layer on where that gives the same."""
        residual = None if layer is None else self._kept.residuals.get(layer)
        if not layer or residual is None or self._from_layers is False:
            return self._wrong
        try:
            side = self._from(layer, residual)
            if self._from_layers is None:
                whole = side.run(lambda name, activation: activation, [], self._kept.end)
                assert whole is not None
                off = logits_apart(self._kept.wrong, whole, self._kept.real)
                self._from_layers = off <= SAME * self._error
                if not self._from_layers:
                    self.notes.append(
                        f"patched runs are whole ones: a run of the other model from block {layer} on gives other logits."
                    )
        except GraphlensError as error:
            self._from_layers = False
            self.notes.append(f"patched runs are whole ones, since the other model cannot run from a layer on: {error}")
        return side if self._from_layers else self._wrong

    def _from(self, layer: int, residual: Array) -> Side[OtherT]:
        """The other model's run from a layer on."""
        runner, request = self._wrong.runner, self._wrong.request
        options = {} if request.mask is None else {"attention_mask": request.mask}
        begun = runner.request(runner.border.to_user(residual), start_at_layer=layer, **options)
        return Side(runner, begun)

    # What they cost

    def _finished(self, unembedded: Array) -> Array:
        """Logits, from what the unembedding gives."""
        config = self._wrong.runner.config
        logits: Array = unembedded * np.asarray(config.output_logits_scale, unembedded.dtype)
        cap = np.asarray(config.output_logits_soft_cap, unembedded.dtype)
        capped: Array = np.tanh(logits / cap) * cap
        return capped if cap > 0 else logits

    def _shares(self, logits: Array) -> tuple[float, float | None]:
        """The shares of the logits' error and of the metric's that some logits have not."""
        left = logits_apart(self._kept.right, logits, self._kept.real)
        share = 1 - left / self._error if math.isfinite(left / self._error) else math.nan
        if self._measuring is None:
            return share, None
        measure, clean, wrong = self._measuring, self._measuring.clean[0], self._measuring.corrupted[0]
        assert clean is not None
        error = float(np.abs(wrong - clean).mean())
        remains = float(np.abs(measure.of(measure.metrics[0], logits) - clean).mean())
        return share, (1 - remains / error if error else math.nan)
