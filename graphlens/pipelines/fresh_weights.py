"""Weights that are read one at a time and not kept: how to hold no more of a file than is looked at."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.file.manifest import WeightView
from graphlens.file.quantised import dequantised
from graphlens.file.safetensors import SafetensorsFile, apply_view, as_float, stored_numbers


class FreshWeights:
    """Weights that are mapped anew each time that one is read, so that no page of a file stays in memory.

    Args:
        folder: The folder of the weights files.
        views: TransformerLens name -> the view that a weight is.
    """

    def __init__(self, folder: Path, views: Mapping[str, WeightView]) -> None:
        self._folder, self._views = folder, views
        self._files: dict[str, SafetensorsFile] = {}

    @property
    def names(self) -> list[str]:
        """Every weight's name."""
        return list(self._views)

    def __contains__(self, name: str) -> bool:
        return name in self._views

    def __getitem__(self, name: str) -> Array:
        """A whole weight: a view of a file of its own mapping, or numbers made of integers.

        Raises:
            ModelFileError: The file does not hold what its view says.
        """
        view = self._views[name]
        return apply_view(stored_numbers(self._mapped(view), view), view)

    def comes_apart(self, name: str) -> bool:
        """True if some entries of a weight can be read without the others being dequantised.

        Args:
            name: The weight.
        """
        view = self._views[name]
        how = view.quantised
        whole = (
            view.take is None and view.cut is None and view.shape is None and view.within is None and not view.joined
        )
        return how is None or (how.block is None and how.bits >= 8 and whole)

    def part(self, name: str, axis: int, where: slice | Array) -> Array:
        """Some entries of a weight along an axis. Of one that is stored as integers the others are not dequantised, if it can be.

        Args:
            name: The weight.
            axis: The axis.
            where: Which entries: a stretch, or their places.

        Returns:
            The weight with those entries alone.

        Raises:
            ModelFileError: See ``__getitem__``.
        """
        view, how = self._views[name], self._views[name].quantised
        if how is None or not self.comes_apart(name):
            return _along(self[name], axis, where)
        file, stored = self._mapped(view), axis if view.permute is None else view.permute[axis]

        def of(key: str) -> Array:
            numbers = as_float(file, key)
            return numbers.reshape(-1)[where] if how.axis == stored and numbers.size > 1 else numbers

        integers = _along(file.array(view.tensor), stored, where)
        return apply_view(
            dequantised(integers, how, of(how.scale), None if how.zero_point is None else of(how.zero_point)), view
        )

    def _mapped(self, view: WeightView) -> SafetensorsFile:
        """The file of a view, not mapped yet. Its header is read once."""
        if view.file not in self._files:
            self._files[view.file] = SafetensorsFile(self._folder / view.file)
        return copy.copy(self._files[view.file])


def _along(array: Array, axis: int, where: slice | Array) -> Array:
    """Some entries of an array along an axis."""
    found: Array = np.asarray(array[(slice(None),) * axis + (where,)])
    return found
