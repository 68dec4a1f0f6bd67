"""Which small integers of a graph follow from its counts (of prompts, tokens and earlier tokens), so that each is made once.

Exporters read the sizes for every reshape off the value at hand: a dozen nodes around each of them, half of a graph's nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.file.io_names import past_input
from graphlens.surgery.graph import install, integers, numbered
from graphlens.surgery.known import Known
from graphlens.surgery.sizes import Sizes

_PREFIX = "adopted/inputs/counts/"
_PAST = past_input("", "").partition(".")[0] + "."
_UNBOUNDED = 1 << 80  # bytes: memory was looked at when the file was opened
# (prompts, tokens, earlier tokens) of runs with sizes made up. The long one tells apart what is cut at a longest input, and the
# one of a single token what is never below some number, or has a branch for a single token or prompt.
_RUNS = ((2, 5, 3), (2, 8, 4), (3, 5, 11), (5, 13, 1), (7, 90_001, 23), (1, 1, 1))
_WHOLE = (np.dtype(np.int64), np.dtype(np.int32))


@dataclass(frozen=True)
class Count:
    """An integer: ``factor * unit + plus``.

    Attributes:
        factor: See above.
        unit: "prompts", "tokens", "earlier", "all" (tokens and earlier ones), "prompts*tokens" or "prompts*all"; "" for none.
        plus: See above.
    """

    factor: int = 0
    unit: str = ""
    plus: int = 0


@dataclass(frozen=True)
class Integers:
    """A value that holds integers which follow from counts.

    Attributes:
        counts: The integers.
        axes: 1 for a list of them, 0 for a single one.
        dtype: Their type.
    """

    counts: tuple[Count, ...]
    axes: int
    dtype: ir.DataType


def make_counts_once(model: ir.Model) -> None:
    """Lets nodes read integers that follow from the counts from one place, as constants where they are, in place.

    What is computed with floats stays as it is, to the bit. The shape that a reshape asks for becomes a constant with zeros and
    -1 where it can, as optimisers write it. The nodes that nothing reads any more stay: see ``graph.drop_unused``.

    Args:
        model: A graph with the inputs of a hooked file, the tokens (or images) first. Of optional inputs, which may be fed as one
            prompt for all, it reads sizes behind the nodes that expand them (``open_ports``). Loops stay as they are.
    """
    known = _Followed(model)
    made = _Made(model.graph)
    found = {
        value: integers
        for node in model.graph
        if node.op_type != "Constant"
        for value in node.outputs
        if (integers := known.content(value)) is not None
    }
    for node in tuple(model.graph):
        if all(value in found for value in node.outputs):
            continue  # it goes where nothing else reads it
        for place, value in enumerate(node.inputs):
            if value is None or value not in found:
                continue
            wanted = found[value]
            if node.op_type == "Reshape" and place == 1:
                wanted = known.written(node, wanted)
            node.replace_input_with(place, made.of(wanted))
    made.install()


class _Followed:
    """What is known of a graph's values in each of ``_RUNS``."""

    def __init__(self, model: ir.Model) -> None:
        self.past = any(str(value.name).startswith(_PAST) for value in model.graph.inputs)
        runs = [(prompts, tokens, earlier if self.past else 0) for prompts, tokens, earlier in _RUNS]
        self._units = _units(runs, self.past)
        self._runs: list[Mapping[ir.Value, Known]] = [
            Sizes(model, Path("this graph"), _UNBOUNDED, _sizes(*run), exact=True, fed=True).known for run in runs
        ]

    def content(self, value: ir.Value) -> Integers | None:
        """The numbers of a value with one axis or none that holds integers; None where they do not follow from the counts."""
        data = [run[value].data if value in run else None for run in self._runs]
        there = [each for each in data if each is not None]
        if len(there) < len(data) or {each.dtype for each in there} - set(_WHOLE):
            return None
        if there[0].ndim > 1 or len({each.shape for each in there}) > 1:
            return None
        counts = self._all(zip(*(each.reshape(-1).tolist() for each in there), strict=True))
        return None if counts is None else Integers(counts, there[0].ndim, ir.DataType.from_numpy(there[0].dtype))

    def shape(self, value: ir.Value) -> tuple[Count, ...] | None:
        """The sizes of a value; None where they do not follow from the counts, or are not known."""
        shapes = [run[value].shape if value in run else None for run in self._runs]
        there = [shape for shape in shapes if shape is not None]
        if len(there) < len(shapes) or len({len(shape) for shape in there}) > 1:
            return None
        return self._all(zip(*there, strict=True))

    def written(self, node: ir.Node, wanted: Integers) -> Integers:
        """The shape that a Reshape asks for, without counts where it can be: 0 for a size that stays, -1 for what is left."""
        if "allowzero" in node.attributes and node.attributes["allowzero"].as_int():
            return wanted
        source = node.inputs[0]
        sizes = () if source is None else self.shape(source) or ()
        found = [
            Count() if count.unit and sizes[place : place + 1] == (count,) else count
            for place, count in enumerate(wanted.counts)
        ]
        left = [place for place, count in enumerate(found) if count.unit]
        # Of nothing (the past of a first step) no size can be worked out.
        if len(left) > 1 or (left and (self.past or Count(plus=-1) in found)):
            return wanted
        for place in left:
            found[place] = Count(plus=-1)
        return replace(wanted, counts=tuple(found))

    def _all(self, columns: Iterable[tuple[int, ...]]) -> tuple[Count, ...] | None:
        found = [self._rule(numbers) for numbers in columns]
        told = tuple(count for count in found if count is not None)
        return told if len(told) == len(found) else None

    def _rule(self, numbers: Sequence[int]) -> Count | None:
        """The rule that gives these numbers in the runs."""
        if len(set(numbers)) == 1:
            return Count(plus=numbers[0])
        for unit, values in self._units.items():
            factor = numbers[0] // values[0]
            if [factor * each for each in values] == list(numbers):
                return Count(factor, unit)
            plus = numbers[0] - values[0]
            if [each + plus for each in values] == list(numbers):
                return Count(1, unit, plus)
        return None


def _units(runs: Sequence[tuple[int, int, int]], past: bool) -> dict[str, list[int]]:
    """What numbers may follow from -> its value in each run."""
    found = {
        "prompts": [prompts for prompts, _, _ in runs],
        "tokens": [tokens for _, tokens, _ in runs],
        "prompts*tokens": [prompts * tokens for prompts, tokens, _ in runs],
    }
    if past:
        found["earlier"] = [earlier for _, _, earlier in runs]
        found["all"] = [tokens + earlier for _, tokens, earlier in runs]
        found["prompts*all"] = [prompts * (tokens + earlier) for prompts, tokens, earlier in runs]
    return found


def _sizes(prompts: int, tokens: int, earlier: int) -> dict[str, int]:
    """The sizes of a hooked file's inputs, by the names that they have there."""
    return {
        **dict.fromkeys(("batch", "past_batch", "mask_batch", "position_batch", "types_batch"), prompts),
        **dict.fromkeys(("sequence", "position_sequence", "types_sequence"), tokens),
        "past_sequence": earlier,
        "mask_sequence": tokens + earlier,
    }


class _Made:
    """Constants, and nodes that compute integers from the inputs, each once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._tape = graph, Tape()
        self._input = graph.inputs[0]
        self._past = next((value for value in graph.inputs if str(value.name).startswith(_PAST)), None)
        self._units: dict[str, ir.Value] = {}
        self._counts: dict[Count, ir.Value] = {}
        self._found: dict[Integers, ir.Value] = {}

    def of(self, integers: Integers) -> ir.Value:
        """Integers as a value."""
        if integers not in self._found:
            self._found[integers] = self._made(integers)
        return self._found[integers]

    def _made(self, wanted: Integers) -> ir.Value:
        if not any(count.unit for count in wanted.counts):
            numbers = np.array([count.plus for count in wanted.counts], wanted.dtype.numpy())
            name = f"{_PREFIX}{len(self._tape.initializers)}"
            tensor = ir.tensor(numbers if wanted.axes else numbers.reshape(()), name=name)
            return self._tape.initializer(tensor, name=name)
        parts = [self._count(count) for count in wanted.counts]
        found = parts[0] if len(parts) == 1 else self._tape.op("Concat", parts, {"axis": 0})
        if not wanted.axes:
            found = self._tape.op("Squeeze", [found])
        if wanted.dtype != ir.DataType.INT64:
            found = self._tape.op("Cast", [found], {"to": wanted.dtype})
        return found

    def _constant(self, number: int) -> ir.Value:
        return integers(self._tape, [number], f"{_PREFIX}{len(self._tape.initializers)}")

    def _count(self, count: Count) -> ir.Value:
        """An integer, int64 [1]."""
        if count not in self._counts:
            found = self._unit(count.unit) if count.unit else self._constant(count.plus)
            if count.unit and count.factor != 1:
                found = self._tape.op("Mul", [found, self._constant(count.factor)])
            if count.unit and count.plus:
                found = self._tape.op("Add", [found, self._constant(count.plus)])
            self._counts[count] = found
        return self._counts[count]

    def _unit(self, name: str) -> ir.Value:
        """A count, int64 [1]."""
        if name not in self._units:
            self._units[name] = self._read(name)
        return self._units[name]

    def _read(self, name: str) -> ir.Value:
        if name in ("prompts", "tokens"):
            axis = ("prompts", "tokens").index(name)
            return self._tape.op("Shape", [self._input], {"start": axis, "end": axis + 1})
        if name == "earlier":
            assert self._past is not None, "only graphs with past have that unit"
            return self._tape.op("Shape", [self._past], {"start": 2, "end": 3})
        if name == "all":
            return self._tape.op("Add", [self._unit("earlier"), self._unit("tokens")])
        return self._tape.op("Mul", [self._unit(part) for part in name.split("*")])

    def install(self) -> None:
        """Puts the nodes before all others."""
        install(self._graph, self._tape, numbered(_PREFIX), after=self._input)
