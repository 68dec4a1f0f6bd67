"""A drift as views: its figures by role and layer as maps, and a table of all sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from graphlens.views.drift_table import Row
from graphlens.views.labelled import Labelled, Stacked
from graphlens.views.listing import table
from graphlens.views.maps import heat
from graphlens.views.pages import Report, report

_SAYS = (
    "relative: the root mean square of the difference, relative to the reference's: all error so far. fresh: the same, of what "
    "this step adds when each hook point before has the reference's activation.",
    "cosine: with the reference. SNR: signal-to-noise ratio in decibels, of all error so far. recovered: the share of the "
    "output's error that goes away when the reference's activation is put in there (1 is all of it).",
)


class Site(Row, Protocol):
    """A row that also says which nodes it comes from."""

    @property
    def nodes(self) -> Sequence[str]:
        """The nodes whose result it is."""


class Drift(Protocol):
    """What a DriftResult shows of itself."""

    @property
    def sites(self) -> Sequence[Site]:
        """The hook points that both models have."""

    @property
    def logits(self) -> float:
        """The relative error of the logits."""

    @property
    def reference(self) -> str:
        """The reference's name."""

    @property
    def other(self) -> str:
        """The other model's."""

    @property
    def shape(self) -> tuple[int, int]:
        """The prompts' (batch, positions)."""

    @property
    def metric(self) -> tuple[str, float, float] | None:
        """The metric's name and values."""

    @property
    def notes(self) -> Sequence[str]:
        """What a reader should know."""

    @property
    def end(self) -> str:
        """What counts as the output."""

    @property
    def patched(self) -> bool:
        """Whether activations were put in."""

    def by_layer(self, figure: str = ...) -> Labelled:
        """A figure by role and layer."""


def drift(result: Drift) -> Report:
    """Shows how far a model is from a reference: ``views.drift(result).save("drift.html")``.

    Args:
        result: What ``graphlens.drift`` gave.

    Returns:
        A page of maps by role and layer, and a table of all sites.
    """
    metric = result.metric
    columns = ["hook point", "fresh", "relative", "cosine", "SNR (dB)"]
    columns += (
        ["recovered"] * result.patched
        + [f"{metric[0]} recovered" for metric in [result.metric] if metric and result.patched]
        + ["nodes"] * any(site.nodes for site in result.sites)
    )
    rows = []
    for site in result.sites:
        row: list[object] = [site.hook, site.fresh, site.relative, site.cosine, site.snr]
        row += [site.recovered] * result.patched + [site.metric] * bool(metric and result.patched)
        rows.append([*row, ", ".join(site.nodes)][: len(columns)])
    batch, length = result.shape
    what = "the logits" if result.end == "logits" else result.end
    lead = [f"{batch} x {length} tokens: {what} off by {100 * result.logits:.3g} %."]
    if metric is not None:
        lead.append(f"{metric[0]}: {metric[1]:.6g} in the reference, {metric[2]:.6g} in the other model.")
    figures = ["fresh", "relative", "cosine", "snr", *["recovered"] * result.patched]
    parts = [table(columns, rows, title=f"{len(rows)} hook points", says=_SAYS)]
    if result.sites:
        grids = [result.by_layer(figure) for figure in figures]
        stack = Stacked(
            np.stack([grid.values for grid in grids]),
            ("metric", *grids[0].axes),
            {"metric": figures, **grids[0].labels},
        )
        parts.insert(
            0,
            heat(
                stack,
                diverges=False,
                missing="no such hook point",
                name="figure",
                title="By role and layer",
                says=_SAYS,
            ),
        )
    return report(
        parts,
        f"Drift of {result.other or 'a model'} from {result.reference or 'its reference'}",
        [*lead, *result.notes],
    )
