"""Where features of an SAE are active in some texts: the tokens they are largest at, what stands around these, how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.analysis.reductions import Statistics, Top
from graphlens.errors import InputError, checked_number

if TYPE_CHECKING:
    from graphlens.analysis.harvest import Harvest

_AT_ONCE = 4096  # tokens of a harvest


@dataclass(frozen=True, eq=False)
class Context:
    """A token where a feature is active, with what stands around it.

    Attributes:
        ids: int64 [n], the ids of the tokens of the context.
        activations: float32 [n], the feature at each; NaN where it is not known.
        at: Which of them is the token itself.
        value: The feature's activation there.
        prompt: Which prompt or document it is in.
        position: Its position there.
    """

    ids: Array
    activations: Array
    at: int
    value: float
    prompt: int
    position: int


@dataclass(frozen=True, eq=False)
class FeatureExamples:
    """The tokens at which features are largest.

    Attributes:
        numbers: What the features are called.
        values: float32 [k, n], the largest activations of each feature, largest first; -inf where there are fewer tokens.
        places: int64 [k, n], which tokens have them; -1 where there are fewer.
        tokens: int64 [t], the ids of all tokens.
        prompts: int64 [t], the prompt or document that each is of.
        positions: int64 [t], its position there.
        counted: bool [t], False for tokens that were left out.
        density: float64 [n], the share of tokens at which each feature is above 0.
        activations: float32 [t, n], every activation; None where they were not kept.
    """

    numbers: tuple[int, ...]
    values: Array
    places: Array
    tokens: Array
    prompts: Array
    positions: Array
    counted: Array
    density: Array
    activations: Array | None

    @classmethod
    def of_harvest(
        cls, harvest: Harvest, hook: str, features: Sequence[int] | None = None, k: int = 10
    ) -> FeatureExamples:
        """The same from a harvest of ``<hook>.hook_sae_acts_post``.

        Args:
            harvest: The harvest, whose model had the SAE. Of one with activations, the features asked for are read; of one with
                ``reduce="top"``, its largest tokens are taken as they are.
            hook: The hook point of the features.
            features: Which; None for all.
            k: How many tokens for each.

        Raises:
            InputError: For a hook point that was not harvested, no activations and no ``reduce="top"``, and features that are not
                there.
        """
        k = checked_number(k, "k", least=1)
        (width,) = harvest.plan.shapes.get(hook, (0,))
        chosen = chosen_of(features, width if hook in harvest else harvest[hook].shape[-1])
        ids, documents, positions = (
            np.asarray(column[:], np.int64) for column in (harvest.tokens, harvest.documents, harvest.positions)
        )
        everything = np.ones(len(ids), bool)
        if not harvest.plan.written:
            found = harvest.reduced[hook]
            if "top_values" not in found:
                raise InputError(
                    f"{hook!r}: this harvest has neither activations nor reduce='top'. Harvest again with one."
                )
            values, places = found["top_values"][:k, chosen], found["top_tokens"][:k, chosen]
            unknown = np.full(len(chosen), np.nan)
            return cls(tuple(chosen), values, places, ids, documents, positions, everything, unknown, None)
        search = Search(len(chosen), k, keep=features is not None)
        for first in range(0, len(ids), _AT_ONCE):
            rows = harvest[hook][first : first + _AT_ONCE]
            search.add(np.asarray(rows, np.float32)[:, chosen], everything[first : first + _AT_ONCE])
        return search.found(tuple(chosen), ids, documents, positions, everything)

    def __repr__(self) -> str:
        return (
            f"FeatureExamples({len(self.numbers)} features, {len(self.tokens):,} tokens, {len(self.values)} for each)"
        )

    def column(self, feature: int) -> int:
        """Which column a feature has in the arrays.

        Args:
            feature: Its number.

        Raises:
            InputError: It is not among them.
        """
        if feature not in self.numbers:
            raise InputError(f"feature {feature!r} is not among the {len(self.numbers)} that were looked for.")
        return self.numbers.index(feature)

    def contexts(self, feature: int, before: int = 12, after: int = 4) -> list[Context]:
        """The tokens at which a feature is largest and above 0, largest first, each with tokens around it of the same prompt.

        Args:
            feature: Its number.
            before: How many tokens before it.
            after: How many after it.

        Raises:
            InputError: It is not among them.
        """
        column = self.column(feature)
        before, after = checked_number(before, "before", least=0), checked_number(after, "after", least=0)
        found = []
        for value, place in zip(self.values[:, column], self.places[:, column], strict=True):
            if place < 0 or not value > 0:
                continue
            start, stop = max(0, int(place) - before), int(place) + after + 1
            here = np.arange(start, min(stop, len(self.tokens)))
            # Of the same row: positions go up one by one.
            same = (self.prompts[here] == self.prompts[place]) & (
                self.positions[here] - self.positions[place] == here - place
            )
            here = here[same]
            if self.activations is None:
                shown = np.where(here == place, value, np.nan).astype(np.float32)
            else:
                shown = self.activations[here, column]
            at = int(np.flatnonzero(here == place)[0])
            found.append(
                Context(
                    self.tokens[here], shown, at, float(value), int(self.prompts[place]), int(self.positions[place])
                )
            )
        return found

    def histogram(self, feature: int, bins: int = 20) -> tuple[Array, Array]:
        """How often a feature has which activation, where it is above 0.

        Args:
            feature: Its number.
            bins: How many bins of one width.

        Returns:
            Counts [bins], and the bins' edges [bins + 1].

        Raises:
            InputError: It is not among them, or activations were not kept.
        """
        column = self.column(feature)
        if self.activations is None:
            raise InputError("activations were not kept: name the features that are looked for, features=[...].")
        values = self.activations[self.counted, column]
        counts, edges = np.histogram(values[values > 0], checked_number(bins, "bins", least=1))
        return counts, edges


class Search:
    """Finds the tokens at which features are largest, batch after batch.

    Args:
        count: How many features.
        k: How many tokens for each.
        keep: Whether every activation is kept.
    """

    _NAME = "features"

    def __init__(self, count: int, k: int, keep: bool) -> None:
        self._top = Statistics([Top(k)], {self._NAME: count})
        self._kept: list[Array] | None = [] if keep else None
        self._above = np.zeros(count)
        self._seen, self._counted, self._width = 0, 0, count

    def add(self, values: Array, counted: Array) -> None:
        """Takes in the next tokens.

        Args:
            values: float32 [t, n].
            counted: bool [t]; the others are left out, and keep their place.
        """
        places = self._seen + np.flatnonzero(counted)
        self._top.add(self._NAME, values[counted], places)
        self._above += (values[counted] > 0).sum(0)
        self._seen, self._counted = self._seen + len(values), self._counted + len(places)
        if self._kept is not None:
            self._kept.append(np.array(values))

    def found(
        self,
        numbers: tuple[int, ...],
        tokens: Array,
        prompts: Array,
        positions: Array,
        counted: Array,
    ) -> FeatureExamples:
        """What was found.

        Args:
            numbers: What the features are called.
            tokens: The ids of all tokens that were added, [t].
            prompts: The prompt of each.
            positions: Its position there.
            counted: Which were not left out.
        """
        top = self._top.results({self._NAME: (self._width,)})[self._NAME]
        kept = None if self._kept is None else np.concatenate(self._kept)
        density = self._above / max(self._counted, 1)
        return FeatureExamples(
            numbers, top["top_values"], top["top_tokens"], tokens, prompts, positions, counted, density, kept
        )


def chosen_of(features: Sequence[int] | None, width: int) -> list[int]:
    """Which features a user asked for, as indices.

    Args:
        features: Their indices; None for all.
        width: How many there are.

    Raises:
        InputError: For one that is not there, and for none.
    """
    if features is None:
        return list(range(width))
    found = [checked_number(each, "a feature", least=0, most=width - 1) for each in features]
    if not found or len(set(found)) < len(found):
        raise InputError("features=: name each once, one at least.")
    return found
