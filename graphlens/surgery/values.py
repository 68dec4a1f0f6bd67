"""The values of any graph by their names: which of them a run computes, and what shell patterns match."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphlens.errors import InputError

_COMPARED = 5_000  # names that a name is compared with to find the nearest


@dataclass(frozen=True)
class Values:
    """The named values of a model.

    Attributes:
        computed: What nodes of the main graph compute, in their order.
        inner: Names of values inside branches, loops and functions -> where that is: "the branch then_branch of node
            'x'". A run cannot return them.
        constant: Names of the inputs and weights of the main graph -> "an input", "a weight".
    """

    computed: Mapping[str, ir.Value]
    inner: Mapping[str, str] = field(repr=False)
    constant: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, model: ir.Model) -> Values:
        """Those of a model.

        Args:
            model: Any model whose structure was checked.
        """
        computed = {value.name: value for node in model.graph for value in node.outputs if value.name}
        constant = {str(value.name): "an input" for value in model.graph.inputs}
        constant |= {name: "a weight (an initializer)" for name in model.graph.initializers if name not in constant}
        inner: dict[str, str] = {}
        for function in model.functions.values():
            _note(function, f"the function {function.domain}::{function.name}", inner)
        _note_subgraphs(model.graph, inner)
        return cls(computed, inner, constant)

    def matching(self, patterns: Iterable[str]) -> list[str]:
        """The computed values that shell patterns match, in the order in which they are computed.

        Args:
            patterns: ``*``, ``?`` and ``[...]`` as in a shell, except that ``*`` also matches dots and slashes. A value of
                exactly that name is meant by its name.

        Raises:
            InputError: One matches none; it names the nearest, or says what the pattern matches instead.
        """
        picked: set[str] = set()
        for pattern in patterns:
            found = {pattern} if pattern in self.computed else set(fnmatch.filter(self.computed, pattern))
            if not found:
                raise self.unknown(pattern)
            picked |= found
        return [name for name in self.computed if name in picked]

    def unknown(self, pattern: str) -> InputError:
        """The error for a name or pattern that no computed value has.

        Args:
            pattern: What was asked for.
        """
        for others, end in (
            (self.inner, "and no run returns what is inside there. Expose what goes in or comes out of it"),
            (
                self.constant,
                "and not computed: the file itself holds it, or you feed it. Expose a value that a node computes",
            ),
        ):
            name = pattern if pattern in others else next(iter(fnmatch.filter(others, pattern)), None)
            if name is not None:
                inside = "inside " if others is self.inner else ""
                what = f"{name!r} is" if name == pattern else f"the pattern {pattern!r} matches only {name!r}, which is"
                return InputError(f"{what} {inside}{others[name]}, {end}.")
        near = self._nearest(pattern)
        hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
        return InputError(f"{pattern!r} matches no value of this model.{hint} See them all with --list.")

    def _nearest(self, pattern: str) -> list[str]:
        """The computed values whose names are most like a pattern."""
        plain = pattern.replace("*", "").replace("?", "")
        holding = [name for name in self.computed if plain and plain.lower() in name.lower()]
        names = list(self.computed)
        spread = names[:: max(1, len(names) // _COMPARED)]
        return holding[:3] or difflib.get_close_matches(plain[:200], spread, n=3, cutoff=0.3)


def _note_subgraphs(graph: ir.Graph | ir.Function, found: dict[str, str]) -> None:
    """Notes the values in the subgraphs of a graph's nodes."""
    for node in graph:
        for attribute in node.attributes.values():
            graphs: Iterable[ir.Graph] = ()
            if attribute.type == ir.AttributeType.GRAPH:
                graphs = [attribute.as_graph()]
            elif attribute.type == ir.AttributeType.GRAPHS:
                graphs = attribute.as_graphs()
            for inner in graphs:
                _note(inner, f"{attribute.name} of the {node.op_type} {node.name!r}", found)


def _note(graph: ir.Graph | ir.Function, where: str, found: dict[str, str]) -> None:
    """Notes the values of a subgraph or function, and of those inside it."""
    found |= {value.name: where for node in graph for value in node.outputs if value.name}
    _note_subgraphs(graph, found)
