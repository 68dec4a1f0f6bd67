"""Gradients by rewriting the file: a hooked graph that also returns d(seed . logits)/d(hook) for hook points asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

import onnx_ir as ir

from graphlens.errors import InputError, warn
from graphlens.file.io_names import DENSE, LOGITS, SEED, SEEDS, gradient_output
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import unknown_hook
from graphlens.file.sae_names import ERROR
from graphlens.surgery.graph import finish, install, numbered, read_manifest, values_by_name
from graphlens.surgery.ranks import fill_in
from graphlens.surgery.rules import Builder, Gradient, Rule, rule_of
from graphlens.surgery.seeds import add_seed
from graphlens.surgery.splice import splice

_STRAIGHT_THROUGH = "graphlens.straight_through"  # among the metadata of a graph in memory


def differentiate(
    model: ir.Model, wrt: Iterable[str], of: str = LOGITS, seed: str = DENSE, held: Iterable[str] = ()
) -> ir.Model:
    """A copy that also returns the gradients with respect to hook points, as ``<hook>_grad``.

    What is differentiated is the sum of ``of`` times a seed, which a run feeds. Gradients have the shape and dtype of
    the activation and are total: through everything that depends on it. Where nothing does they are 0, and a warning
    says so. Layers before the earliest hook point are not differentiated, weights never. The hook map gets the gradients
    too, in the order in which they are computed, so that they can be spliced as hook points are.

    Where a graph rounds (it is quantised), gradients go straight through: they are those of the products with the
    dequantised weights. ``straight_through`` tells where that was so.

    Args:
        model: A hooked model.
        wrt: Hook points, or one.
        of: ``logits`` or a hook point.
        seed: How the seed, which is the gradient with respect to ``of``, is fed.

            - ``"dense"``: the input ``gradient_seed``, shaped like ``of``.
            - ``"sparse"`` (of logits): ``gradient_seed`` [b, m, k] for the tokens ``gradient_seed_tokens`` int64
              [b, m, k] at the positions ``gradient_seed_positions`` int64 [b, m], all others being 0. No array of
              [b, pos, vocabulary] is made.
            - ``"loss"`` (of logits): the seed is that of a sum over positions of ``gradient_seed`` [b, pos] times the
              cross-entropy of ``gradient_seed_tokens`` int64 [b, pos] there.
        held: Hook points that gradients take for constants, as if nothing had computed them: attention patterns, say.

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model has no hook point of that name.
        InputError: A hook point holds integers; an operator on the way has no derivative (the hook point behind it is
            named); there is no such ``of`` or ``seed``; or the model is differentiated already.
    """
    manifest = read_manifest(model)
    fixed = tuple(held)
    asked = _checked(manifest, wrt, of, seed, fixed)
    taken = {str(value.name) for value in model.graph.inputs}
    if SEED in taken or (of == LOGITS and LOGITS not in values_by_name(model)):
        why = "it is differentiated already" if SEED in taken else "it has no logits: name a hook point as of"
        raise InputError(f"this graph cannot be differentiated so: {why}.")
    model = _apart(model, manifest)
    fill_in(model)
    manifest = read_manifest(model)
    graph, values = model.graph, values_by_name(model)
    targets = {name: values[manifest.hooks[name].value] for name in asked}
    result = values[LOGITS if of == LOGITS else manifest.hooks[of].value]
    assert result.type is not None
    b = Builder(result.type.dtype)
    end, given = add_seed(b, model, manifest, result, seed, set(targets.values()))
    constants = {
        values[entry.value] for name, entry in manifest.hooks.items() if name.endswith(f".{ERROR}") or name in fixed
    }
    backward = _Backward(b, graph, set(targets.values()), constants, _nearest(manifest.hooks, graph))
    found = backward.run(end, given)
    named: dict[ir.Value, str] = {}
    entries = dict(manifest.hooks)
    for name, value in reversed(targets.items()):  # the order in which they are computed
        if value not in named:
            gradient = found.get(value)
            if gradient is None:
                warn(f"{of!r} does not depend on {name!r}: its gradient is 0.")
                whole = b.op("Expand", b.constant(0.0, value), b.shape_of(value))
            else:
                whole = gradient.value
            whole.name, whole.shape, whole.type = gradient_output(name), value.shape, value.type
            named[value] = gradient_output(name)
            graph.outputs.append(whole)
        entries[gradient_output(name)] = replace(manifest.hooks[name], value=named[value])
    install(graph, b.tape, numbered("gradient/"), lambda node, place: f"{node.name}_{place}")
    if backward.rounded:
        model.metadata_props[_STRAIGHT_THROUGH] = json.dumps(backward.rounded)
    return finish(model, manifest.with_hooks(entries), "the gradient graph")


def straight_through(model: ir.Model) -> Mapping[str, int]:
    """What the gradients of a graph passed as if it did not round: see ``rules.quantised``.

    Args:
        model: What ``differentiate`` gave.

    Returns:
        Operator -> how many of its nodes; empty where every gradient is the derivative itself.
    """
    found: dict[str, int] = json.loads(model.metadata_props.get(_STRAIGHT_THROUGH, "{}"))
    return found


def _apart(model: ir.Model, manifest: Manifest) -> ir.Model:
    """A copy in which no gradient rule reads the value of a hook point that its own node computed.

    A Python hook that is spliced in there later changes the value, and the rule needs the one that the node gave. So an
    Identity is put between the two.
    """
    values = values_by_name(model)
    first: dict[str, str] = {}
    for name, entry in manifest.hooks.items():
        first.setdefault(entry.value, name)
    read = [name for value, name in first.items() if _is_read_backward(values[value].producer())]
    return splice(model, {name: lambda value, scope: scope.op("Identity", [value]) for name in read}, changing=False)


def _is_read_backward(node: ir.Node | None) -> bool:
    """Whether a gradient rule reads what a node gave."""
    found = None if node is None else rule_of(node)
    return found is not None and found.reads_output


def _checked(manifest: Manifest, wrt: Iterable[str], of: str, seed: str, held: tuple[str, ...]) -> list[str]:
    """The hook points asked for, in firing order."""
    names = list(manifest.hooks)
    asked = {wrt} if isinstance(wrt, str) else set(wrt)
    for name in (*asked, *([] if of == LOGITS else [of])):
        if name not in manifest.hooks:
            raise unknown_hook(name, names, manifest.config.n_layers)
        if not manifest.hooks[name].dtype.startswith("float"):
            raise InputError(f"{name!r} holds {manifest.hooks[name].dtype}: there is no gradient with respect to it.")
    for name in held:
        if name not in manifest.hooks:
            raise unknown_hook(name, names, manifest.config.n_layers)
    if not asked:
        raise InputError("no hook point was asked for: there is nothing to differentiate.")
    if seed not in SEEDS:
        raise InputError(f"seed={seed!r}: it is one of {', '.join(map(repr, SEEDS))}.")
    if seed != DENSE and of != LOGITS:
        raise InputError(f"a {seed} seed is of the logits, not of {of!r}.")
    return [name for name in names if name in asked]


class _Backward:
    """One backward pass over a graph.

    The gradient of a target has the target's full shape and is the output of a node of its own, so that it can be
    returned, and edited for all that is computed from it.
    """

    def __init__(
        self,
        b: Builder,
        graph: ir.Graph,
        targets: set[ir.Value],
        constants: set[ir.Value],
        nearest: dict[ir.Node, str],
    ) -> None:
        self._b, self._graph, self._targets, self._nearest = b, graph, targets, nearest
        self._constants = (
            constants  # what no gradient passes, though it is computed: the error terms of SAEs, what is held
        )
        self.rounded: dict[str, int] = {}  # operator that a gradient went straight through -> how many of its nodes
        self._pending: dict[ir.Value, list[Gradient]] = {}
        self._found: dict[ir.Value, Gradient] = {}

    def run(self, end: ir.Value, seed: ir.Value) -> dict[ir.Value, Gradient]:
        """The gradients of all values on the way from the targets to ``end``."""
        reached = set(self._targets)
        for node in self._graph:
            if any(value in reached for value in node.inputs):
                reached.update(value for value in node.outputs if value not in self._constants)
        if end in reached:
            self._pending[end] = [Gradient(seed)]
        for node in reversed(list(self._graph)):
            arrived = [self._total(output) for output in node.outputs]
            needs = [value is not None and value in reached for value in node.inputs]
            if not self._constants.isdisjoint(node.outputs):
                continue
            if not any(arrived) or not any(needs):
                continue
            found = self._rule(node)
            gradients = found(self._b, node, arrived, needs)
            if found.straight_through and any(gradients):
                self.rounded[node.op_type] = self.rounded.get(node.op_type, 0) + 1
            for value, gradient in zip(node.inputs, gradients, strict=True):
                if value is not None and gradient is not None and value in reached:
                    self._pending.setdefault(value, []).append(gradient)
        for value in list(self._pending):  # inputs of the graph
            self._total(value)
        return self._found

    def _rule(self, node: ir.Node) -> Rule:
        """The rule of a node's operator."""
        found = rule_of(node)
        if found is not None:
            return found
        where = f" (at or after {self._nearest[node]!r})" if node in self._nearest else ""
        kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise InputError(f"the operator {kind} of node {node.name!r}{where} has no derivative here.")

    def _total(self, value: ir.Value) -> Gradient | None:
        """The sum of what arrived at a value, which is its gradient."""
        terms = self._pending.pop(value, [])
        if not terms:
            return None
        first = next((term for term in terms if term.full), terms[0])
        total = first.value
        for term in terms:
            if term is not first:
                total = self._b.op("Add", total, term.value)
        gradient = Gradient(total, first.full)
        if value in self._targets:
            gradient = Gradient(self._b.op("Identity", self._b.whole(gradient, value)))
        self._found[value] = gradient
        return gradient


def _nearest(hooks: Mapping[str, HookEntry], graph: ir.Graph) -> dict[ir.Node, str]:
    """For an error: the last hook point at or before each node."""
    named = {entry.value: name for name, entry in hooks.items()}
    found, last = {}, None
    for node in graph:
        for output in node.outputs:
            last = named.get(str(output.name), last)
        if last is not None:
            found[node] = last
    return found
