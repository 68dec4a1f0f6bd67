"""Path patching as a user asks for it: senders and receivers in, a SweepResult out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from graphlens.analysis.sites import Site, Sites, grid, listed
from graphlens.analysis.sources import as_source
from graphlens.analysis.sweep_result import SweepResult
from graphlens.analysis.sweeps import Measure, check_processing, collect
from graphlens.errors import InputError

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
