"""A feature of an SAE as a page: how often it is how large, the tokens it is largest at, the logits it raises and lowers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from graphlens.errors import checked_number
from graphlens.views.labelled import Array, Stacked
from graphlens.views.listing import table
from graphlens.views.maps import bars
from graphlens.views.pages import Report, View
from graphlens.views.text_view import text
from graphlens.views.wording import number as shown
from graphlens.views.words import Tokenizing, text_of_ids


class InContext(Protocol):
    """A token where a feature is active, with what stands around it; see analysis.feature_examples.Context."""

    @property
    def ids(self) -> Array:
        """The ids of the tokens."""

    @property
    def activations(self) -> Array:
        """The feature at each."""

    @property
    def value(self) -> float:
        """The feature at the token itself."""

    @property
    def prompt(self) -> int:
        """Which prompt it is in."""

    @property
    def position(self) -> int:
        """Its position there."""


class Examples(Protocol):
    """Where features are active; a FeatureExamples is one."""

    @property
    def density(self) -> Array:
        """The share of tokens at which each is above 0."""

    @property
    def activations(self) -> Array | None:
        """Every activation; None where they were not kept."""

    def column(self, feature: int) -> int:
        """Which column a feature has."""

    def contexts(self, feature: int, before: int = ..., after: int = ...) -> Sequence[InContext]:
        """The tokens at which a feature is largest."""

    def histogram(self, feature: int, bins: int = ...) -> tuple[Array, Array]:
        """How often it has which activation."""


def feature(
    examples: Examples,
    number: int,
    *,
    model: Tokenizing | None = None,
    logits: Array | None = None,
    n: int = 10,
    before: int = 12,
    after: int = 4,
) -> Report:
    """Shows a feature: ``views.feature(feature_examples(model, texts, sae, [17]), 17, model=model)``.

    Args:
        examples: Where features are active.
        number: Which feature.
        model: The model whose tokenizer names the tokens; None for their ids.
        logits: What the feature writes to the logits [d_vocab]: a row of ``feature_logits``; None leaves them out.
        n: How many logits are named, raised and lowered.
        before: How many tokens are shown before the one at which the feature is large.
        after: How many after it.

    Returns:
        A page: the histogram of its activations above 0 where these were kept, the text around each example coloured by its
        activation, and the logits.

    Raises:
        InputError: For a feature that is not among the examples.
    """
    column = examples.column(number)
    views: list[View] = []
    density = float(examples.density[column])
    rarely = "" if np.isnan(density) else f"It is above 0 at {100 * density:.3g} % of tokens."
    if examples.activations is not None and density > 0:
        counts, edges = examples.histogram(number)
        labels = [f"{shown(low)} to {shown(high)}" for low, high in pairwise(edges)]
        views.append(
            bars(
                Stacked(counts.astype(np.float64), ("activation",), {"activation": labels}),
                order="given", name="tokens", title=f"Feature {number}: its activations above 0", says=(rarely,),
            )
        )  # fmt: skip
    for rank, one in enumerate(examples.contexts(number, before, after)):
        where = f"prompt {one.prompt}, position {one.position}: {shown(one.value)}"
        words = text_of_ids([int(each) for each in one.ids], model)
        says = rarely if rank == 0 and not views else ""
        views.append(
            text(words, one.activations, name=f"feature {number}", title=f"Feature {number}, {where}", says=says)
        )
    if not views:
        views.append(View("", f"Feature {number}", {}, ("It is above 0 at none of these tokens.",), 90))
    if logits is not None:
        views.append(_logits(number, np.asarray(logits, np.float64), model, checked_number(n, "n", least=1)))
    return Report(tuple(views), f"Feature {number}")


def _logits(number: int, logits: Array, model: Tokenizing | None, n: int) -> View:
    """The logits that a feature raises most, and those that it lowers most."""
    order = np.argsort(-logits, kind="stable")
    raised, lowered = ([int(each) for each in some] for some in (order[:n], order[::-1][:n]))
    up, down = text_of_ids(raised, model), text_of_ids(lowered, model)
    rows = [(up[i], float(logits[raised[i]]), down[i], float(logits[lowered[i]])) for i in range(min(n, len(logits)))]
    return table(
        ("raised", "by", "lowered", "by "),
        rows,
        title=f"Feature {number}: logits",
        says=("For an activation of 1, directly, up to the scale of the final norm; their mean is taken off.",),
    )
