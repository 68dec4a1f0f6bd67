"""Small ONNX files that other programs might have written, made with onnx.helper: networks of every kind, each of a few nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING
Array = np.ndarray
D, HEADS, VOCAB = 10, 5, 23


def value(name: str, kind: int, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, Array] | None = None,
    opset: int = 17,
    microsoft: bool = False,
    producer: str = "pytorch",
) -> onnx.ModelProto:
    """A model, which onnx's checker has seen."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "main_graph", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("com.microsoft", 1)] if microsoft else [])]
    made = helper.make_model(graph, opset_imports=opsets, producer_name=producer, producer_version="9.9", ir_version=8)
    onnx.checker.check_model(made)
    return made


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def weight(*shape: int, seed: int = 0) -> Array:
    return _random(seed + sum(shape)).normal(size=shape).astype(np.float32)


def _heads(name: str, source: str, out: str, order: Sequence[int]) -> list[onnx.NodeProto]:
    """A projection of [b, p, d] to heads, in an order of axes."""
    return [
        helper.make_node("MatMul", [source, f"w_{name}"], [f"{name}_flat"], name=f"/{name}/MatMul"),
        helper.make_node("Reshape", [f"{name}_flat", "heads"], [f"{name}_heads"], name=f"/{name}/Reshape"),
        helper.make_node("Transpose", [f"{name}_heads"], [out], name=f"/{name}/Transpose", perm=order),
    ]


def attention(query: str, key: str, out: str, prefix: str = "") -> list[onnx.NodeProto]:
    """The nodes of an attention of ``query`` to ``key``, both [b, p, d]."""
    q, k, v = (f"{prefix}{name}" for name in "qkv")
    return [
        *_heads(q, query, f"{q}_t", (0, 2, 1, 3)),
        *_heads(k, key, f"{k}_t", (0, 2, 3, 1)),
        *_heads(v, key, f"{v}_t", (0, 2, 1, 3)),
        helper.make_node("MatMul", [f"{q}_t", f"{k}_t"], [f"{prefix}products"], name=f"/{prefix}scores/MatMul"),
        helper.make_node("Mul", [f"{prefix}products", "scale"], [f"{prefix}scores"], name=f"/{prefix}scores/Mul"),
        helper.make_node("Softmax", [f"{prefix}scores"], [f"{prefix}pattern"], name=f"/{prefix}Softmax", axis=-1),
        helper.make_node("MatMul", [f"{prefix}pattern", f"{v}_t"], [f"{prefix}z"], name=f"/{prefix}z/MatMul"),
        helper.make_node(
            "Transpose", [f"{prefix}z"], [f"{prefix}z_t"], name=f"/{prefix}z/Transpose", perm=(0, 2, 1, 3)
        ),
        helper.make_node("Reshape", [f"{prefix}z_t", "joined"], [f"{prefix}z_flat"], name=f"/{prefix}z/Reshape"),
        helper.make_node(
            "MatMul", [f"{prefix}z_flat", f"w_{prefix}o"], [f"{prefix}projected"], name=f"/{prefix}o/MatMul"
        ),
        helper.make_node("Add", [query, f"{prefix}projected"], [out], name=f"/{prefix}Add"),
    ]


def attention_weights(prefix: str = "", seed: int = 0) -> dict[str, Array]:
    return {
        **{f"w_{prefix}{name}": weight(D, D, seed=seed + index) for index, name in enumerate("qkvo")},
        "heads": np.array([0, 0, HEADS, D // HEADS]),
        "joined": np.array([0, 0, D]),
        "scale": np.array((D // HEADS) ** -0.5, np.float32),
    }


_TABLE = {"table": weight(VOCAB, D), "unembed": weight(D, VOCAB, seed=1)}
EMBED = helper.make_node("Gather", ["table", "input_ids"], ["x"], name="/embed/Gather")
UNEMBED = helper.make_node("MatMul", ["y", "unembed"], ["logits"], name="/lm_head/MatMul")
IDS = value("input_ids", INT64, ["batch", "sequence"])
LOGITS = value("logits", FLOAT, ["batch", "sequence", VOCAB])
HIDDEN = value("encoder_hidden_states", FLOAT, ["batch", "encoder_sequence", D])


def one_layer(producer: str = "pytorch") -> onnx.ModelProto:
    """Embedding, one attention without a mask, unembedding. No value_info."""
    nodes = [EMBED, *attention("x", "x", "y"), UNEMBED]
    return model(nodes, [IDS], [LOGITS], {**_TABLE, **attention_weights()}, producer=producer)


LAYERS, D_MLP, POSITIONS = 2, 14, 32


def decoder() -> onnx.ModelProto:
    """A decoder as torch exports one: learned positions, two blocks of norm, causal attention, norm and MLP, a final norm."""
    n = helper.make_node
    nodes = [
        n("Gather", ["table", "input_ids"], ["tokens"], name="/wte/Gather"),
        n("Shape", ["input_ids"], ["ids_shape"], name="/Shape"),
        n("Gather", ["ids_shape", "one_i"], ["length"], name="/Gather", axis=0),
        n("Range", ["zero_i", "length", "one_i"], ["places"], name="/Range"),
        n("Gather", ["positions", "places"], ["placed"], name="/wpe/Gather"),
        n("Add", ["tokens", "placed"], ["resid_0"], name="/Add"),
        n("Unsqueeze", ["places", "minus"], ["rows"], name="/Unsqueeze"),
        n("LessOrEqual", ["places", "rows"], ["seen"], name="/LessOrEqual"),
        n("Where", ["seen", "nought", "lowest"], ["mask"], name="/Where"),
    ]
    weights = {
        **{"table": weight(VOCAB, D), "positions": weight(POSITIONS, D, seed=5), "unembed": weight(D, VOCAB, seed=1)},
        **{"zero_i": np.array(0), "one_i": np.array(1), "minus": np.array([-1]), "nought": np.array(0, np.float32)},
        **{"lowest": np.array(-3e38, np.float32), "norm_w": 1 + weight(D, seed=8) / 4, "norm_b": weight(D, seed=9) / 4},
    }
    for layer in range(LAYERS):
        nodes += _block(f"h.{layer}.", f"resid_{layer}", f"resid_{layer + 1}")
        own = attention_weights(f"h.{layer}.", seed=20 * layer)
        own |= {
            f"w_h.{layer}.in": weight(D, D_MLP, seed=layer + 3),
            f"w_h.{layer}.out": weight(D_MLP, D, seed=layer + 4),
        }
        own |= {f"{name}_h.{layer}.{ln}": weight(D, seed=index + layer) / 4 + (name == "g")
                for index, (name, ln) in enumerate((name, ln) for name in "gc" for ln in ("ln_1", "ln_2"))}  # fmt: skip
        weights |= own
    nodes += [
        n("LayerNormalization", [f"resid_{LAYERS}", "norm_w", "norm_b"], ["last"], name="/ln_f", axis=-1, epsilon=1e-5),
        n("MatMul", ["last", "unembed"], ["logits"], name="/lm_head/MatMul"),
    ]
    return model(nodes, [IDS], [LOGITS], weights)


def _block(name: str, before: str, after: str) -> list[onnx.NodeProto]:
    """The nodes of a block of ``decoder``."""
    n = helper.make_node
    core = attention(f"{name}n1", f"{name}n1", f"{name}unused", name)[:-1]
    softmax = next(node for node in core if node.op_type == "Softmax")
    softmax.input[0] = f"{name}masked"
    core.insert(core.index(softmax), n("Add", [f"{name}scores", "mask"], [f"{name}masked"], name=f"/{name}masked/Add"))
    norms = {"ln_1": (before, f"{name}n1"), "ln_2": (f"{name}mid", f"{name}n2")}
    first, second = (
        n(
            "LayerNormalization",
            [source, f"g_{name}{ln}", f"c_{name}{ln}"],
            [out],
            name=f"/{name}{ln}",
            axis=-1,
            epsilon=1e-5,
        )
        for ln, (source, out) in norms.items()
    )
    return [
        first,
        *core,
        n("Add", [before, f"{name}projected"], [f"{name}mid"], name=f"/{name}Add"),
        second,
        n("MatMul", [f"{name}n2", f"w_{name}in"], [f"{name}pre"], name=f"/{name}mlp/c_fc/MatMul"),
        n("Relu", [f"{name}pre"], [f"{name}post"], name=f"/{name}mlp/act/Relu"),
        n("MatMul", [f"{name}post", f"w_{name}out"], [f"{name}written"], name=f"/{name}mlp/c_proj/MatMul"),
        n("Add", [f"{name}mid", f"{name}written"], [after], name=f"/{name}Add_1"),
    ]


def frozen() -> onnx.ModelProto:
    """The same for one prompt of 128 tokens."""
    nodes = [EMBED, *attention("x", "x", "y"), UNEMBED]
    shape = value("input_ids", INT64, [1, 128])
    return model(nodes, [shape], [value("logits", FLOAT, [1, 128, VOCAB])], {**_TABLE, **attention_weights()})


def cross_attention() -> onnx.ModelProto:
    """A decoder that attends to itself and to an encoder's states, as T5, BART and Whisper do."""
    nodes = [EMBED, *attention("x", "x", "m"), *attention("m", "encoder_hidden_states", "y", "cross_"), UNEMBED]
    return model(nodes, [IDS, HIDDEN], [LOGITS], {**_TABLE, **attention_weights(), **attention_weights("cross_", 7)})


def cross_attention_over_past() -> onnx.ModelProto:
    """The same where the encoder's keys and values are inputs, computed by an earlier run."""
    core = attention("m", "x", "y", "cross_")
    lost = {"cross_k_t": "past_key", "cross_v_t": "past_value"}
    kept = [node for node in core if not any(name in node.output[0] for name in ("cross_k", "cross_v"))]
    for node in kept:
        node.input[:] = [lost.get(name, name) for name in node.input]
    nodes = [EMBED, *attention("x", "x", "m"), *kept, UNEMBED]
    past = [
        value("past_key", FLOAT, ["batch", HEADS, D // HEADS, "encoder_sequence"]),
        value("past_value", FLOAT, ["batch", HEADS, "encoder_sequence", D // HEADS]),
    ]
    weights = {**_TABLE, **attention_weights(), **attention_weights("cross_", 7)}
    return model(
        nodes, [IDS, *past], [LOGITS], {k: v for k, v in weights.items() if k not in ("w_cross_k", "w_cross_v")}
    )


def two_towers() -> onnx.ModelProto:
    """A text and an image transformer side by side, and the products of what they end in."""
    image = value("pixel_values", FLOAT, ["images", "patches", D])
    nodes = [
        EMBED,
        *attention("x", "x", "text"),
        *attention("pixel_values", "pixel_values", "seen", "image_"),
        helper.make_node("ReduceMean", ["text"], ["text_mean"], axes=[1], keepdims=0),
        helper.make_node("ReduceMean", ["seen"], ["seen_mean"], axes=[1], keepdims=0),
        helper.make_node("Transpose", ["text_mean"], ["text_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["seen_mean", "text_t"], ["logits_per_image"]),
    ]
    outputs = [value("logits_per_image", FLOAT, ["images", "batch"])]
    weights = {"table": _TABLE["table"], **attention_weights(), **attention_weights("image_", 3)}
    return model(nodes, [IDS, image], outputs, weights)


def sound() -> onnx.ModelProto:
    """An encoder of sound: a convolution over time, then attention."""
    nodes = [
        helper.make_node("Conv", ["input_features", "kernel"], ["c"], name="/conv1/Conv", pads=[1, 1]),
        helper.make_node("Transpose", ["c"], ["x"], perm=[0, 2, 1]),
        *attention("x", "x", "last_hidden_state"),
    ]
    outputs = [value("last_hidden_state", FLOAT, ["batch", 30, D])]
    weights = {"kernel": weight(D, 4, 3), **attention_weights()}
    return model(nodes, [value("input_features", FLOAT, ["batch", 4, 30])], outputs, weights)


def convolutions() -> onnx.ModelProto:
    """A classifier of images: two convolutions, a Softmax at the end."""
    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernel"], ["c"], name="/conv1/Conv"),
        helper.make_node("Relu", ["c"], ["r"], name="/relu/Relu"),
        helper.make_node("Conv", ["r", "kernel2"], ["c2"], name="/conv2/Conv"),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"], name="/pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="/flatten"),
        helper.make_node("Softmax", ["f"], ["probs"], name="/softmax"),
    ]
    weights = {"kernel": weight(6, 3, 3, 3), "kernel2": weight(4, 6, 3, 3)}
    return model(
        nodes, [value("pixel_values", FLOAT, ["batch", 3, 16, 16])], [value("probs", FLOAT, ["batch", 4])], weights
    )


def recurrent() -> onnx.ModelProto:
    """A language model on a GRU."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], name="/embed"),
        helper.make_node("GRU", ["x", "w", "r"], ["all", "last"], name="/gru", hidden_size=7),
        helper.make_node("Squeeze", ["last", "zero"], ["state"], name="/squeeze"),
    ]
    weights = {"table": weight(VOCAB, 4), "w": weight(1, 21, 4), "r": weight(1, 21, 7), "zero": np.array([0])}
    return model(nodes, [value("input_ids", INT64, ["s", "b"])], [value("state", FLOAT, ["b", 7])], weights)


def without_softmax() -> onnx.ModelProto:
    """What tf2onnx makes of a dense network: no Softmax at all."""
    nodes = [
        helper.make_node("MatMul", ["bytes", "w"], ["h"], name="model/dense/MatMul"),
        helper.make_node("Relu", ["h"], ["g"], name="model/dense/Relu"),
        helper.make_node("MatMul", ["g", "w2"], ["target_label"], name="model/out/MatMul"),
    ]
    inputs, outputs = [value("bytes", FLOAT, ["batch", 8])], [value("target_label", FLOAT, ["batch", 3])]
    return model(nodes, inputs, outputs, {"w": weight(8, 6), "w2": weight(6, 3)}, producer="tf2onnx")


def classifier_head() -> onnx.ModelProto:
    """A dense network whose Softmax is the classifier's: not between two products of what is computed."""
    nodes = [
        helper.make_node("MatMul", ["features", "w"], ["h"], name="/fc/MatMul"),
        helper.make_node("Softmax", ["h"], ["probs"], name="/Softmax"),
        helper.make_node("MatMul", ["probs", "w2"], ["mixed"], name="/mix/MatMul"),
    ]
    inputs, outputs = [value("features", FLOAT, ["batch", 8])], [value("mixed", FLOAT, ["batch", 3])]
    return model(nodes, inputs, outputs, {"w": weight(8, 6), "w2": weight(6, 3)})


def _branch(name: str, out: str) -> onnx.GraphProto:
    nodes = attention("x", "x", out, f"{name}_")
    return helper.make_graph(nodes, name, [], [value(out, FLOAT, ["batch", "sequence", D])])


def merged() -> onnx.ModelProto:
    """A decoder that optimum merged: one branch of an If with past and one without."""
    nodes = [
        EMBED,
        helper.make_node(
            "If",
            ["use_cache_branch"],
            ["y"],
            name="optimum::if",
            then_branch=_branch("with", "y_with"),
            else_branch=_branch("without", "y_without"),
        ),
        UNEMBED,
    ]
    weights = {**_TABLE, **attention_weights("with_"), **attention_weights("without_")}
    return model(nodes, [IDS, value("use_cache_branch", BOOL, [])], [LOGITS], weights)


def looping() -> onnx.ModelProto:
    """A transformer's block in a Loop."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["still"]), *attention("state", "state", "next")],
        "body",
        [value("step", INT64, []), value("going", BOOL, []), value("state", FLOAT, ["batch", "sequence", D])],
        [value("still", BOOL, []), value("next", FLOAT, ["batch", "sequence", D])],
    )
    nodes = [EMBED, helper.make_node("Loop", ["times", "", "x"], ["y"], name="/loop", body=body), UNEMBED]
    return model(nodes, [IDS], [LOGITS], {**_TABLE, **attention_weights(), "times": np.array(3)})


def all_types() -> onnx.ModelProto:
    """A graph whose values are of many types, none of them stated: booleans, integers, halves, text, a sequence, an optional."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Add", ["product", "b"], ["biased"], name="biased"),
        helper.make_node("Cast", ["biased"], ["half"], name="half", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["biased"], ["brain"], name="brain", to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["biased"], ["double"], name="double", to=TensorProto.DOUBLE),
        helper.make_node("Greater", ["biased", "b"], ["larger"], name="larger"),
        helper.make_node("ArgMax", ["biased"], ["best"], name="best", axis=-1),
        helper.make_node("NonZero", ["larger"], ["places"], name="places"),
        helper.make_node("Cast", ["best"], ["words"], name="words", to=STRING),
        helper.make_node("SequenceConstruct", ["biased", "product"], ["both"], name="both"),
        helper.make_node("Optional", ["biased"], ["maybe"], name="maybe"),
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Slice", ["shape", "nought", "one"], ["rows_of"], name="rows_of"),
        helper.make_node("Concat", ["rows_of", "one", "four"], ["spread"], name="spread", axis=0),
        helper.make_node("Reshape", ["double", "spread"], ["folded"], name="folded"),
        helper.make_node("DynamicQuantizeLinear", ["biased"], ["bytes", "step", "zero"], name="bytes"),
        helper.make_node("ReduceMax", ["biased"], ["most"], name="most", keepdims=0),
        helper.make_node("Relu", ["biased"], ["out"], name="out"),
    ]
    weights = {"w": weight(3, 4), "b": weight(4), "one": np.array([1]), "four": np.array([4]), "nought": np.array([0])}
    inputs = [value("x", FLOAT, ["rows", 3])]
    return model(nodes, inputs, [value("out", FLOAT, ["rows", 4])], weights, opset=18)


# Kind -> (what makes it, a part of the sentence by which adopting refuses it).
REFUSED = {
    "a CNN": (convolutions, r"a convolutional network \(2 Conv\)"),
    "tf2onnx without Softmax": (without_softmax, "no Softmax and no fused attention"),
    "a classifier's Softmax": (classifier_head, "none of its 1 Softmax stands between two products"),
    "a GRU": (recurrent, r"a recurrent network \(1 GRU\)"),
    "a Loop": (looping, "1 Loop, which runs a part of the graph as often"),
    "a merged decoder": (merged, r"inside the branches of an If.*decoder_with_past_model\.onnx"),
    "cross-attention": (cross_attention, "as encoder-decoders do.*'input_ids'.*'encoder_hidden_states'"),
    "cross-attention over past": (cross_attention_over_past, "as encoder-decoders do.*'past_key'"),
    "two towers": (two_towers, "two transformers side by side.*'input_ids'.*'pixel_values'"),
    "sound": (sound, "'input_features' is sound"),
}


def write(made: onnx.ModelProto, path: Path, external: str | None = None) -> Path:
    """Writes a model, its weights into a file of their own if that has a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if external is None:
        onnx.save(made, path)
    else:
        onnx.save(made, path, save_as_external_data=True, location=external, size_threshold=100)
    return path
