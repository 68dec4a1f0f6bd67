"""Path patching: what one component does to others, or to the logits, along the direct paths between them only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphlens.analysis.arrays import ArrayT
from graphlens.analysis.result import SweepResult
from graphlens.analysis.sites import Site, Sites, grid, listed
from graphlens.analysis.sources import Source, as_source
from graphlens.edits.kinds import Patch
from graphlens.engine.block_layout import ATTN_OUT, MLP_OUT, BlockLayout
from graphlens.engine.block_pieces import WHOLE_BLOCKS, BlockPieces
from graphlens.errors import InputError
from graphlens.experiments.corrupted_run import CorruptedRun, resolved_sites
from graphlens.experiments.direct_paths import DirectPaths
from graphlens.experiments.frozen_runs import FrozenRuns
from graphlens.experiments.proof import prove, why_not_added
from graphlens.experiments.recompute import MAX_BATCH_TOKENS
from graphlens.experiments.sweep import check_processing, collect
from graphlens.experiments.sweep_metrics import Measure
from graphlens.experiments.sweep_run import Done, SweepRun, kept_for
from graphlens.file.io_names import LOGITS
from graphlens.file.names import in_block, split_name

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.runner import Runner

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
MLPS = ("frozen", "recomputed")


def path_patch(
    model: HookedTransformer[Any],
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
    """Patches each sender's output along its direct paths to the receivers only, and measures what that does.

    The sender writes what ``source`` holds for it, and every other head what it wrote in the corrupted run. The receivers
    read what then reaches them. All else is as in the corrupted run, but that LayerNorms are computed again.

    Args:
        model: The model.
        corrupted_tokens: Tokens [b, p] or text; a list of texts is padded on the left.
        source: What the senders write; see ``sweep``.
        metric: What is measured; see ``sweep``.
        receivers: "logits", or Sites of q, k and v (``Site("q", 9, head=6)``), which are all patched together.
        senders: Sites of z, attn_out, mlp_out, mlp post or the embeddings, or a ``grid``; every head by default
            ([layer, head]).
        mlps: "frozen", so that a path is through the residual stream alone (the direct effect of Goldowsky-Dill et al.
            2023), or "recomputed", so that it may pass through MLPs (Wang et al. 2022, "Interpretability in the Wild",
            appendix B).
        verbose: Whether a terminal shows a progress bar.
        **forward_options: Those of ``forward``.

    Returns:
        The metric of each patched run, with the axes of the senders.

    Raises:
        UnknownHookPoint: For a hook point that is not there.
        InputError: For what does not fit the model, the prompts or each other.
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
    check_processing(model.cfg, source)

    def start(measures: list[Measure], left: list[int]) -> SweepRun:
        return start_paths(
            model.runner,
            corrupted_tokens,
            [places.sites[i] for i in left],
            ends,
            as_source(source),
            measures,
            mlps == "frozen",
            **forward_options,
        )

    return collect(model.runner, places, metric, start, verbose)


def start_paths(
    runner: Runner[ArrayT],
    corrupted: Any,
    senders: Sequence[Site],
    receivers: Sequence[Site] | None,
    source: Source,
    metrics: Sequence[Measure],
    frozen_mlps: bool,
    **forward_options: Any,
) -> SweepRun:
    """Begins path patching; see ``path_patch``.

    Args:
        runner: Runs the model.
        corrupted: The corrupted prompts.
        senders: What is patched, one at a time.
        receivers: Where the paths end, all together; None for the logits.
        source: What the senders write.
        metrics: What is measured.
        frozen_mlps: True keeps what MLPs wrote in the corrupted run.
        **forward_options: Those of ``forward``.

    Returns:
        The sweep under way.

    Raises:
        InputError: For sites that cannot be senders or receivers, and for a model that does not come apart into blocks.
    """
    request = runner.whole_prompts(corrupted, **forward_options)
    if not runner.active().of_file:
        raise InputError(
            "path patching runs the plain model: leave the hooks(), intervene() or saes() block first, or call reset_saes()."
        )
    begins = [_one_of(site, SENDERS, "a sender") for site in resolved_sites(runner, senders)]
    ends = None
    if receivers is not None:
        ends = [_one_of(site, RECEIVERS, "a receiver") for site in resolved_sites(runner, receivers)]
    hooks = list(dict.fromkeys(site.hook for site in begins))
    keep = [
        *kept_for(runner, hooks),
        *DirectPaths.needed(BlockLayout.of(runner.engine)),
        *(site.hook for site in ends or ()),
    ]
    lacking = set(keep) - set(runner.names())
    if lacking:
        raise InputError(f"path patching reads {sorted(lacking)[0]!r}, and this model has no such hook point.")
    run = CorruptedRun.of(runner, request, begins, source, metrics, keep)
    if runner.engine.manifest.adopted is not None:
        layout = BlockLayout.of(runner.engine)
        _ensure_sums(run, hooks, layout)
        frozen = FrozenRuns(run, frozen_mlps)
        notes = [f"this model was adopted: {WHOLE_BLOCKS}"]
        return SweepRun.of(run, notes, 0, frozen.to_logits() if ends is None else frozen.to_heads(ends))
    pieces = BlockPieces(runner.engine, MAX_BATCH_TOKENS)
    why = prove(run, pieces, MAX_BATCH_TOKENS).why
    if why:
        raise InputError(f"path patching needs a model that comes apart into blocks: {why}.")
    _ensure_sums(run, hooks, pieces.layout)
    paths = DirectPaths(pieces, run.kept(), frozen_mlps)
    steps = _to_logits(run, paths, pieces) if ends is None else _to_heads(run, paths, ends)
    return SweepRun.of(run, [], len(begins), steps)


def _ensure_sums(run: CorruptedRun, hooks: Sequence[str], layout: BlockLayout) -> None:
    """Raises InputError where what sublayers and senders write is not added to the residual stream as it is."""
    written = [in_block(layer, name) for layer in range(run.n_layers) for name in (ATTN_OUT, MLP_OUT)]
    for hook in [*written, *hooks]:
        why = why_not_added(run, hook, layout)
        if why:
            raise InputError(f"no path leads from {hook!r} in this model: {why}.")


def _one_of(site: Site, hooks: Sequence[str], what: str) -> Site:
    if split_name(site.hook)[1] not in hooks:
        raise InputError(f"{site.hook!r} cannot be {what} of a path: it is one of {', '.join(hooks)}.")
    return site


def _to_logits(run: CorruptedRun, paths: DirectPaths, pieces: BlockPieces) -> Iterator[Done]:
    """Each sender along its direct path to the logits."""
    for index in range(len(run.sites)):
        sender = run.variant(index)
        if sender is None:
            yield [index], [base[None] for base in run.measuring.corrupted]
            continue
        *_, (_, residual) = paths.residuals(sender, run.n_layers)
        logits = pieces.end(residual.reshape(-1, residual.shape[-1]), LOGITS).reshape(*residual.shape[:2], -1)
        yield [index], [run.measuring.of(metric, logits)[None] for metric in run.measuring.metrics]


def _to_heads(run: CorruptedRun, paths: DirectPaths, receivers: Sequence[Site]) -> Iterator[Done]:
    """Each sender along its direct paths to the receivers, which are patched in a run of the model."""
    at: dict[int, list[Site]] = {}
    for receiver in receivers:
        at.setdefault(receiver.layer or 0, []).append(receiver)
    for index in range(len(run.sites)):
        sender = run.variant(index)
        patches: list[Patch] = []
        reached = {} if sender is None else dict(paths.residuals(sender, max(at)))
        for layer, residual in reached.items():
            if layer not in at:
                continue
            found = dict(zip(RECEIVERS, paths.receivers(layer, residual), strict=True))
            patches += [run.patch(receiver, found[split_name(receiver.hook)[1]]) for receiver in at[layer]]
        if not patches:  # no receiver comes after it
            yield [index], [base[None] for base in run.measuring.corrupted]
            continue
        with run.runner.editing(patches):
            logits = run.runner.run(run.request).logits
        yield [index], [run.measuring.of(metric, logits)[None] for metric in run.measuring.metrics]
