"""How many bytes the activations at hook points take in a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from graphlens.engine.plan import Plan
from graphlens.file.io_names import ATTENTION_MASK, INPUT_IDS, LOGITS, PIXELS, RESIDUAL_IN
from graphlens.file.manifest import HookEntry, ModelConfig
from graphlens.file.names import axis_sizes
from graphlens.runtime.types import Feed


@dataclass(frozen=True)
class Footprint:
    """How many bytes the activations at some hook points take, for any batch and length.

    Attributes:
        per_token: Bytes for each token of the batch.
        per_pair: Bytes for each pair of a query and a key in one row of the batch: scores and patterns.
    """

    per_token: int
    per_pair: int

    @classmethod
    def of(cls, entries: Iterable[HookEntry], sizes: Mapping[str, int]) -> Self:
        """The footprint of some hook points.

        Args:
            entries: The hook points. Those that share a value count once.
            sizes: The size of each axis that does not depend on the input: see ``names.axis_sizes``.
        """
        per_token = per_pair = 0
        for entry in {entry.value: entry for entry in entries}.values():
            size = math.prod(entry.sizes(sizes).get(axis, 1) for axis in entry.axes) * np.dtype(entry.dtype).itemsize
            if "key_pos" in entry.axes:
                per_pair += size
            else:
                per_token += size
        return cls(per_token, per_pair)

    def of_run(self, batch: int, pos: int, keys: int) -> int:
        """Bytes of a run.

        Args:
            batch: The number of rows.
            pos: The number of tokens in each row.
            keys: The number of positions that each token attends to, cached ones included.
        """
        return batch * pos * (self.per_token + keys * self.per_pair)


class Footprints:
    """The footprints of the runs of one model.

    Args:
        hooks: Gives the hook map of a plan's graph.
        config: The model's architecture.
    """

    def __init__(self, hooks: Callable[[Plan], Mapping[str, HookEntry]], config: ModelConfig) -> None:
        self._hooks, self._sizes, self._positions = hooks, axis_sizes(config), config.n_ctx
        self._known: dict[Plan, Footprint] = {}

    def of_run(self, plan: Plan, feeds: Mapping[str, Feed]) -> int:
        """Bytes of the activations that ONNX Runtime keeps until a run ends, whether they are fetched or not.

        Args:
            plan: The plan of the run.
            feeds: What the run is fed, by input name.
        """
        plan = plan.ungated
        footprint = self._known.get(plan)
        if footprint is None:
            held = [entry for entry in self._hooks(plan).values() if entry.value != LOGITS]
            footprint = self._known[plan.kept] = Footprint.of(held, self._sizes)
        if PIXELS in feeds:
            batch, pos = len(np.asarray(feeds[PIXELS])), self._positions
        else:
            batch, pos = np.asarray(feeds[INPUT_IDS if plan.start is None else RESIDUAL_IN]).shape[:2]
        keys = np.asarray(feeds[ATTENTION_MASK]).shape[1] if ATTENTION_MASK in feeds else pos
        return footprint.of_run(batch, pos, keys)
