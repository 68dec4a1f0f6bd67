"""What tables and heat maps show: values along named axes whose entries have labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Labelled(Protocol):
    """Values along named axes, with baselines to compare them with; a SweepResult is one."""

    @property
    def values(self) -> Array:
        """The values, float64; NaN is what is not computed yet."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The name of each axis."""

    @property
    def labels(self) -> Mapping[str, Sequence[str]]:
        """What each entry of each axis is called."""

    @property
    def baselines(self) -> Mapping[str, float | Array | None]:
        """What the values are compared with, by name, where it is known."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""

    def against(self, name: str = ...) -> Array:
        """A baseline in a shape that broadcasts to ``values``."""


@dataclass(frozen=True)
class Stacked:
    """Values along named axes without baselines, put together to be shown.

    Attributes:
        values: float64.
        axes: The name of each axis.
        labels: What each entry of each axis is called.
        baselines: None.
    """

    values: Array
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[str]]
    baselines: Mapping[str, float | Array | None] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""
        return self.values.shape

    def against(self, name: str = "corrupted") -> Array:
        """Zero: there is no baseline."""
        return np.zeros((1,) * self.values.ndim)
