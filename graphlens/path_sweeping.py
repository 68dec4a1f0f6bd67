"""Path patching: what one component does to others, or to the logits, along the direct paths between them alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt

from graphlens.analysis.sites import Site
from graphlens.analysis.sources import Source
from graphlens.analysis.sweeps import MAX_BATCH_TOKENS, Measure
from graphlens.direct_paths import DirectPaths
from graphlens.errors import InputError
from graphlens.hook_points import split_name
from graphlens.interventions import Patch
from graphlens.pieces import Pieces
from graphlens.recomputing import Corrupted
from graphlens.sweeping import Done, Sweeper, SweepMethods, SweepRun

Array = npt.NDArray[Any]
SENDERS = (
    "hook_embed",
    "hook_pos_embed",
    "attn.hook_z",
    "attn.hook_result",
    "hook_attn_out",
    "mlp.hook_post",
    "hook_mlp_out",
)
RECEIVERS = ("attn.hook_q", "attn.hook_k", "attn.hook_v")


class PathMethods(SweepMethods):
    """The part of HookedTransformer that patches paths for graphlens.patching."""

    def _paths(
        self,
        corrupted: Any,
        senders: Sequence[Site],
        receivers: Sequence[Site] | None,
        source: Source,
        metrics: Sequence[Measure],
        frozen_mlps: bool,
        **forward_options: Any,
    ) -> SweepRun:
        """A sweep over senders, each patched along its direct paths to the receivers (None: the logits) alone."""
        request = self._whole_prompts(corrupted, forward_options)
        if not self._stands_alone():
            raise InputError("path patching runs the plain model: leave the hooks() or intervene() block first.")
        begins = [_one_of(site, SENDERS, "a sender") for site in self._resolved_sites(senders)]
        ends = None
        if receivers is not None:
            ends = [_one_of(site, RECEIVERS, "a receiver") for site in self._resolved_sites(receivers)]
        layers = self._engine.manifest.config.n_layers
        also = [*DirectPaths.needed(layers), *(site.hook for site in ends or ())]
        sweeper = _PathSweeper(self, request, begins, source, metrics, MAX_BATCH_TOKENS, True, also)
        return sweeper.along(ends, frozen_mlps)


def _one_of(site: Site, hooks: Sequence[str], what: str) -> Site:
    if split_name(site.hook)[1] not in hooks:
        raise InputError(f"{site.hook!r} cannot be {what} of a path: it is one of {', '.join(hooks)}.")
    return site


class _PathSweeper(Sweeper):
    """One sweep over senders."""

    def along(self, receivers: Sequence[Site] | None, frozen_mlps: bool) -> SweepRun:
        """The sweep, ready to iterate over."""
        pieces = Pieces(self._engine, self._max_tokens)
        why = self._unproved(pieces)
        if why:
            raise InputError(f"path patching needs a model that comes apart into blocks: {why}.")
        run = Corrupted(self._base, self._mask, self._patched)
        paths = DirectPaths(pieces, run, self._config.n_layers, frozen_mlps, self._max_tokens)
        steps = self._to_logits(paths, pieces) if receivers is None else self._to_heads(paths, receivers)
        return SweepRun(self._metrics, self.corrupted, self.clean, self.notes, len(self._sites), steps)

    def _to_logits(self, paths: DirectPaths, pieces: Pieces) -> Iterator[Done]:
        for index, site in enumerate(self._sites):
            sender = self._variant(index, site)
            if sender is None:
                yield [index], [base[None] for base in self.corrupted]
                continue
            *_, (_, residual) = paths.residuals(sender, self._config.n_layers)
            flat = residual.reshape(-1, residual.shape[-1])
            logits = pieces.end(flat, "logits").reshape(*residual.shape[:2], -1)
            yield [index], [self._measuring.of(metric, logits)[None] for metric in self._metrics]

    def _to_heads(self, paths: DirectPaths, receivers: Sequence[Site]) -> Iterator[Done]:
        at: dict[int, list[Site]] = {}
        for receiver in receivers:
            at.setdefault(receiver.layer or 0, []).append(receiver)
        for index, site in enumerate(self._sites):
            sender = self._variant(index, site)
            patches: list[Patch] = []
            reached = {} if sender is None else dict(paths.residuals(sender, max(at)))
            for layer, residual in reached.items():
                if layer not in at:
                    continue
                found = dict(zip(RECEIVERS, paths.receivers(layer, residual), strict=True))
                patches += [receiver.patch(found[split_name(receiver.hook)[1]]) for receiver in at[layer]]
            if not patches:  # no receiver comes after it
                yield [index], [base[None] for base in self.corrupted]
                continue
            with self._model.intervene(patches):
                logits, _ = self._model._execute(self._request, (), True)
            yield [index], [self._measuring.of(metric, logits)[None] for metric in self._metrics]
