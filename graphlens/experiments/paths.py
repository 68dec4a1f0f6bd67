"""Path patching: what one component does to others, or to the logits, along the direct paths between them alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site, Sites, grid, listed
from graphlens.analysis.sources import Source, as_source
from graphlens.edits.kinds import Patch
from graphlens.engine.block_pieces import BlockPieces
from graphlens.errors import InputError
from graphlens.experiments.direct_paths import DirectPaths
from graphlens.experiments.recompute import Corrupted
from graphlens.experiments.sweep import MAX_BATCH_TOKENS, Measure, check_processing, collect
from graphlens.experiments.sweep_run import Done, Sweeper, SweepMethods, SweepRun
from graphlens.file.names import split_name

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
        pieces = BlockPieces(self._engine, self._max_tokens)
        why = self._unproved(pieces)
        if why:
            raise InputError(f"path patching needs a model that comes apart into blocks: {why}.")
        run = Corrupted(self._base, self._mask, self._patched)
        paths = DirectPaths(pieces, run, self._config.n_layers, frozen_mlps, self._max_tokens)
        steps = self._to_logits(paths, pieces) if receivers is None else self._to_heads(paths, receivers)
        return SweepRun(self._metrics, self.corrupted, self.clean, self.notes, len(self._sites), steps)

    def _to_logits(self, paths: DirectPaths, pieces: BlockPieces) -> Iterator[Done]:
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


MLPS = ("frozen", "recomputed")


def path_patch(
    model: Any,
    corrupted_tokens: Any,
    source: Any,
    metric: Measure | Iterable[Measure] | Mapping[str, Measure],
    receivers: Iterable[Site] | Site | str = "logits",
    senders: Iterable[Site] | Site | Sites | None = None,
    *,
    mlps: str = "frozen",
    verbose: bool = True,
    **forward_options: Any,
) -> SweepResult:
    """Patches each sender's output along its direct paths to the receivers alone, and measures what that does.

    The sender writes what ``source`` holds for it; every other head writes what it wrote in the corrupted run; the
    receivers read what then reaches them; and the run is the corrupted one but for that. ``receivers``: "logits", or
    Sites of q, k and v (``Site("q", 9, head=6)``), which are all patched together. ``senders``: Sites of z, attn_out,
    mlp_out, mlp post or the embeddings, or a ``grid``; every head by default ([layer, head]).
    ``mlps``: "frozen", so that a path is through the residual stream alone (Goldowsky-Dill et al. 2023's direct effect),
    or "recomputed", so that it may pass through MLPs (Wang et al. 2022, "Interpretability in the Wild", appendix B).
    LayerNorms are computed again in either. The rest is as in ``sweep``.
    """
    if mlps not in MLPS:
        raise InputError(f"mlps={mlps!r}: it is {' or '.join(map(repr, MLPS))}.")
    if senders is None:
        cfg = model.cfg
        senders = grid("z", ("layer", "head"), {"layer": range(cfg.n_layers), "head": range(cfg.n_heads)})
    places = listed(senders)
    if isinstance(receivers, str) and receivers != "logits":
        raise InputError(f"receivers={receivers!r}: give 'logits', or Sites of q, k and v.")
    ends = None if isinstance(receivers, str) else listed(receivers).sites
    check_processing(model, source)

    def start(measures: list[Measure], left: list[int]) -> Any:
        return model._paths(
            corrupted_tokens,
            [places.sites[i] for i in left],
            ends,
            as_source(source),
            measures,
            mlps == "frozen",
            **forward_options,
        )

    return collect(model, places, metric, start, verbose)
