"""Stages that run as one session: each is fed with its weights, which are let go of before the next but one begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from graphlens.errors import RunError
from graphlens.runtime.mapped_weights import MappedWeights
from graphlens.runtime.ort_errors import run_failed
from graphlens.runtime.sessions import OnStart, Session, as_device_value
from graphlens.runtime.types import Array, DeviceValue, Feed


@dataclass(frozen=True)
class StageSession:
    """One stage, open.

    Attributes:
        session: Its session, which may serve other stages too.
        inputs: The session's name of an input -> the name in the whole graph.
        weights: The session's name of an input -> the weight that it is fed with.
        outputs: The name in the whole graph -> the session's name of that output.
        by_row: Weights of which only single rows are read.
    """

    session: Session
    inputs: Mapping[str, str]
    weights: Mapping[str, str]
    outputs: Mapping[str, str]
    by_row: frozenset[str]

    @property
    def read_whole(self) -> list[str]:
        """The weights that are read from their first byte to their last."""
        return [name for mine, name in self.weights.items() if mine not in self.by_row]


class Staged:
    """Several sessions that run as one, a stage after the other. For its attributes see ``Runnable``.

    Args:
        stages: The stages, in order.
        weights: Their weights.
        inputs: The inputs of the whole graph that must be fed.
        optional: Those that have a default.
        outputs: The outputs of the whole graph, in order.
        every: True where each run goes through all stages, whatever is asked for: one may call Python.
        name: The graph, as errors name it.

    Attributes:
        stages: See above.
    """

    def __init__(
        self,
        stages: Sequence[StageSession],
        weights: MappedWeights,
        inputs: Sequence[str],
        optional: Sequence[str],
        outputs: Sequence[str],
        every: bool,
        name: str,
    ) -> None:
        self.stages, self._weights, self._every, self._name = stages, weights, every, name
        self.providers = stages[0].session.providers
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.feedable, self.readable = frozenset((*inputs, *optional)), frozenset(outputs)
        self._whole = [stage.read_whole for stage in stages]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Feed], on_start: OnStart | None = None) -> list[Array]:
        """Runs the stages and returns some outputs as arrays. See ``Session.run``.

        Args:
            outputs: See there, as for what follows.
            feeds: See there.
            on_start: Is called for each stage, with the options of its run.
        """
        return [value.numpy() for value in self.run_on_device(outputs, feeds, on_start)]

    def run_on_device(
        self, outputs: Sequence[str], feeds: Mapping[str, Feed], on_start: OnStart | None = None
    ) -> list[DeviceValue]:
        """Runs the stages that the outputs need. See ``Session.run_on_device``.

        Args:
            outputs: See there, as for what follows.
            feeds: See there.
            on_start: Is called for each stage, with the options of its run.

        Raises:
            RunError: ONNX Runtime could not run a stage, or an input is missing or unknown.
        """
        self._check(outputs, feeds)
        # An OrtValue aliases its array's memory, so both must live until the run ends: `arrays` keeps them.
        arrays = {name: np.asarray(feed, order="C") for name, feed in feeds.items() if not hasattr(feed, "numpy")}
        values: dict[str, DeviceValue] = {
            name: as_device_value(arrays[name]) if name in arrays else feed  # type: ignore[misc]
            for name, feed in feeds.items()
        }
        plan = self._planned(frozenset(outputs))
        last_read = {name: turn for turn, (_, _, read) in enumerate(plan) for name in read}
        for turn, (place, wanted, read) in enumerate(plan):
            if turn == 0:
                self._weights.read_ahead(self._whole[place])
            if turn + 1 < len(plan):
                self._weights.read_ahead(self._whole[plan[turn + 1][0]])
            stage = self.stages[place]
            given = {mine: values[name] for mine, name in stage.inputs.items() if name in values}
            given |= {mine: self._weights.value(name) for mine, name in stage.weights.items()}
            try:
                found = stage.session.run_on_device([stage.outputs[name] for name in wanted], given, on_start)
            except RunError as error:
                if not isinstance(error.__cause__, Exception):
                    raise
                raise run_failed(error.__cause__, self._name, feeds) from error.__cause__
            finally:
                del given
                self._weights.let_go(stage.weights.values())
            values.update(zip(wanted, found, strict=True))
            for name in read:
                if last_read[name] == turn and name not in outputs:
                    values.pop(name, None)
        return [values[name] for name in outputs]

    def _check(self, outputs: Sequence[str], feeds: Mapping[str, Feed]) -> None:
        """Refuses what one session would refuse."""
        unknown = [name for name in feeds if name not in self.feedable]
        missing = [name for name in self.inputs if name not in feeds]
        strange = [name for name in outputs if name not in self.readable]
        if unknown or missing or strange:
            what = f"no input {unknown[0]!r}" if unknown else f"no output {strange[0]!r}" if strange else ""
            raise RunError(f"{self._name}: " + (f"it has {what}." if what else f"{missing[0]!r} was not fed."))

    def _planned(self, outputs: Set[str]) -> list[tuple[int, list[str], list[str]]]:
        """The stages that run: (its place, the outputs wanted of it, what it reads), in order."""
        needed, plan = set(outputs), list[tuple[int, list[str], list[str]]]()
        for place in reversed(range(len(self.stages))):
            stage = self.stages[place]
            wanted = [name for name in stage.outputs if name in needed]
            if self._every and not wanted and stage.outputs:
                wanted = [next(iter(stage.outputs))]
            if wanted:
                read = list(stage.inputs.values())
                needed.update(read)
                plan.append((place, wanted, read))
        return plan[::-1]
