"""Gradients by rewriting the file: a hooked graph that also returns d(seed . logits)/d(hook) for hook points asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.errors import InputError
from graphlens.file.io_names import DENSE, LOSS, SEED, SEED_POSITIONS, SEED_TOKENS, SEEDS, SPARSE, gradient_output
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import UNEMBEDDED, unknown_hook
from graphlens.surgery.graph import LOGITS, ensure_hooks_resolve, read_manifest, values_by_name, write_manifest
from graphlens.surgery.rules import CONSTANT, READS_ITS_OUTPUT, RULES, Builder, Gradient, Rule, dims
from graphlens.surgery.splice import splice


def differentiate(model: ir.Model, wrt: Iterable[str], of: str = LOGITS, seed: str = DENSE) -> ir.Model:
    """A copy that also returns, as ``<hook>_grad``, d(seed . of)/d(hook) for every hook point in ``wrt``.

    ``of`` is ``logits`` or a hook point. How the seed, which is the gradient with respect to ``of``, is fed:

    - ``"dense"``: the input ``gradient_seed``, shaped like ``of``.
    - ``"sparse"`` (of logits): ``gradient_seed`` [b, m, k] for the tokens ``gradient_seed_tokens`` int64 [b, m, k] at the
      positions ``gradient_seed_positions`` int64 [b, m], all others being 0. No array of [b, pos, vocabulary] is made.
    - ``"loss"`` (of logits): the seed is that of a sum over positions of ``gradient_seed`` [b, pos] times the
      cross-entropy of ``gradient_seed_tokens`` int64 [b, pos] there.

    Gradients have the shape and dtype of the activation and are total: through everything that depends on it. Where
    nothing does they are 0. Layers before the earliest hook point are not differentiated, weights never. The hook map
    gets the gradients too, in the order in which they are computed, so that they can be spliced as hook points are.
    Raises UnknownHookPoint, and InputError for hook points of integers, operators without a derivative (naming the hook
    point behind it), and an ``of`` or ``seed`` that is not there.
    """
    manifest = read_manifest(model)
    asked = _checked(manifest, wrt, of, seed)
    taken = {str(value.name) for value in model.graph.inputs}
    if SEED in taken or (of == LOGITS and LOGITS not in values_by_name(model)):
        why = "it is differentiated already" if SEED in taken else "it has no logits: name a hook point as of"
        raise InputError(f"this graph cannot be differentiated so: {why}.")
    model = _with_shapes(_apart(model, manifest))
    manifest = read_manifest(model)
    graph, values = model.graph, values_by_name(model)
    targets = {name: values[manifest.hooks[name].value] for name in asked}
    logits = end = values[LOGITS if of == LOGITS else manifest.hooks[of].value]
    assert end.type is not None
    b = Builder(end.type.dtype)
    if seed == SPARSE:
        end = values[manifest.hooks[UNEMBEDDED].value]
        given, spread = _sparse_seed(b, graph, end, logits)
        if logits in targets.values() or not _is_product(end, logits):
            # Something between the unembedding and the logits has a derivative of its own, or a hook.
            end, given = logits, spread()
    elif seed == LOSS:
        given = _loss_seed(b, graph, logits)
    else:
        given = ir.Value(name=SEED, shape=end.shape, type=end.type)
        graph.inputs.append(given)
    backward = _Backward(b, graph, set(targets.values()), _nearest(manifest.hooks, graph))
    found = backward.run(end, given)
    named: dict[ir.Value, str] = {}
    entries = dict(manifest.hooks)
    for name, value in reversed(targets.items()):  # the order in which they are computed
        if value not in named:
            gradient = found.get(value)
            if gradient is None:
                warnings.warn(f"{of!r} does not depend on {name!r}: its gradient is 0.", stacklevel=2)
                whole = b.op("Expand", b.constant(0.0, value), b.shape_of(value))
            else:
                whole = gradient.value
            whole.name, whole.shape, whole.type = gradient_output(name), value.shape, value.type
            named[value] = gradient_output(name)
            graph.outputs.append(whole)
        entries[gradient_output(name)] = replace(manifest.hooks[name], value=named[value])
    _install(b, graph)
    write_manifest(model, manifest.with_hooks(entries))
    return ensure_hooks_resolve(model, "the gradient graph")


def _apart(model: ir.Model, manifest: Manifest) -> ir.Model:
    """A copy in which no rule reads what it gave at a hook point: a Python hook spliced there later changes that."""
    values = values_by_name(model)
    first: dict[str, str] = {}
    for name, entry in manifest.hooks.items():
        first.setdefault(entry.value, name)
    read = [
        name
        for value, name in first.items()
        for node in [values[value].producer()]
        if node is not None and node.op_type in READS_ITS_OUTPUT
    ]
    return splice(model, {name: lambda value, scope: scope.op("Identity", [value]) for name in read})


def _with_shapes(model: ir.Model) -> ir.Model:
    """The model with the shapes and types that its edits left out, in place."""
    if any(value.shape is None or value.type is None for node in model.graph for value in node.outputs):
        # Inference reads no weights, and asks for no more than their shapes.
        common_passes.ShapeInferencePass()(model)
    return model


def _checked(manifest: Manifest, wrt: Iterable[str], of: str, seed: str) -> list[str]:
    """The hook points asked for, in firing order."""
    names = list(manifest.hooks)
    asked = {wrt} if isinstance(wrt, str) else set(wrt)
    for name in (*asked, *([] if of == LOGITS else [of])):
        if name not in manifest.hooks:
            raise unknown_hook(name, names, manifest.config.n_layers)
        if not manifest.hooks[name].dtype.startswith("float"):
            raise InputError(f"{name!r} holds {manifest.hooks[name].dtype}: there is no gradient with respect to it.")
    if not asked:
        raise InputError("no hook point was asked for: there is nothing to differentiate.")
    if seed not in SEEDS:
        raise InputError(f"seed={seed!r}: it is one of {', '.join(map(repr, SEEDS))}.")
    if seed != DENSE and of != LOGITS:
        raise InputError(f"a {seed} seed is of the logits, not of {of!r}.")
    return [name for name in names if name in asked]


def _sparse_seed(
    b: Builder, graph: ir.Graph, end: ir.Value, logits: ir.Value
) -> tuple[ir.Value, Callable[[], ir.Value]]:
    """The gradient [b, pos, d_model] with respect to what the unembedding reads, from seeds of few tokens; and what makes
    that of the logits [b, pos, V], should anybody ask for it."""
    kinds = {
        SEED_POSITIONS: (("seed_batch", "seeds"), ir.DataType.INT64),
        SEED_TOKENS: (("seed_batch", "seeds", "seed_tokens"), ir.DataType.INT64),
        SEED: (("seed_batch", "seeds", "seed_tokens"), end.type.dtype if end.type is not None else ir.DataType.FLOAT),
    }
    positions, tokens, seed = (
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)) for name, (shape, dtype) in kinds.items()
    )
    graph.inputs.extend([positions, tokens, seed])
    weight, by_row = _unembedding(end)
    rows = b.op("Gather", weight, tokens, axis=0 if by_row else 1)  # [b, m, k, D], or [D, b, m, k]
    if not by_row:
        rows = b.op("Transpose", rows, perm=[1, 2, 3, 0])
    weighted = b.op("Mul", rows, b.op("Unsqueeze", seed, b.constant([3])))
    summed = b.op("ReduceSum", weighted, b.constant([2]), keepdims=0)  # [b, m, D]
    length = b.op("Shape", end, start=1, end=2)
    places = b.op("Range", b.constant(0), b.op("Squeeze", length), b.constant(1))
    here = b.op("Equal", b.op("Unsqueeze", places, b.constant([0, 2])), b.op("Unsqueeze", positions, b.constant([1])))
    assert end.type is not None
    placed = b.op("Cast", here, to=int(end.type.dtype))  # [b, pos, m]

    def spread() -> ir.Value:
        width = b.constant(dims(logits)[-1])
        # ONNX Runtime has no OneHot of every float: of integers, then cast.
        ones = b.op("OneHot", tokens, width, b.constant([0, 1]), axis=-1)  # [b, m, k, V]
        chosen = b.op("Cast", ones, to=int(end.type.dtype))  # type: ignore[union-attr]
        every = b.op(
            "ReduceSum", b.op("Mul", chosen, b.op("Unsqueeze", seed, b.constant([3]))), b.constant([2]), keepdims=0
        )
        return b.op("MatMul", placed, every)

    return b.op("MatMul", placed, summed), spread  # [b, pos, m] @ [b, m, D]


def _is_product(end: ir.Value, logits: ir.Value) -> bool:
    """Whether the logits are ``end`` times one matrix, perhaps plus a constant: nothing else in between."""
    value, products = logits, 0
    while value is not end:
        node = value.producer()
        if node is None or node.op_type not in ("Gemm", "MatMul", "Add", "Reshape", "Identity"):
            return False
        products += node.op_type in ("Gemm", "MatMul")
        inputs = [other for other in node.inputs if other is not None]
        if node.op_type == "Add":
            inputs = [other for other in inputs if not other.is_initializer() or other.is_graph_input()]
            if len(inputs) != 1:
                return False
        value = inputs[0]
    return products == 1


def _unembedding(end: ir.Value) -> tuple[ir.Value, bool]:
    """(the unembedding matrix, whether a token is a row of it), from the product that reads ``end``."""
    open_ends = [end]
    while open_ends:
        for node, index in open_ends.pop().uses():
            if node.op_type in ("Gemm", "MatMul") and index == 0 and node.inputs[1] is not None:
                turned = node.attributes["transB"].as_int() if "transB" in node.attributes else 0
                return node.inputs[1], bool(turned)
            if node.op_type in ("Reshape", "Identity"):
                open_ends.extend(node.outputs)
    raise InputError(
        "the unembedding is no matrix product here, so seeds cannot be sparse: give them as [b, pos, vocabulary]."
    )


def _loss_seed(b: Builder, graph: ir.Graph, logits: ir.Value) -> ir.Value:
    """The gradient of a weighted sum of cross-entropies: (softmax - one at the target) times the weight."""
    assert logits.type is not None
    shape = ir.Shape(["seed_batch", "seed_sequence"])
    targets = ir.Value(name=SEED_TOKENS, shape=shape, type=ir.TensorType(ir.DataType.INT64))
    weights = ir.Value(name=SEED, shape=shape, type=logits.type)
    graph.inputs.extend([targets, weights])
    ones = b.op("OneHot", targets, b.constant(dims(logits)[-1]), b.constant([0, 1]), axis=-1)
    hit = b.op("Cast", ones, to=int(logits.type.dtype))
    apart = b.op("Sub", b.op("Softmax", logits, axis=-1), hit)
    return b.op("Mul", apart, b.op("Unsqueeze", weights, b.constant([2])))


class _Backward:
    """One backward pass over a graph. Gradients of ``targets`` are whole, and nodes of their own that later ones read."""

    def __init__(self, b: Builder, graph: ir.Graph, targets: set[ir.Value], nearest: dict[ir.Node, str]) -> None:
        self._b, self._graph, self._targets, self._nearest = b, graph, targets, nearest
        self._pending: dict[ir.Value, list[Gradient]] = {}
        self._found: dict[ir.Value, Gradient] = {}

    def run(self, end: ir.Value, seed: ir.Value) -> dict[ir.Value, Gradient]:
        """The gradients of all values on the way from the targets to ``end``."""
        reached = set(self._targets)
        for node in self._graph:
            if any(value in reached for value in node.inputs):
                reached.update(node.outputs)
        if end in reached:
            self._pending[end] = [Gradient(seed)]
        for node in reversed(list(self._graph)):
            arrived = [self._total(output) for output in node.outputs]
            needs = [value is not None and value in reached for value in node.inputs]
            if not any(arrived) or not any(needs) or node.op_type in CONSTANT:
                continue
            for value, gradient in zip(node.inputs, self._rule(node)(self._b, node, arrived, needs), strict=True):
                if value is not None and gradient is not None and value in reached:
                    self._pending.setdefault(value, []).append(gradient)
        for value in list(self._pending):  # inputs of the graph
            self._total(value)
        return self._found

    def _rule(self, node: ir.Node) -> Rule:
        if node.op_type in RULES and node.domain in ("", "ai.onnx"):
            return RULES[node.op_type]
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


def _install(b: Builder, graph: ir.Graph) -> None:
    """Puts the builder's nodes and constants after the forward ones, under names of their own."""
    for value in b.tape.initializers:
        graph.initializers[str(value.name)] = value
    for index, node in enumerate(b.tape.nodes):
        node.name = f"gradient/{node.op_type}_{index}"
        for place, output in enumerate(node.outputs):
            output.name = output.name or f"gradient/{node.op_type}_{index}_{place}"
    graph.extend(list(b.tape.nodes))
