"""Patched runs of models whose blocks are not cut: each from the block of its hook point on, several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.sites import Site
from graphlens.edits.kinds import Patch
from graphlens.engine.block_layout import RESID_PRE
from graphlens.errors import GraphlensError
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.file.names import in_block, split_name

if TYPE_CHECKING:
    from graphlens.model.request import Request
    from graphlens.model.runner import Runner

_SAME = 1e-4  # of the largest logit: beyond it a run from a block on is not the model's
_MOST = 1 << 25  # logits of one run: 128 MiB in float32
Done = tuple[list[int], list[Array]]


def starts_later(runner: Runner[ArrayT]) -> bool:
    """True if a model runs from a block on: a decoder does.

    Args:
        runner: Runs the model.
    """
    return not (runner.config.is_encoder or runner.config.is_vision)


def needed_later(runner: Runner[ArrayT], sites: Sequence[Site]) -> list[str]:
    """The activations that the corrupted run must keep so that patched runs can begin where their hook points are.

    Args:
        runner: Runs the model.
        sites: What is patched, by the hook points' own names.
    """
    if not starts_later(runner):
        return []
    layers = sorted({layer for site in sites if (layer := split_name(site.hook)[0])})
    there = set(runner.engine.hook_names)
    return [name for layer in layers if (name := in_block(layer, RESID_PRE)) in there]


class LaterRuns:
    """The patched runs of a sweep.

    Where the model rounds activations by a scale of the whole batch (dynamic quantisation), patches do not run side by side:
    each would change the others.

    Args:
        run: The corrupted run, which keeps what ``needed_later`` names.
        max_tokens: How many tokens are computed at once.
        notes: Takes a sentence where runs have to be whole ones after all.
    """

    def __init__(self, run: CorruptedRun, max_tokens: int, notes: list[str]) -> None:
        self._run, self._notes = run, notes
        tokens = run.batch * run.length
        fit = min(max_tokens // tokens, _MOST // (tokens * run.runner.config.d_vocab_out))
        adopted = run.runner.engine.manifest.adopted
        self._together = max(1, fit) if adopted is None or adopted.apart else 1
        self._base: Array | None = None
        # What is known of the file is not known of it with SAEs.
        self._starts: dict[int, bool] | None = {} if run.runner.active().saes else None

    def steps(self, sites: Sequence[int]) -> Iterator[Done]:
        """The values of each metric at some sites: (their indices, for each metric [site] or [site, b]).

        Args:
            sites: Indices of the run's sites.
        """
        groups: dict[tuple[int, str], list[int]] = {}
        for index in sites:
            hook = self._run.sites[index].hook
            groups.setdefault((split_name(hook)[0] or 0, hook), []).append(index)
        begun: tuple[int, Request] = (0, self._run.request)
        for (layer, hook), indices in sorted(groups.items()):
            if layer != begun[0]:
                begun = layer, self._from(layer)
            for first in range(0, len(indices), self._together):
                some = indices[first : first + self._together]
                yield some, self._values(begun[1], hook, some)

    def _values(self, begun: Request, hook: str, indices: list[int]) -> list[Array]:
        """Each metric of each patched run."""
        run = self._run
        edits = [run.patch(run.sites[index], run.patched[hook]) for index in indices]
        edit = edits[0]
        if len(edits) > 1:
            # What the run itself holds may be infinite, masked scores say. What is put there was looked at just now.
            edit = Patch(hook, np.concatenate([self._patched(index) for index in indices]), allow_nonfinite=True)
            begun = begun.repeated(len(indices))
        with run.runner.editing(edit):
            logits = run.runner.run(begun).logits
        each = logits.reshape(len(indices), run.batch, *logits.shape[1:])
        return [np.stack([run.measuring.of(metric, one) for one in each]) for metric in run.measuring.metrics]

    def _patched(self, index: int) -> Array:
        """A whole activation with a site's patch in it."""
        site = self._run.sites[index]
        base, chosen = self._run.activations[site.hook], self._run.chosen(site)
        if chosen is None:
            return base
        found: Array = np.where(chosen, self._run.patched[site.hook], base).astype(base.dtype, copy=False)
        return found

    def _from(self, layer: int) -> Request:
        """The corrupted run from a block on, where that gives the same; else the whole one."""
        run, runner = self._run, self._run.runner
        known = runner.engine.proof.starts if self._starts is None else self._starts
        residual = run.activations.get(in_block(layer, RESID_PRE))
        if residual is None or not starts_later(runner) or known.get(layer) is False:
            return run.request
        options = {} if run.request.mask is None else {"attention_mask": run.request.mask}
        try:
            begun = runner.request(runner.border.to_user(residual), start_at_layer=layer, **options)
            if layer not in known:
                known[layer] = self._gives_the_same(begun)
        except GraphlensError as error:
            known[layer] = False
            self._notes.append(f"from block {layer} on it does not run alone ({error})")
            return run.request
        if not known[layer]:
            self._notes.append(f"from block {layer} on it gives other logits than as a whole")
        return begun if known[layer] else run.request

    def _gives_the_same(self, begun: Request) -> bool:
        """True if a run from a block on gives the logits of the whole one, at real tokens."""
        run = self._run
        if self._base is None:
            self._base = run.runner.run(run.request).logits[run.tokens]
        found = run.runner.run(begun).logits[run.tokens]
        return bool(np.abs(found - self._base).max() <= _SAME * np.abs(self._base).max())
