"""How many bytes the hook points of a run come to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from graphlens.file.manifest import HookEntry


@dataclass(frozen=True)
class Footprint:
    """Bytes of activations: ``per_token`` of the batch, and ``per_pair`` of a query and a key of a row besides."""

    per_token: int
    per_pair: int

    @classmethod
    def of(cls, entries: Iterable[HookEntry], sizes: Mapping[str, int]) -> Self:
        """That of some hook points, those that share a value counted once; ``sizes``: see hook_points.axis_sizes."""
        found = {False: 0, True: 0}
        for entry in {entry.value: entry for entry in entries}.values():
            width = math.prod(sizes.get(axis, 1) for axis in entry.axes)
            found["key_pos" in entry.axes] += width * np.dtype(entry.dtype).itemsize
        return cls(found[False], found[True])

    def of_run(self, batch: int, pos: int, keys: int) -> int:
        """Bytes of a run over ``pos`` tokens in each row, which attend to ``keys`` positions."""
        return batch * pos * (self.per_token + keys * self.per_pair)
