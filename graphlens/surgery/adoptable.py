"""What kind of network a foreign file holds, and why it cannot be adopted where it cannot: a sentence for each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from graphlens.errors import ModelFileError

STILL = "`graphlens expose FILE --like GLOB -o OUT` still makes any of its values readable."
"""What can be done with a file that cannot be adopted."""
STANDARD = frozenset({"", "ai.onnx"})
"""The names of ONNX's own domain."""
_FUSED = """
    Attention DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention GroupQueryAttention
    LongformerAttention MultiHeadAttention PackedAttention PackedMultiHeadAttention PagedAttention QAttention
    QOrderedAttention SparseAttention
"""
FUSED_ATTENTION = frozenset(_FUSED.split())
"""Operators that compute a whole attention, whatever their domain."""
_CONVOLUTIONS = frozenset(
    {"Conv", "ConvInteger", "ConvTranspose", "FusedConv", "NhwcConv", "NhwcFusedConv", "QLinearConv"}
)
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_REPEATING = frozenset({"Loop", "Scan", "SequenceMap"})
_STATE_SPACE = frozenset({"CausalConvWithState", "LinearAttention", "SelectiveScan"})
_PRODUCTS: Mapping[str, tuple[int, int]] = {  # operator -> the places of its two operands
    **dict.fromkeys(("Einsum", "FusedMatMul", "MatMul", "MatMulInteger", "TransposeMatMul"), (0, 1)),
    **{"QLinearMatMul": (0, 3), "MatMulIntegerToFloat": (0, 1)},
}
# What stands between a product of queries and keys and its Softmax, or between that and the product with values.
_PASSED = """
    Add Cast CastLike Clip DequantizeLinear Div Dropout DynamicQuantizeLinear Identity Max Min Mul QuantizeLinear
    Reshape Slice Squeeze Sub Tanh Transpose Unsqueeze Where
"""
_BETWEEN = frozenset(_PASSED.split())
_CORES = frozenset({"Softmax", "QLinearSoftmax", "BiasSoftmax", "BiasSplitSoftmax"})
_FAR = 24  # nodes that are followed from a Softmax: mask, scale, cap and their casts are fewer


class NotAdoptable(ModelFileError):
    """An ONNX file that is in order and holds no transformer whose hook points graphlens can find."""


@dataclass(frozen=True)
class Core:
    """Where a graph computes an attention.

    Attributes:
        node: The Softmax, or the fused operator.
        query: What is multiplied by the keys.
        key: The keys.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value


@dataclass(frozen=True)
class Anatomy:
    """What a graph is made of, as far as that tells which kind of network it is.

    Attributes:
        operators: How many nodes there are of each operator, ``domain::name`` outside of ONNX's own domain; branches and
            functions included.
        cores: The attentions of the main graph, in its order.
        hidden_cores: How many Softmax and fused attentions lie in branches of an If and in bodies of loops.
        reads: Value of the main graph -> the inputs whose content it depends on, a bit for each.
    """

    operators: Mapping[str, int]
    cores: tuple[Core, ...]
    hidden_cores: int
    reads: Mapping[ir.Value, int] = field(repr=False)


def anatomy(model: ir.Model) -> Anatomy:
    """Looks at what a graph is made of, in time linear in its nodes.

    Args:
        model: Any model whose structure was checked.
    """
    operators: Counter[str] = Counter()
    hidden = 0
    for node, depth in _all_nodes(model):
        operators[shown_operator(node)] += 1
        hidden += depth > 0 and (node.op_type == "Softmax" or node.op_type in FUSED_ATTENTION)
    reads = _reads(model.graph)
    return Anatomy(dict(operators.most_common()), tuple(_cores(model.graph, reads)), hidden, reads)


def shown_operator(node: ir.Node) -> str:
    """An operator as people and this package write it: ``MatMul``, ``com.microsoft::Attention``.

    Args:
        node: A node of the operator.
    """
    return node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs among a node's attributes: the branches of an If, the body of a loop.

    Args:
        node: A node.
    """
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _all_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Every node of a model with how deep it is nested; those of functions count as the graph's own."""
    waiting: list[tuple[Iterable[ir.Node], int]] = [(model.graph, 0), *((each, 0) for each in model.functions.values())]
    while waiting:
        nodes, depth = waiting.pop()
        for node in nodes:
            yield node, depth
            waiting += [(graph, depth + 1) for graph in subgraphs(node)]


def _reads(graph: ir.Graph) -> dict[ir.Value, int]:
    """For each value the inputs whose content it depends on: what is known of their shapes alone does not count."""
    found = {value: 0 if value.name in graph.initializers else 1 << index for index, value in enumerate(graph.inputs)}
    for node in graph:
        bits = 0
        if node.op_type not in ("Shape", "Size"):
            for value in (*node.inputs, *(outer for inner in subgraphs(node) for outer in _outer(inner))):
                bits |= 0 if value is None else found.get(value, 0)
        found.update(dict.fromkeys(node.outputs, bits))
    return found


def _outer(graph: ir.Graph) -> Iterator[ir.Value]:
    """What the nodes of a subgraph read; the values of the graphs around it are among that."""
    for node in graph:
        yield from (value for value in node.inputs if value is not None)
        for inner in subgraphs(node):
            yield from _outer(inner)


def _cores(graph: ir.Graph, reads: Mapping[ir.Value, int]) -> Iterator[Core]:
    """The attentions of a graph: fused ones, and each Softmax between two products of computed values."""
    for node in graph:
        if node.op_type in FUSED_ATTENTION and node.inputs and node.inputs[0] is not None:
            packed = (
                node.op_type in ("Attention", "QAttention") and node.domain not in STANDARD
            )  # the second is a weight
            key = node.inputs[1] if len(node.inputs) > 1 and not packed else None
            yield Core(node, node.inputs[0], node.inputs[0] if key is None else key)
        elif node.op_type in _CORES and node.inputs and node.inputs[0] is not None:
            operands = _product_before(node.inputs[0], reads)
            if operands is not None and _reaches_product(node.outputs[0], reads):
                yield Core(node, *operands)


def _product_before(scores: ir.Value, reads: Mapping[ir.Value, int]) -> tuple[ir.Value, ir.Value] | None:
    """The two operands of the product of computed values that scores come from; None where there is none near."""
    waiting, seen = [scores], set[ir.Node]()
    while waiting and len(seen) < _FAR:
        node = waiting.pop(0).producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _PRODUCTS:
            given = [node.inputs[place] for place in _PRODUCTS[node.op_type] if place < len(node.inputs)]
            pair = [value for value in given if value is not None and reads.get(value)]
            if len(pair) == 2:
                return pair[0], pair[1]
        elif node.op_type in _BETWEEN:
            waiting += [value for value in node.inputs if value is not None and reads.get(value)]
    return None


def _reaches_product(pattern: ir.Value, reads: Mapping[ir.Value, int]) -> bool:
    """True if what a Softmax gives is multiplied, as a matrix, by something that is computed."""
    waiting, seen = [pattern], set[ir.Node]()
    while waiting and len(seen) < _FAR:
        value = waiting.pop(0)
        for node, _ in value.uses():
            if node in seen or len(seen) >= _FAR:
                continue
            seen.add(node)
            if node.op_type in _PRODUCTS:
                others = [node.inputs[place] for place in _PRODUCTS[node.op_type] if place < len(node.inputs)]
                if all(other is not None and reads.get(other, 0) for other in others):
                    return True
            elif node.op_type in _BETWEEN:
                waiting += node.outputs
    return False


# Why a file cannot be adopted


def ensure_adoptable(model: ir.Model, where: str | Path) -> Anatomy:
    """Refuses a file that is no transformer whose hook points could be found, in a sentence that says what it is.

    Nothing is run. That it raises nothing does not yet mean that each hook point is there: matching finds that out.

    Args:
        model: The model as it was read, before its fused operators are expanded.
        where: How an error calls the file.

    Returns:
        What the graph is made of.

    Raises:
        NotAdoptable: (a ModelFileError) It is a convolutional or recurrent network, has no attention, holds its attention
            in branches or loops, attends across from a decoder to an encoder, or holds several networks.
    """
    found = anatomy(model)
    why = obstacle(model, found)
    if why is not None:
        raise NotAdoptable(f"{where}: {why} {STILL}")
    return found


def obstacle(model: ir.Model, found: Anatomy) -> str | None:
    """Why a file cannot be adopted, in a sentence; None where nothing says so before matching.

    Args:
        model: The model.
        found: What it is made of.
    """
    repeating = sorted(_REPEATING & found.operators.keys())
    if repeating:
        return (
            f"it has {_count(found, repeating)}, which {'run' if len(repeating) > 1 else 'runs'} a part of the graph as often "
            "as its data say, so a hook point would have as many values; graphlens adopts graphs without loops."
        )
    if not found.cores and found.hidden_cores:
        return (
            "its attention lies inside the branches of an If: two graphs in one file, as optimum's merged decoders "
            "(decoder_model_merged.onnx) are. Adopt decoder_with_past_model.onnx or model.onnx of the same export instead, "
            "or export without merging (optimum-cli export onnx --no-post-process)."
        )
    if not found.cores:
        return _without_attention(found)
    return _across(model, found) or _several(model, found) or _sound(model)


def _count(found: Anatomy, operators: Sequence[str]) -> str:
    """Operators with how many nodes there are: "53 Conv and 2 LSTM"."""
    return " and ".join(f"{found.operators[name]:,} {name}" for name in operators)


def _without_attention(found: Anatomy) -> str:
    """What a file without attention is."""
    recurrent = sorted(_RECURRENT & found.operators.keys())
    states = sorted(name for name in found.operators if name.rpartition("::")[2] in _STATE_SPACE)
    convolutions = [name for name in found.operators if name.rpartition("::")[2] in _CONVOLUTIONS]
    count = sum(found.operators[name] for name in convolutions)
    transformer = "graphlens adopts transformers, whose hook points are found from their attention."
    if recurrent:
        return (
            f"this is a recurrent network ({_count(found, recurrent)}), and no attention was found in it; {transformer}"
        )
    if states:
        return f"this is a state space model ({_count(found, states)}), and no attention was found in it; {transformer}"
    if count:
        return f"this is a convolutional network ({count:,} {convolutions[0]}), and no attention was found in it; {transformer}"
    softmax = sum(found.operators.get(name, 0) for name in _CORES)
    if not softmax:
        return f"no attention was found in it: it has no Softmax and no fused attention; {transformer}"
    return f"no attention was found in it: none of its {softmax:,} Softmax stands between two products; {transformer}"


def _across(model: ir.Model, found: Anatomy) -> str | None:
    """Why an encoder-decoder cannot be adopted: queries depend on an input that the keys do not depend on."""
    for core in found.cores:
        query, key = found.reads.get(core.query, 0), found.reads.get(core.key, 0)
        if query & ~key and key:
            return (
                f"it attends across, as encoder-decoders do (T5, Whisper, BART, ...): the attention at {core.node.name!r} "
                f"takes its queries from {_inputs(model, query & ~key)} and its keys from {_inputs(model, key)}. graphlens "
                "adopts what attends to its own tokens: adopt the encoder's file, if there is one beside it."
            )
    return None


def _several(model: ir.Model, found: Anatomy) -> str | None:
    """Why a file with several networks side by side cannot be adopted: two attentions read inputs that are disjoint."""
    first = found.reads.get(found.cores[0].query, 0)
    for core in found.cores:
        other = found.reads.get(core.query, 0)
        if first and other and not first & other:
            return (
                f"it holds two transformers side by side, one that reads {_inputs(model, first)} and one that reads "
                f"{_inputs(model, other)} (CLIP, a dual encoder). Export each into a file of its own, and adopt that."
            )
    return None


def _sound(model: ir.Model) -> str | None:
    """Why a network that reads sound cannot be adopted: its input is a float array of three axes in a convolution."""
    sounds = {
        value
        for value in model.graph.inputs
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and value.shape is not None
        and len(value.shape) in (2, 3)
    }
    for node in model.graph:
        if node.op_type == "Conv" and len(node.inputs) > 1 and node.inputs[1] is not None:
            weight = node.inputs[1].shape
            source = _source(node.inputs[0])
            if weight is not None and len(weight) == 3 and source in sounds:
                return (
                    f"its input {source.name!r} is sound or another series ({source.type} {source.shape}) that goes through "
                    "a convolution (an encoder of Whisper or wav2vec2, say). graphlens adopts models of tokens and of images."
                )
    return None


def _source(value: ir.Value | None) -> ir.Value | None:
    """The value that another one is but for its shape and type."""
    for _ in range(_FAR):
        node = None if value is None else value.producer()
        if node is None or node.op_type not in _BETWEEN or not node.inputs:
            return value
        value = node.inputs[0]
    return value


def _inputs(model: ir.Model, bits: int) -> str:
    """The names of some inputs, as text."""
    names = [repr(value.name) for index, value in enumerate(model.graph.inputs) if bits >> index & 1]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# What a user should know of a file that can be adopted

_WITH_PAST = ("decoder_with_past_model", "decoder_model_merged")  # as optimum calls the files of one model


def remarks(model: ir.Model, file: Path) -> tuple[str, ...]:
    """What is worth knowing of a file that can be adopted, a sentence each.

    Args:
        model: The model as it was read.
        file: Its graph file: what lies beside it may belong to the same model.

    Returns:
        Sentences: that another file is this model's other half.
    """
    found = []
    stem = file.stem
    if stem == "decoder_model":
        others = [name for name in _WITH_PAST if (file.parent / f"{name}.onnx").is_file()]
        if others:
            found.append(
                f"{others[0]}.onnx beside it is the same decoder with a KV cache: adopt that one if it is to generate quickly."
            )
    if (file.parent / "encoder_model.onnx").is_file() and stem != "encoder_model":
        found.append(
            "encoder_model.onnx beside it is the other half of this model; it is adopted by itself, if at all."
        )
    return tuple(found)
