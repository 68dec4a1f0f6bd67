"""How the sizes of a graph's values follow from the number of prompts and tokens, so that a residual stream can give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.errors import InputError
from graphlens.surgery.graph import install, integers, numbered
from graphlens.surgery.known import Known
from graphlens.surgery.sizes import Sizes

_UNBOUNDED = 1 << 80  # bytes: memory was looked at when the file was opened
# (prompts, tokens) of runs with sizes made up; four tell the rules below from each other, and from chance.
_RUNS = ((2, 5), (3, 5), (2, 7), (3, 7))
_READ_SIZES = ("Shape", "Size")


@dataclass(frozen=True)
class Size:
    """A size: ``factor * prompts ** batch * tokens ** sequence + plus``.

    Attributes:
        factor: See above.
        batch: 1 if it grows with the number of prompts, else 0.
        sequence: 1 if it grows with the number of tokens, else 0.
        plus: See above.
    """

    factor: int
    batch: int = 0
    sequence: int = 0
    plus: int = 0


class TokenSizes:
    """The sizes of a graph's values for any number of prompts and tokens.

    Args:
        model: A hooked model that starts from tokens.
    """

    def __init__(self, model: ir.Model) -> None:
        self._runs: list[Mapping[ir.Value, Known]] = [
            Sizes(model, Path("this graph"), _UNBOUNDED, {"batch": batch, "sequence": length}, exact=True).known
            for batch, length in _RUNS
        ]

    def of(self, value: ir.Value) -> list[Size] | None:
        """The sizes of a value; None where they follow no simple rule.

        Args:
            value: A value of the graph.
        """
        shapes = [run[value].shape if value in run else None for run in self._runs]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes) or len({len(shape) for shape in known}) > 1:
            return None
        found = [_rule(numbers) for numbers in zip(*known, strict=True)]
        told = [size for size in found if size is not None]
        return told if len(told) == len(found) else None


def _rule(numbers: Sequence[int]) -> Size | None:
    """The rule that gives these numbers in ``_RUNS``."""
    if len(set(numbers)) == 1:
        return Size(numbers[0])
    for batch, sequence in ((1, 0), (0, 1), (1, 1)):
        units = [b**batch * s**sequence for b, s in _RUNS]
        factor, rest = divmod(numbers[0], units[0])
        if not rest and [factor * unit for unit in units] == list(numbers):
            return Size(factor, batch, sequence)
        plus = numbers[0] - units[0]
        if [unit + plus for unit in units] == list(numbers):
            return Size(1, batch, sequence, plus)
    return None


def take_sizes_of(model: ir.Model, residual: ir.Value, sizes: TokenSizes, results: Iterable[ir.Value]) -> None:
    """Lets a graph read the numbers of prompts and tokens off a residual stream in place of the tokens, in place.

    Args:
        model: A model whose blocks read ``residual`` already, and which still has the nodes from the tokens on.
        residual: An input [b, p, d_model].
        sizes: The sizes of its values, found before it was changed.
        results: What is wanted of it.

    Raises:
        InputError: A result depends on the tokens themselves, and not through the residual stream alone.
    """
    required = {value for value in model.graph.inputs if value.name not in model.graph.initializers}
    made = _Made(model.graph, residual)
    for node in _size_readers(required - {residual}, results):
        if node.op_type == "CastLike":
            node.replace_input_with(1, made.like(node))
            continue
        source, out = node.inputs[0], node.outputs[0]
        told = None if source is None else sizes.of(source)
        if told is None:
            raise _refusal(node)
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else len(told)
        new = made.count(told) if node.op_type == "Size" else made.shape(told[start:end])
        new.type = out.type
        out.replace_all_uses_with(new)
    made.install()


def _size_readers(tokens: set[ir.Value], results: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes on the way to results that read only sizes, or a type, of what is computed from tokens.

    Raises InputError where a result needs more of it.
    """
    reached, open_ends = set(tokens), list(tokens)
    while open_ends:
        for node, place in open_ends.pop().uses():
            if node.op_type in _READ_SIZES or (node.op_type == "CastLike" and place == 1):
                continue
            found = [output for output in node.outputs if output not in reached]
            reached.update(found)
            open_ends.extend(found)
    readers: dict[ir.Node, None] = {}
    seen: set[ir.Node] = set()
    waiting = [maker for value in results if (maker := value.producer()) is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for place, value in enumerate(node.inputs):
            if value is None:
                continue
            if value in reached and (node.op_type in _READ_SIZES or (node.op_type == "CastLike" and place == 1)):
                readers[node] = None
            elif value in reached:
                raise _refusal(node)
            elif (maker := value.producer()) is not None:
                waiting.append(maker)
    return list(readers)


def _refusal(node: ir.Node) -> InputError:
    """The error for a node that needs more of the tokens than there is in a residual stream."""
    return InputError(
        f"this model cannot start at a layer: {node.op_type} {node.name!r} of a later block reads more of the tokens than the "
        "residual stream holds. Run it from the tokens, with an intervention at hook_resid_pre."
    )


class _Made:
    """Nodes that compute sizes from a residual stream."""

    def __init__(self, graph: ir.Graph, residual: ir.Value) -> None:
        self._graph, self._residual = graph, residual
        self._tape = Tape()
        self._units: dict[tuple[int, int], ir.Value] = {}

    def _constant(self, number: int) -> ir.Value:
        return integers(self._tape, [number], f"{self._residual.name}/sizes/{len(self._tape.initializers)}")

    def _unit(self, batch: int, sequence: int) -> ir.Value:
        """The number of prompts, of tokens, or of all tokens of all prompts, int64 [1]."""
        if (batch, sequence) not in self._units:
            parts = [
                self._tape.op("Shape", [self._residual], {"start": axis, "end": axis + 1})
                for axis, wanted in enumerate((batch, sequence))
                if wanted
            ]
            self._units[batch, sequence] = parts[0] if len(parts) == 1 else self._tape.op("Mul", parts)
        return self._units[batch, sequence]

    def _size(self, size: Size) -> ir.Value:
        if not size.batch and not size.sequence:
            return self._constant(size.factor + size.plus)
        found = self._unit(size.batch, size.sequence)
        if size.factor != 1:
            found = self._tape.op("Mul", [found, self._constant(size.factor)])
        return found if not size.plus else self._tape.op("Add", [found, self._constant(size.plus)])

    def shape(self, sizes: Sequence[Size]) -> ir.Value:
        """Sizes as a tensor, int64 [rank]."""
        if not sizes:
            return integers(self._tape, [], f"{self._residual.name}/sizes/{len(self._tape.initializers)}")
        return self._tape.op("Concat", [self._size(size) for size in sizes], {"axis": 0})

    def count(self, sizes: Sequence[Size]) -> ir.Value:
        """The product of sizes, a scalar."""
        if not sizes:
            return integers(self._tape, 1, f"{self._residual.name}/sizes/{len(self._tape.initializers)}")
        return self._tape.op("ReduceProd", [self.shape(sizes)], {"keepdims": 0})

    def like(self, node: ir.Node) -> ir.Value:
        """Something of the type that a CastLike gives."""
        kind = None if node.inputs[1] is None else node.inputs[1].dtype or node.outputs[0].dtype
        if kind is None:
            raise _refusal(node)
        name = f"{self._residual.name}/sizes/{len(self._tape.initializers)}"
        return self._tape.initializer(ir.tensor(np.zeros((), kind.numpy()), name=name), name=name)

    def install(self) -> None:
        """Puts the nodes before all others."""
        install(self._graph, self._tape, numbered(f"{self._residual.name}/sizes/"), after=self._residual)
