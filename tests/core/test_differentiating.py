"""Differentiated graphs: linear in the seed, the same for every kind of seed, under edits, and clear about what they can't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from graphlens import Ablate, InputError, Patch, Steer, UnknownHookPoint, embedded_model, surgery
from graphlens.file.io_names import SEED, SEED_POSITIONS, SEED_TOKENS
from graphlens.metrics import CrossEntropy, LogitDiff, Probability
from graphlens.surgery.graph import write_manifest
from graphlens.surgery.rules import RULES, Builder, Gradient, rule
from tests.models import MODEL

Array = npt.NDArray[Any]
TOKENS = np.array([[5, 90, 411, 7, 23], [8, 8, 300, 65, 12]])
HOOKS = (
    "hook_embed",
    "blocks.0.attn.hook_pattern",
    "blocks.1.ln1.hook_scale",
    "blocks.2.hook_resid_mid",
    "blocks.3.mlp.hook_pre",
)


def run(
    model: ir.Model, feeds: dict[str, Array], hooks: tuple[str, ...] = HOOKS, folder: Path | None = None
) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    place = str(folder or embedded_model())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", place)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    entries = surgery.read_manifest(model).hooks
    found: list[Array] = session.run([entries[surgery.gradient_output(name)].value for name in hooks], feeds)
    return found


@pytest.fixture(scope="module")
def plain() -> ir.Model:
    return surgery.load(embedded_model())


def dense_seed(draw: np.random.Generator) -> Array:
    return draw.standard_normal((2, 5, 800)).astype(np.float32)


def test_the_gradient_is_linear_in_the_seed(plain: ir.Model) -> None:
    model = surgery.differentiate(plain, HOOKS)
    draw = np.random.default_rng(0)
    a, b = dense_seed(draw), dense_seed(draw)
    one, other, both = (run(model, {"input_ids": TOKENS, SEED: s}) for s in (a, b, 2 * a - 3 * b))
    for x, y, z in zip(one, other, both, strict=True):
        scale = float(np.abs(z).max())
        assert scale > 0
        assert float(np.abs(2 * x - 3 * y - z).max()) <= 1e-4 * scale
    nothing = run(model, {"input_ids": TOKENS, SEED: 0 * a})
    assert all(float(np.abs(x).max()) == 0 for x in nothing)


def test_every_kind_of_seed_gives_the_same(plain: ir.Model) -> None:
    positions = np.array([[4, 2], [1, 3]])
    tokens = np.array([[[7, 11, 7], [5, 6, 0]], [[2, 3, 4], [799, 1, 1]]])  # one token twice: its seeds add up
    values = np.random.default_rng(1).standard_normal(tokens.shape).astype(np.float32)
    dense = np.zeros((2, 5, 800), np.float32)
    np.add.at(dense, (np.arange(2)[:, None, None], positions[..., None], tokens), values)
    hooks = (*HOOKS, "unembed.hook_out")
    wanted = run(surgery.differentiate(plain, hooks), {"input_ids": TOKENS, SEED: dense}, hooks)
    sparse = surgery.differentiate(plain, hooks, seed="sparse")
    feeds = {"input_ids": TOKENS, SEED: values, SEED_POSITIONS: positions, SEED_TOKENS: tokens}
    for x, y in zip(run(sparse, feeds, hooks), wanted, strict=True):
        assert float(np.abs(x - y).max()) <= 1e-5 * float(np.abs(y).max())
    weights = np.array([[0.2, 0, -1, 0.5, 0], [0, 0.3, 0, 0, 2]], np.float32)
    targets = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    logits = MODEL(TOKENS).astype(np.float64)
    softmax = np.exp(logits - logits.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    np.put_along_axis(softmax, targets[..., None], np.take_along_axis(softmax, targets[..., None], -1) - 1, -1)
    wanted = run(
        surgery.differentiate(plain, HOOKS),
        {"input_ids": TOKENS, SEED: (softmax * weights[..., None]).astype(np.float32)},
    )
    loss = surgery.differentiate(plain, HOOKS, seed="loss")
    for x, y in zip(run(loss, {"input_ids": TOKENS, SEED: weights, SEED_TOKENS: targets}), wanted, strict=True):
        assert float(np.abs(x - y).max()) <= 1e-4 * float(np.abs(y).max())


def test_a_sparse_seed_needs_no_hook_point_before_the_unembedding(plain: ir.Model) -> None:
    """An adopted file may not show one: the seed is then that of the logits."""
    hidden = plain.clone()
    manifest = surgery.read_manifest(plain)
    hooks = {name: entry for name, entry in manifest.hooks.items() if name != "unembed.hook_in"}
    write_manifest(hidden, manifest.with_hooks(hooks))
    feeds = {
        "input_ids": TOKENS,
        SEED: np.ones((2, 1, 2), np.float32),
        SEED_POSITIONS: np.array([[4], [2]]),
        SEED_TOKENS: np.array([[[7, 11]], [[5, 6]]]),
    }
    one, other = (run(surgery.differentiate(model, HOOKS, seed="sparse"), feeds) for model in (plain, hidden))
    for x, y in zip(one, other, strict=True):
        assert float(np.abs(x - y).max()) <= 1e-5 * float(np.abs(y).max())


def test_of_an_activation(plain: ir.Model) -> None:
    """d(seed . resid_post 1)/d(resid_pre 1), against the chain through the logits' own gradients."""
    metric = LogitDiff(5, 7)
    hooks = ("blocks.1.hook_resid_pre", "blocks.0.attn.hook_z")
    whole = MODEL.gradients(TOKENS, metric, ["blocks.1.hook_resid_post", *hooks])
    part = surgery.differentiate(plain, hooks, of="blocks.1.hook_resid_post")
    found = run(part, {"input_ids": TOKENS, SEED: whole["blocks.1.hook_resid_post"]}, hooks)
    for name, gradient in zip(hooks, found, strict=True):
        assert float(np.abs(gradient - whole[name]).max()) <= 1e-5 * float(np.abs(whole[name]).max())


def test_nothing_before_the_earliest_hook_point_is_differentiated(plain: ir.Model) -> None:
    late, early = (
        len(list(surgery.differentiate(plain, [f"blocks.{layer}.hook_resid_pre"]).graph)) for layer in (3, 0)
    )
    forward = len(list(plain.graph))
    assert (late - forward) < 0.35 * (early - forward)


def test_what_does_not_depend_on_a_hook_point_has_no_gradient(plain: ir.Model) -> None:
    with pytest.warns(UserWarning, match=r"'blocks.1.hook_resid_mid' does not depend on 'blocks.2.hook_resid_pre'"):
        model = surgery.differentiate(plain, ["blocks.2.hook_resid_pre"], of="blocks.1.hook_resid_mid")
    seed = np.ones((2, 5, 128), np.float32)
    (found,) = run(model, {"input_ids": TOKENS, SEED: seed}, ("blocks.2.hook_resid_pre",))
    assert found.shape == (2, 5, 128)
    assert not found.any()


def test_under_interventions_it_is_the_edited_runs_gradient() -> None:
    """Against central differences, with a head ablated, a patch and a steering vector in place."""
    draw = np.random.default_rng(2)
    edits = [
        Ablate("blocks.1.attn.hook_z", heads=1),
        Patch("blocks.0.attn.hook_attn_scores", 0.5, heads=2, positions=3),
        Steer("blocks.2.hook_resid_pre", draw.standard_normal(128), positions=[1, 4]),
    ]
    metric = CrossEntropy(5)
    with MODEL.intervene(edits):
        gradients = MODEL.gradients(TOKENS, metric)
        for name in (
            "blocks.0.hook_resid_mid",
            "blocks.1.attn.hook_z",
            "blocks.2.hook_resid_pre",
            "blocks.0.attn.hook_v",
        ):
            direction = draw.standard_normal(gradients[name].shape).astype(np.float32)
            ends = [
                float(metric(MODEL.run_with_interventions(TOKENS, Steer(name, direction, s)))) for s in (0.01, -0.01)
            ]
            expected = float((gradients[name].astype(np.float64) * direction).sum())
            assert (ends[0] - ends[1]) / 0.02 == pytest.approx(expected, rel=0.02, abs=2e-3), name
    assert not np.allclose(gradients["hook_embed"], MODEL.gradients(TOKENS, metric, "hook_embed")["hook_embed"])


def test_padding_has_no_gradient() -> None:
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    found = MODEL.gradients(TOKENS, LogitDiff(5, 7), attention_mask=mask)
    assert all(np.isfinite(value).all() for value in found.values())
    alone = MODEL.gradients(TOKENS[1:, 2:], LogitDiff(5, 7))
    for name in ("hook_embed", "blocks.1.attn.hook_z", "blocks.3.hook_resid_mid"):
        assert not found[name][1, :2].any(), name
        np.testing.assert_allclose(2 * found[name][1, 2:], alone[name][0], atol=1e-5 * np.abs(alone[name]).max())


def test_a_metric_of_ones_own() -> None:
    class Square:
        def gradient(self, logits: Array) -> Array:
            found = np.zeros_like(logits)
            found[:, -1, 7] = 2 * logits[:, -1, 7]
            return found

    found = MODEL.gradients(TOKENS, Square(), "blocks.1.hook_resid_pre")["blocks.1.hook_resid_pre"]
    direction = np.random.default_rng(3).standard_normal(found.shape)
    ends = [
        float(
            (
                MODEL.run_with_interventions(TOKENS, Steer("blocks.1.hook_resid_pre", direction, s))[:, -1, 7].astype(
                    np.float64
                )
                ** 2
            ).sum()
        )
        for s in (0.01, -0.01)
    ]
    assert (ends[0] - ends[1]) / 0.02 == pytest.approx(float((found * direction).sum()), rel=0.01)


@pytest.mark.parametrize("metric", [LogitDiff(5, 7), Probability([3, 4]), CrossEntropy(9, position=1)])
def test_a_metrics_slopes_are_its_derivative(metric: Any) -> None:
    logits = np.random.default_rng(4).standard_normal((2, 5, 11))
    needs = metric.needs(2, 5)
    scores = needs.gather(logits)
    slopes = metric.slopes(scores)
    for index in np.ndindex(*scores.shape):
        ends = []
        for size in (1e-5, -1e-5):
            moved = scores.copy()
            moved[index] += size
            ends.append(float(metric.reduced(metric.of(moved))))
        assert slopes[index] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)


# Operators, one by one


def weights_of(shape: tuple[int, ...]) -> Array:
    """What the entries of a result weigh in the sum that is differentiated: all different."""
    return np.random.default_rng(6).uniform(0.5, 1.5, shape)


def derivative(
    kind: str,
    x: Array,
    attributes: dict[str, Any] | None = None,
    others: tuple[Array | None, ...] = (),
    count: int = 1,
    place: int = 0,
) -> tuple[Array, Array]:
    """(y, d(sum of w * y)/dx) of one operator by its rule, run by ONNX Runtime: y its first output, w of no particular kind.

    ``others`` are its other inputs, x being the one at ``place``; ``count`` is the number of its outputs.
    """
    dtype = ir.DataType.from_numpy(x.dtype)
    value = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(dtype))
    constants = [
        None
        if c is None
        else ir.Value(
            name=f"c{i}",
            const_value=ir.tensor(c, name=f"c{i}"),
            shape=ir.Shape(c.shape),
            type=ir.TensorType(ir.DataType.from_numpy(c.dtype)),
        )
        for i, c in enumerate(others)
    ]
    inputs = [*constants[:place], value, *constants[place:]]
    node = ir.node(kind, inputs, attributes or {}, num_outputs=count)
    y = node.outputs[0]
    y.name, y.type = "y", value.type
    for index, output in enumerate(node.outputs[1:]):
        output.name = f"beside_{index}"
    given = [constant for constant in constants if constant is not None]
    graph = ir.Graph([value], [y], nodes=[node], initializers=given, opset_imports={"": 20}, name="g")
    shape = (
        onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
        .run(None, {"x": x})[0]
        .shape
    )
    y.shape = ir.Shape(shape)
    b = Builder(dtype)
    seed = b.tape.initializer(ir.tensor(weights_of(shape).astype(x.dtype), name="seed"), name="seed")
    needs = [index == place for index in range(len(inputs))]
    gradient = RULES[kind](b, node, [Gradient(seed), *[None] * (count - 1)], needs)[place]
    assert gradient is not None
    read = [user for output in node.outputs for user, _ in output.uses() if user.op_type != "Shape"]
    assert RULES[kind].reads_output or not read  # a rule that reads its node's output says so
    out = b.op("Identity", b.whole(gradient, value))
    out.name = "dx"
    for constant in b.tape.initializers:
        graph.initializers[str(constant.name)] = constant
    graph.extend(list(b.tape.nodes))
    graph.outputs.append(out)
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    found, slope = session.run(["y", "dx"], {"x": x})
    return found, slope


@pytest.mark.parametrize(
    ("kind", "attributes", "others"),
    [
        ("Exp", {}, ()), ("Tanh", {}, ()), ("Sigmoid", {}, ()), ("Relu", {}, ()), ("Neg", {}, ()),
        ("Reciprocal", {}, ()), ("Sqrt", {}, ()), ("Pow", {}, (np.array(3.0),)), ("Softmax", {"axis": -1}, ()),
        ("ReduceSum", {"keepdims": 0}, (np.array([1]),)), ("ReduceMean", {"keepdims": 1}, (np.array([-1]),)),
        ("Transpose", {"perm": [2, 0, 1]}, ()), ("Unsqueeze", {}, (np.array([1]),)),
        ("Concat", {"axis": 1}, (np.ones((2, 4, 5)),)),
        ("Expand", {}, (np.array([7, 2, 3, 5]),)), ("MatMul", {}, (np.arange(10.0).reshape(5, 2),)),
        ("MatMul", {}, (np.arange(20.0).reshape(2, 5, 2),)), ("Div", {}, (np.array([[2.0], [3.0], [4.0]]),)),
        ("Log", {}, ()), ("Abs", {}, ()), ("Flatten", {"axis": 2}, ()), ("Squeeze", {}, ()),
        ("Clip", {}, (np.array(0.9), np.array(1.4))), ("Clip", {}, (None, np.array(1.4))), ("Clip", {}, (np.array(0.9),)),
        ("Min", {}, (np.array([0.8, 1.1, 1.2, 1.3, 1.6]),)), ("Max", {}, (np.array(1.2), np.array([[1.0], [1.1], [1.2]]))),
        ("Slice", {}, (np.array([1]), np.array([3]), np.array([1]))),
        ("Slice", {}, (np.array([-1, 0]), np.array([-6, 2]), np.array([-1, 0]), np.array([-2, 1]))),
        ("Slice", {}, (np.array([0, 1]), np.array([2, 2**60]))),
        ("Gather", {"axis": 1}, (np.array([2, 0, -1]),)), ("Gather", {"axis": -1}, (np.array(3),)),
        ("Gather", {"axis": 0}, (np.array([[0, 1, 1], [1, 0, 0]]),)),
        ("GatherElements", {"axis": 2}, (np.array([[[0, 4], [1, 1], [2, 0]]] * 2),)),
        ("ScatterElements", {"axis": 2}, (np.array([[[0, 4], [1, 2], [3, 0]]] * 2), np.full((2, 3, 2), 7.0))),
        ("Tile", {}, (np.array([2, 1, 3]),)), ("Expand", {}, (np.array([1, 3, 1]),)),
        ("Where", {}, (np.array([[True], [False], [True]]), np.array(7.0))),
        ("Split", {"axis": -1}, (np.array([2, 3]),)), ("TopK", {"axis": 1}, (np.array([2]),)),
        ("TopK", {"axis": 2, "largest": 0}, (np.array([3]),)),
    ],
)  # fmt: skip
def test_a_rule_is_the_derivative(kind: str, attributes: dict[str, Any], others: tuple[Array | None, ...]) -> None:
    x = np.random.default_rng(5).uniform(0.5, 2.0, (2, 1, 5) if kind == "Squeeze" else (2, 3, 5))
    count, place = 2 if kind in ("Split", "TopK") else 1, 1 if kind == "Where" else 0
    _, slope = derivative(kind, x, attributes, others, count, place)
    assert slope.shape == x.shape
    places = [(0, 0, 0), (1, -1, 4), (0, x.shape[1] // 2, 3), (1, 0, 2)]
    assert np.any([slope[index] for index in places])
    for index in places:
        ends = []
        for size in (1e-6, -1e-6):
            moved = x.copy()
            moved[index] += size
            y = derivative(kind, moved, attributes, others, count, place)[0]
            ends.append(float((y * weights_of(y.shape)).sum()))
        assert slope[index] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "attributes", "others", "place"),
    [
        ("Sub", {}, (np.full((4, 2, 3, 5), 2.0),), 1), ("Div", {}, (np.full((2, 3, 1), 2.0),), 1),
        ("MatMul", {}, (np.arange(12.0).reshape(2, 2, 3),), 1),
        ("Where", {}, (np.array([[True], [False], [True]]), np.array(7.0)), 2),
        ("Max", {}, (np.array(1.2), np.array([[1.0], [1.1], [1.2]])), 1), ("Concat", {"axis": 1}, (np.ones((2, 4, 5)),), 1),
        ("ScatterElements", {"axis": 1}, (np.full((2, 9, 5), 7.0), np.array([[[8] * 5, [0] * 5, [4] * 5]] * 2)), 2),
        ("ScatterElements", {"axis": -1}, (np.array([[[0, 4], [1, 2], [3, 0]]] * 2), np.full((2, 3, 2), 7.0)), 0),
    ],
)  # fmt: skip
def test_a_rule_is_the_derivative_by_any_input(
    kind: str, attributes: dict[str, Any], others: tuple[Array, ...], place: int
) -> None:
    x = np.random.default_rng(5).uniform(0.5, 2.0, (2, 3, 5))
    _, slope = derivative(kind, x, attributes, others, place=place)
    for index in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        ends = []
        for size in (1e-6, -1e-6):
            moved = x.copy()
            moved[index] += size
            y = derivative(kind, moved, attributes, others, place=place)[0]
            ends.append(float((y * weights_of(y.shape)).sum()))
        assert slope[index] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-6)


def test_where_inputs_tie_and_at_a_bound_it_is_torchs() -> None:
    """A tie shares the gradient; a bound lets it pass."""
    x = np.array([1.0, 2.0, 3.0])
    w = weights_of(x.shape)
    for kind in ("Min", "Max"):
        slope = derivative(kind, x, {}, (np.array([1.0, 0.0, 9.0]),))[1] / w
        np.testing.assert_allclose(slope, [0.5, float(kind == "Max"), float(kind == "Min")])
    np.testing.assert_allclose(derivative("Clip", x, {}, (np.array(1.0), np.array(2.0)))[1] / w, [1, 1, 0])


def test_what_a_rule_cannot_tell_it_refuses() -> None:
    x = np.ones((2, 3))
    with pytest.raises(InputError, match="reduces cannot be differentiated"):
        derivative("ScatterElements", x, {"reduction": "add"}, (np.array([[0, 1]]), np.ones((1, 2))))
    with pytest.raises(InputError, match="first input alone, not by its bounds"):
        derivative("Clip", np.array(0.5), {}, (np.ones((2, 3)),), place=1)


@pytest.mark.parametrize(("kind", "attributes"), [("Erf", {}), ("Gelu", {}), ("Gelu", {"approximate": "tanh"})])
def test_a_rule_of_a_function_that_has_no_float64(kind: str, attributes: dict[str, Any]) -> None:
    """The mean slope over a step is that at its middle, up to the third derivative."""
    x = np.linspace(-3, 3, 61, dtype=np.float32)
    _, slope = derivative(kind, x, attributes)
    upper, lower = (derivative(kind, x + np.float32(size), attributes)[0].astype(np.float64) for size in (0.02, -0.02))
    np.testing.assert_allclose(slope / weights_of(x.shape), (upper - lower) / 0.04, atol=3e-4)


def test_an_operator_has_one_rule() -> None:
    before = dict(RULES)
    with pytest.raises(ValueError, match="Sqrt has a gradient rule already"):
        rule("Sqrt")(lambda b, node, grads, needs: [None])
    assert before == RULES


def test_a_rule_of_ones_own_is_one_function(plain: ir.Model) -> None:
    spliced = surgery.splice(plain, {"blocks.1.hook_mlp_out": lambda x, scope: scope.op("Softsign", [x])})
    with pytest.raises(InputError, match=r"Softsign .* has no derivative here"):
        surgery.differentiate(spliced, ["blocks.0.hook_mlp_out"])

    @rule("Softsign")
    def softsign(b: Builder, node: ir.Node, grads: Any, needs: Any) -> list[Gradient | None]:
        steps = b.op("Add", b.op("Abs", node.inputs[0]), b.constant(1.0, node.inputs[0]))
        return [Gradient(b.op("Div", grads[0].value, b.op("Mul", steps, steps)))]

    try:
        assert RULES["Softsign"].function is softsign
        x = np.linspace(-3, 3, 61, dtype=np.float32)
        slope = derivative("Softsign", x, {})[1] / weights_of(x.shape)
        np.testing.assert_allclose(slope, 1 / (1 + np.abs(x)) ** 2, rtol=1e-5)
        found = surgery.differentiate(spliced, ["blocks.0.hook_mlp_out"])
        assert found.graph.outputs[-1].name == "blocks.0.hook_mlp_out_grad"
    finally:
        del RULES["Softsign"]


# What it refuses


def test_bad_input(plain: ir.Model) -> None:
    with pytest.raises(UnknownHookPoint, match=r"Nearest: 'blocks.1.hook_resid_mid'"):
        surgery.differentiate(plain, ["blocks.1.hook_resid_mdi"])
    with pytest.raises(InputError, match="no hook point was asked for"):
        surgery.differentiate(plain, [])
    with pytest.raises(InputError, match="seed='thin'"):
        surgery.differentiate(plain, HOOKS, seed="thin")
    with pytest.raises(InputError, match="a sparse seed is of the logits"):
        surgery.differentiate(plain, HOOKS, of="blocks.1.hook_resid_pre", seed="sparse")
    with pytest.raises(InputError, match="int64"):
        surgery.differentiate(surgery.with_flagged(plain, ["use_hook_tokens"]), ["hook_tokens"])


@pytest.mark.parametrize(("kind", "domain"), [("Cosh", ""), ("FastGelu", "com.microsoft")])
def test_an_operator_without_a_derivative_is_named(plain: ir.Model, kind: str, domain: str) -> None:
    """With the hook point behind it; where no gradient passes, it does no harm."""
    edited = surgery.splice(
        plain, {"blocks.2.hook_mlp_out": lambda value, scope: scope.op(kind, [value], domain=domain)}
    )
    with pytest.raises(InputError, match=rf"{kind} of node .*blocks\.2\..* has no derivative"):
        surgery.differentiate(edited, ["blocks.1.hook_resid_pre"])
    surgery.differentiate(edited, ["blocks.3.hook_resid_pre"])
    before = ir.to_proto(plain).SerializeToString()
    surgery.differentiate(plain, HOOKS)
    assert ir.to_proto(plain).SerializeToString() == before
