"""Graphs that exhaust time or memory, run foreign code, or are no graphs: each where the logits go through it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import onnx
from onnx import TensorProto, helper

from tests.hostile.cases import Variants
from tests.hostile.protos import Change, beside, both, number, through_the_logits

INT, FLOAT, BOOL, STRING = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL, TensorProto.STRING
Nodes = Sequence[onnx.NodeProto]


def value(name: str, kind: int = FLOAT, shape: Sequence[int] | None = ()) -> onnx.ValueInfoProto:
    """A value of a body."""
    return helper.make_tensor_value_info(name, kind, shape)


def loop(times: int, grow: bool = False, double: bool = False) -> Nodes:
    """A Loop that adds 1, or that puts what it carries at its own end."""
    step = [helper.make_node("Add", ["x", "one"], ["y"])]
    if grow:
        step = [helper.make_node("Concat", ["x", "x" if double else "one"], ["y"], axis=0)]
    shape = None if grow else ()
    start = [0.0] if grow else 0.0
    body = helper.make_graph(
        [helper.make_node("Identity", ["condition"], ["again"]), number("one", start, FLOAT), *step],
        "body",
        [value("i", INT), value("condition", BOOL), value("x", FLOAT, shape)],
        [value("again", BOOL), value("y", FLOAT, shape)],
    )
    return [
        number("times", times),
        number("yes", True, BOOL),
        number("start", start, FLOAT),
        helper.make_node("Loop", ["times", "yes", "start"], ["made"], body=body),
    ]


def nested_loops(depth: int, times: int) -> Nodes:
    """Loops in Loops: times ** depth steps."""
    inner: Nodes = [number("one", 1.0, FLOAT), helper.make_node("Add", ["x0", "one"], ["y0"])]
    for level in range(depth):
        inputs = [value(f"i{level}", INT), value(f"c{level}", BOOL), value(f"x{level}")]
        outputs = [value(f"a{level}", BOOL), value(f"y{level}")]
        again = helper.make_node("Identity", [f"c{level}"], [f"a{level}"])
        body = helper.make_graph([again, *inner], f"body{level}", inputs, outputs)
        target = "made" if level == depth - 1 else f"y{level + 1}"
        start = f"x{level + 1}" if level < depth - 1 else "start"
        inner = [helper.make_node("Loop", ["times", "yes", start], [target], body=body)]
    return [number("times", times), number("yes", True, BOOL), number("start", 0.0, FLOAT), *inner]


def scan(steps: int) -> Nodes:
    """A Scan over very many elements."""
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "e"], ["t"]), helper.make_node("Identity", ["t"], ["o"])],
        "body",
        [value("s"), value("e")],
        [value("t"), value("o")],
    )
    return [
        number("size", [steps]),
        helper.make_node("ConstantOfShape", ["size"], ["many"]),
        number("start", 0.0, FLOAT),
        helper.make_node("Scan", ["start", "many"], ["end", "made"], body=body, num_scan_inputs=1),
    ]


def big(op: str, amount: int) -> Nodes:
    """One operator that makes a huge tensor of small ones."""
    one = number("one", [1.0], FLOAT)
    made: Nodes = {
        "ConstantOfShape": [number("size", [amount]), helper.make_node("ConstantOfShape", ["size"], ["made"])],
        "Expand": [one, number("size", [amount]), helper.make_node("Expand", ["one", "size"], ["made"])],
        "Tile": [one, number("size", [amount]), helper.make_node("Tile", ["one", "size"], ["made"])],
        "Range": [
            number("a", 0), number("b", amount), number("c", 1), helper.make_node("Range", ["a", "b", "c"], ["made"]),
        ],
        "Pad": [one, number("size", [0, amount]), helper.make_node("Pad", ["one", "size"], ["made"])],
        "EyeLike": [
            number("size", [amount // 1000, 1000]), helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
            helper.make_node("EyeLike", ["zeros"], ["made"]),
        ],
        "OneHot": [
            number("at", [0]), number("size", amount), number("two", [0.0, 1.0], FLOAT),
            helper.make_node("OneHot", ["at", "size", "two"], ["made"]),
        ],
        "Resize": [
            number("x", [1.0], FLOAT), number("size", [amount]),
            helper.make_node("Resize", ["x", "", "", "size"], ["made"], mode="nearest"),
        ],
        "RandomUniform": [helper.make_node("RandomUniform", [], ["made"], shape=[amount])],
        "TfIdfVectorizer": [
            number("x", [1, 2, 3]),
            helper.make_node(
                "TfIdfVectorizer", ["x"], ["made"], max_gram_length=1, min_gram_length=1, max_skip_count=0, mode="TF",
                ngram_counts=[0], ngram_indexes=[amount], pool_int64s=[1],
            ),
        ],
        "MatMul": [
            number("size", [amount // 1000, 1]), helper.make_node("ConstantOfShape", ["size"], ["column"]),
            number("size2", [1, amount // 1000]), helper.make_node("ConstantOfShape", ["size2"], ["row"]),
            helper.make_node("MatMul", ["column", "row"], ["made"]),
        ],
        "Hardmax": [number("size", [amount]), helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
                    helper.make_node("Hardmax", ["zeros"], ["made"])],
    }[op]  # fmt: skip
    return made


def functions(count: int, calls: int) -> Change:
    """A chain of functions each of which calls the one before so many times, and the logits go through the last."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]

    def apply(proto: onnx.ModelProto) -> None:
        proto.opset_import.append(opsets[1])
        for index in range(count):
            names = ["x", *(f"t{step}" for step in range(calls - 1)), "y"]
            nodes = [
                helper.make_node(f"F{index - 1}", [names[step]], [names[step + 1]], domain="f") for step in range(calls)
            ]
            if index == 0:
                nodes = [helper.make_node("Neg", ["x"], ["y"])]
            proto.functions.append(helper.make_function("f", f"F{index}", ["x"], ["y"], nodes, opsets))
        start = number("start", 1.0, FLOAT)
        last = helper.make_node(f"F{count - 1}", ["start"], ["made"], domain="f")
        through_the_logits(lambda: [start, last], "made")(proto)

    return apply


def foreign(op: str, domain: str) -> Change:
    """A node of foreign code."""

    def apply(proto: onnx.ModelProto) -> None:
        if domain and all(opset.domain != domain for opset in proto.opset_import):
            proto.opset_import.append(helper.make_opsetid(domain, 1))
        nodes = [number("x", 1.0, FLOAT), helper.make_node(op, ["x"], ["made"], domain=domain)]
        through_the_logits(lambda: nodes, "made")(proto)

    return apply


def ifs(depth: int) -> Nodes:
    """Ifs in both branches of Ifs: 2 ** depth graphs."""
    nodes: Nodes = [number("made0", 1.0, FLOAT)]
    for level in range(depth):
        branch = helper.make_graph(nodes, f"branch{level}", [], [value(f"made{level}")])
        nodes = [helper.make_node("If", ["yes"], [f"made{level + 1}"], then_branch=branch, else_branch=branch)]
    return [number("yes", True, BOOL), *nodes, helper.make_node("Identity", [f"made{depth}"], ["made"])]


def chain(length: int) -> Nodes:
    """Very many nodes, one after the other."""
    nodes = [number("n0", 1.0, FLOAT)]
    nodes += [helper.make_node("Neg", [f"n{index}"], [f"n{index + 1}"]) for index in range(length)]
    return [*nodes, helper.make_node("Identity", [f"n{length}"], ["made"])]


def sequence(times: int) -> Nodes:
    """A sequence of tensors."""
    return [
        number("x", [1.0] * 8, FLOAT),
        helper.make_node("SplitToSequence", ["x"], ["parts"], keepdims=1),
        helper.make_node("ConcatFromSequence", ["parts"], ["made"], axis=0),
    ] * times


def doubled(op: str, times: int) -> Nodes:
    """A tensor put at its own end, again and again, with no loop."""
    nodes = [number("d0", [1.0], FLOAT)]
    for step in range(times):
        inputs = [f"d{step}", f"d{step}"]
        nodes.append(helper.make_node(op, inputs, [f"d{step + 1}"], **({"axis": 0} if op == "Concat" else {})))
    return [*nodes, helper.make_node("Identity", [f"d{times}"], ["made"])]


# Graphs that are none


def _each(change: Change, name: str) -> Variants:
    yield from both(f"broken-{name}", change)


def _broken() -> Variants:
    """Structures that no graph may have, or that a reader may trip over."""

    def first(proto: onnx.ModelProto) -> onnx.NodeProto:
        return proto.graph.node[len(proto.graph.node) // 2]

    yield from _each(lambda p: p.graph.node.append(p.graph.node[0]), "node-twice")
    yield from _each(lambda p: p.graph.node.reverse(), "reversed")
    yield from _each(lambda p: first(p).input.__setitem__(0, "nowhere"), "input-of-nothing")
    yield from _each(lambda p: first(p).input.__setitem__(0, first(p).output[0]), "node-of-itself")
    yield from _each(lambda p: first(p).output.__setitem__(0, "elsewhere"), "output-renamed")
    yield from _each(lambda p: first(p).ClearField("output"), "no-output")
    yield from _each(lambda p: first(p).ClearField("input"), "no-input")
    yield from _each(lambda p: first(p).ClearField("op_type"), "no-operator")
    yield from _each(lambda p: setattr(first(p), "op_type", "Nonsense"), "unknown-operator")
    yield from _each(lambda p: p.graph.ClearField("output"), "no-outputs")
    yield from _each(lambda p: p.graph.ClearField("input"), "no-inputs")
    yield from _each(lambda p: p.graph.ClearField("node"), "no-nodes")
    yield from _each(lambda p: p.graph.ClearField("initializer"), "no-initializers")
    yield from _each(lambda p: p.ClearField("graph"), "no-graph")
    yield from _each(lambda p: p.ClearField("opset_import"), "no-opset")
    yield from _each(lambda p: p.ClearField("metadata_props"), "no-metadata")
    yield from _each(lambda p: p.metadata_props.add(key="graphlens", value="{}"), "two-manifests")
    yield from _each(lambda p: p.metadata_props.add(key="other", value="x"), "more-metadata")
    yield from _each(lambda p: p.metadata_props.add(key="ort_config",
    value='{"session_options":{"intra_op_num_threads":999999}}'), "ort-config")  # fmt: skip
    yield from _each(lambda p: setattr(p, "ir_version", 99), "ir-99")
    yield from _each(lambda p: setattr(p, "ir_version", 1), "ir-1")
    yield from _each(lambda p: setattr(p, "ir_version", -1), "ir-minus-1")
    yield from _each(lambda p: setattr(p.opset_import[0], "version", 99), "opset-99")
    yield from _each(lambda p: setattr(p.opset_import[0], "version", 7), "opset-7")
    yield from _each(lambda p: setattr(p.opset_import[0], "version", -(2**63)), "opset-least")
    yield from _each(lambda p: p.opset_import.add(domain="", version=13), "two-opsets")
    yield from _each(lambda p: p.graph.initializer.append(p.graph.initializer[0]), "initializer-twice")
    yield from _each(lambda p: p.graph.input.append(p.graph.input[0]), "input-twice")
    yield from _each(lambda p: p.graph.output.append(p.graph.output[0]), "output-twice")
    yield from _each(lambda p: p.graph.output.append(value("nowhere")), "output-of-nothing")
    yield from _each(lambda p: p.graph.input.append(value("more")), "one-more-input")
    yield from _each(lambda p: setattr(p.graph.output[0].type.tensor_type, "elem_type", 7), "output-type")
    yield from _each(lambda p: setattr(p.graph.output[0].type.tensor_type, "elem_type", 99), "output-type-99")
    yield from _each(lambda p: p.graph.output[0].ClearField("type"), "output-without-type")
    yield from _each(lambda p: p.graph.input[0].ClearField("type"), "input-without-type")
    yield from _each(lambda p: setattr(p.graph.input[0].type.tensor_type, "elem_type", 8), "input-of-text")
    yield from _each(lambda p: p.graph.input[0].type.tensor_type.shape.dim.add(dim_value=-5), "input-of-minus-5")
    yield from _each(lambda p: setattr(p.graph.output[0], "name", ""), "output-without-name")
    yield from _each(lambda p: setattr(p.graph.output[0], "name", "\0"), "output-named-nul")
    for dims in ([-1], [2**40], [2**31, 2**31], [2**62, 2**62], [2**63 - 1]):
        tensor = TensorProto(name="added", data_type=FLOAT, dims=dims)
        yield from _each(lambda p, tensor=tensor: p.graph.initializer.append(tensor), f"tensor-{len(dims)}-{dims[0]}")
    for kind, data in ((STRING, {"string_data": [b"\xff"]}), (0, {"raw_data": b"1234"}), (99, {"raw_data": b"1234"}),
                       (FLOAT, {"raw_data": b"1"}), (FLOAT, {"float_data": [1.0, 2.0]}), (INT,
                       {"raw_data": b"12345678" * 2})):  # fmt: skip
        tensor = TensorProto(name="added", data_type=kind, dims=[1], **data)
        yield from _each(lambda p, tensor=tensor: p.graph.initializer.append(tensor),
        f"tensor-type-{kind}-{len(data)}{next(iter(data))}")  # fmt: skip
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("sparse", FLOAT, [1], [1.0]), helper.make_tensor("at", INT, [1], [0]), [2**40]
    )
    yield from _each(lambda p: p.graph.sparse_initializer.append(sparse), "sparse")
    yield from _each(beside(lambda: [helper.make_node("Constant", [], ["s"], sparse_value=sparse)]), "sparse-attribute")
    attribute = onnx.AttributeProto(name="alpha", type="TYPE_PROTOS")
    yield from _each(lambda p: first(p).attribute.append(attribute), "attribute-type-protos")
    yield from _each(
        lambda p: first(p).attribute.append(onnx.AttributeProto(name="", type=1, f=1)), "attribute-unnamed"
    )


def _operators() -> Variants:
    """Nodes that the logits go through. Sealed ones that do no harm may run; those of the first list may not open."""
    endless: dict[str, Callable[[], Nodes]] = {
        "loop-2-62": lambda: loop(2**62),
        "loop-1e7": lambda: loop(10**7),
        "loop-grows": lambda: loop(40_000, grow=True),
        "loop-doubles": lambda: loop(40, grow=True, double=True),
        "nested-loops": lambda: nested_loops(6, 1000),
        "tfidf-2-30": lambda: big("TfIdfVectorizer", 2**30),
        "scan-1e8": lambda: scan(10**8),
        "ifs-14": lambda: ifs(14),
        "concat-40": lambda: doubled("Concat", 40),
    }
    for name, nodes in endless.items():
        yield from both(name, through_the_logits(nodes, "made"), sealed="refused")
    for count in (30, 20, 16):
        yield from both(f"functions-2-{count}", functions(count, 2), sealed="refused")
    yield from both("functions-10-5", functions(5, 10), sealed="refused")
    for op, domain in (("Evil", "my.company"), ("PyOp", "ai.onnx.contrib"), ("EPContext", "com.microsoft"), ("EPContext", ""),
                       ("Evil", "com.microsoft"), ("Gradient", "ai.onnx.preview.training"), ("Evil", ""),
                       ("Evil", "ai.onnx.ml"), ("BeamSearch", "com.microsoft")):  # fmt: skip
        yield from both(f"foreign-{domain or 'onnx'}-{op}", foreign(op, domain), sealed="refused")
    for op in ("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "EyeLike", "OneHot", "Resize", "RandomUniform", "MatMul",
               "Hardmax"):  # fmt: skip
        nodes = functools.partial(big, op, 2**34)
        yield from both(f"big-{op}", through_the_logits(nodes, "made"))
        yield from both(f"big-beside-{op}", beside(nodes))
    harmless: dict[str, Callable[[], Nodes]] = {
        "loop-3": lambda: loop(3),
        "ifs-2": lambda: ifs(2),
        "chain-1000": lambda: chain(1000),
        "chain-250000": lambda: chain(250_000),
        "sequence": lambda: sequence(1),
        "random": lambda: [helper.make_node("RandomNormal", [], ["made"], shape=[4])],
    }
    for name, nodes in harmless.items():
        yield from both(name, through_the_logits(nodes, "made"))
    yield from both("functions-2-3", functions(3, 2))


def variants(count: int) -> Variants:
    """Variants of the graph; after those made by hand as many random ones as come to ``count``."""
    made = [*_operators(), *_broken()]
    yield from made[:count]
    for seed in range((count - len(made)) // 2):
        yield from both(f"random-{seed:04}", _random(seed), sealed="safe")


def _random(seed: int) -> Change:
    """One change of one node, which may well be another graph that works."""

    def apply(proto: onnx.ModelProto) -> None:
        rng, before = random.Random(seed), onnx.ModelProto()
        before.CopyFrom(proto)
        while proto == before:
            once(proto, rng)

    def once(proto: onnx.ModelProto, rng: random.Random) -> None:
        nodes = proto.graph.node
        one, other = (nodes[rng.randrange(len(nodes))] for _ in range(2))
        kind = rng.randrange(7)
        if kind == 0:
            one.op_type = other.op_type
        elif kind == 1 and one.input and other.output:
            one.input[rng.randrange(len(one.input))] = other.output[0]
        elif kind == 2 and one.attribute:
            one.attribute.remove(rng.choice(one.attribute))
        elif kind == 3:
            one.attribute.extend(other.attribute)
        elif kind == 4 and one.attribute:
            attribute = rng.choice(one.attribute)
            attribute.i, attribute.f = rng.choice([-1, 0, 2**62, -(2**63)]), rng.choice([float("nan"), -1.0, 1e38])
        elif kind == 5:
            nodes.remove(one)
        else:
            one.input.extend(other.output)

    return apply
