"""A small decoder as other programs export one, made with onnx.helper, and the same in NumPy, hook by hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
LAYERS, HEADS, D_HEAD, D_MLP, VOCAB, POSITIONS = 2, 3, 5, 22, 31, 20
D_MODEL = HEADS * D_HEAD
EPS, LOWEST = 1e-4, np.float32(-3.4e38)
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def weights(seed: int = 0) -> dict[str, Array]:
    """The weights by the names that the file gives them, none of which says what it is."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.4, shift: float = 0.0) -> Array:
        return (random.normal(size=shape) * scale + shift).astype(np.float32)

    found = {"w0": normal(VOCAB, D_MODEL), "w1": normal(POSITIONS, D_MODEL)}
    for layer in range(LAYERS):
        found |= {
            f"l{layer}.a": normal(D_MODEL, shift=1.0, scale=0.2),
            f"l{layer}.b": normal(D_MODEL),
            f"l{layer}.c": normal(D_MODEL, 3 * D_MODEL),
            f"l{layer}.d": normal(3 * D_MODEL),
            f"l{layer}.e": normal(D_MODEL, D_MODEL),
            f"l{layer}.f": normal(D_MODEL),
            f"l{layer}.g": normal(D_MODEL, shift=1.0, scale=0.2),
            f"l{layer}.h": normal(D_MODEL),
            f"l{layer}.i": normal(D_MODEL, D_MLP),
            f"l{layer}.j": normal(D_MLP),
            f"l{layer}.k": normal(D_MLP, D_MODEL),
            f"l{layer}.l": normal(D_MODEL),
        }
    return found | {
        "w2": normal(D_MODEL, shift=1.0, scale=0.2), "w3": normal(D_MODEL), "w4": normal(D_MODEL, VOCAB)
    }  # fmt: skip


@dataclass
class Made:
    """A file under construction."""

    past: bool = True
    masked: bool = True
    positioned: bool = True
    integers: int = INT64
    logits: bool = True
    prefix: str = ""
    lowest: float = float(LOWEST)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        out = name or f"{self.prefix}v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], name=f"n{len(self.nodes)}", **attributes))
        return out

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        outs = [f"{self.prefix}v{len(self.nodes)}.{index}" for index in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, outs, name=f"n{len(self.nodes)}", **attributes))
        return outs

    def k(self, content: Any, dtype: Any = np.int64) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.asarray(content, dtype)
        return name


def decoder(path: Path, external: bool = False, seed: int = 0, **options: Any) -> Path:
    """Writes the file.

    Args:
        path: The file.
        external: True puts its weights into a file beside it.
        seed: Of its weights.
        **options: Fields of Made: without past, without a mask, without positions, with int32 inputs, without a head,
            what the names of its values begin with, and what scores of masked tokens are.
    """
    m = Made(**options)
    numbers = weights(seed)
    scale = m.k(D_HEAD**-0.5, np.float32)
    length = m.op("Shape", "input_ids", start=1, end=2)
    before = m.op("Shape", "past.0.key", start=2, end=3) if m.past else m.k([0])
    total = m.op("Add", before, length)
    zero, one = m.k(0), m.k(1)
    queries = m.op("Range", m.op("Squeeze", before), m.op("Squeeze", total), one)
    keys = m.op("Range", zero, m.op("Squeeze", total), one)
    seen = m.op("LessOrEqual", keys, m.op("Unsqueeze", queries, m.k([1])))
    if m.masked:
        real = m.op("Cast", m.op("Unsqueeze", "attention_mask", m.k([1, 2])), to=TensorProto.BOOL)
        seen = m.op("And", seen, real)
    mask = m.op("Where", seen, m.k(0, np.float32), m.k(m.lowest, np.float32))
    places = "position_ids" if m.positioned else m.op("Unsqueeze", queries, m.k([0]))
    x = m.op("Add", m.op("Gather", "w0", "input_ids"), m.op("Gather", "w1", places))
    presents = []
    for layer in range(LAYERS):
        w = f"l{layer}."
        normed = m.op("LayerNormalization", x, w + "a", w + "b", epsilon=EPS)
        qkv = m.op("Add", m.op("MatMul", normed, w + "c"), w + "d")
        heads = []
        for part in m.ops("Split", 3, qkv, axis=2):
            apart = m.op("Reshape", part, m.k([0, 0, HEADS, D_HEAD]))
            heads.append(m.op("Transpose", apart, perm=[0, 2, 1, 3]))
        q, k, v = heads
        if m.past:
            k = m.op("Concat", f"past.{layer}.key", k, axis=2, name=f"now.{layer}.key")
            v = m.op("Concat", f"past.{layer}.value", v, axis=2, name=f"now.{layer}.value")
            presents += [k, v]
        scores = m.op("Mul", m.op("MatMul", q, m.op("Transpose", k, perm=[0, 1, 3, 2])), scale)
        pattern = m.op("Softmax", m.op("Add", scores, mask), axis=-1)
        z = m.op("Transpose", m.op("MatMul", pattern, v), perm=[0, 2, 1, 3])
        flat = m.op("Reshape", z, m.k([0, 0, D_MODEL]))
        x = m.op("Add", x, m.op("Add", m.op("MatMul", flat, w + "e"), w + "f"))
        normed = m.op("LayerNormalization", x, w + "g", w + "h", epsilon=EPS)
        neurons = m.op("Relu", m.op("Add", m.op("MatMul", normed, w + "i"), w + "j"))
        x = m.op("Add", x, m.op("Add", m.op("MatMul", neurons, w + "k"), w + "l"))
    last = m.op("LayerNormalization", x, "w2", "w3", epsilon=EPS, name=None if m.logits else "states")
    if m.logits:
        m.op("MatMul", last, "w4", name="scores")
    else:
        del numbers["w4"]
    _save(m, numbers, presents, path, external)
    return path


def _save(m: Made, numbers: Mapping[str, Array], presents: list[str], path: Path, external: bool) -> None:
    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value("input_ids", m.integers, "batch", "sequence")]
    if m.masked:
        inputs.append(value("attention_mask", m.integers, "batch", "total"))
    if m.positioned:
        inputs.append(value("position_ids", m.integers, "batch", "sequence"))
    if m.past:
        names = [f"past.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
        inputs += [value(name, FLOAT, "batch", HEADS, "past", D_HEAD) for name in names]
    end = value("scores", FLOAT, "batch", "sequence", VOCAB)
    outputs = [end if m.logits else value("states", FLOAT, "batch", "sequence", D_MODEL)]
    outputs += [value(name, FLOAT, "batch", HEADS, "total", D_HEAD) for name in presents]
    tensors = [numpy_helper.from_array(array, name) for name, array in {**numbers, **m.constants}.items()]
    graph = helper.make_graph(m.nodes, "main", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, producer_name="elsewhere", ir_version=8)
    if m.integers == INT32:  # Unsqueeze and Gather take either
        onnx.checker.check_model(model)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=0)
    else:
        onnx.save(model, path)


Edit = Callable[[str, Array], Array]


def forward(
    ids: Array,
    mask: Array | None = None,
    positions: Array | None = None,
    past: Mapping[str, Array] | None = None,
    edit: Edit = lambda name, value: value,
    seed: int = 0,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """The same in NumPy.

    Args:
        ids: [b, p].
        mask: [b, past + p], 1 at real tokens; all by default.
        positions: [b, p]; those that count the real tokens by default.
        past: ``past.L.key`` and ``.value`` [b, heads, past, d_head].
        edit: Makes of each hook point's name and activation the one to go on with.
        seed: Of the weights.

    Returns:
        Logits, the activations by hook point, and keys and values of all tokens so far by ``L.key`` and ``L.value``.
    """
    w = {name: array.astype(np.float64) for name, array in weights(seed).items()}
    hooks: dict[str, Array] = {}

    def at(name: str, value: Array) -> Array:
        hooks[name] = edit(name, value.copy())
        return hooks[name]

    before = 0 if past is None else past["past.0.key"].shape[2]
    mask = np.ones((len(ids), before + ids.shape[1]), np.int64) if mask is None else mask
    if positions is None:
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, before:]
    counted = np.arange(mask.shape[1])
    seen = (counted <= counted[before:, None]) & (mask != 0)[:, None, None, :]
    now: dict[str, Array] = {}
    x = at("hook_embed", w["w0"][ids]) + at("hook_pos_embed", w["w1"][positions])
    for layer in range(LAYERS):
        b, p = f"blocks.{layer}.", f"l{layer}."
        x = at(b + "hook_resid_pre", x)
        qkv = _norm(x, w[p + "a"], w[p + "b"], b + "ln1", at) @ w[p + "c"] + w[p + "d"]
        q, k, v = (
            at(f"{b}attn.hook_{name}", part.reshape(*ids.shape, HEADS, D_HEAD)).transpose(0, 2, 1, 3)
            for name, part in zip("qkv", np.split(qkv, 3, -1), strict=True)
        )
        if past is not None:
            k, v = (
                np.concatenate([past[f"past.{layer}.{name}"].astype(np.float64), part], 2)
                for name, part in (("key", k), ("value", v))
            )
        now |= {f"{layer}.key": k, f"{layer}.value": v}
        scores = np.where(seen, q @ k.swapaxes(-1, -2) * D_HEAD**-0.5, float(LOWEST))
        scores = at(b + "attn.hook_attn_scores", scores)
        raised = np.exp(scores - scores.max(-1, keepdims=True))
        pattern = at(b + "attn.hook_pattern", raised / raised.sum(-1, keepdims=True))
        z = at(b + "attn.hook_z", (pattern @ v).transpose(0, 2, 1, 3))
        x = at(b + "hook_resid_mid", x + at(b + "hook_attn_out", z.reshape(*ids.shape, -1) @ w[p + "e"] + w[p + "f"]))
        pre = at(b + "mlp.hook_pre", _norm(x, w[p + "g"], w[p + "h"], b + "ln2", at) @ w[p + "i"] + w[p + "j"])
        post = at(b + "mlp.hook_post", np.maximum(pre, 0))
        x = at(b + "hook_resid_post", x + at(b + "hook_mlp_out", post @ w[p + "k"] + w[p + "l"]))
    last = at("unembed.hook_in", _norm(x, w["w2"], w["w3"], "ln_final", at))
    return at("unembed.hook_out", last @ w["w4"]), hooks, now


def _norm(x: Array, weight: Array, bias: Array, name: str, at: Callable[[str, Array], Array]) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scale = at(f"{name}.hook_scale", np.sqrt((centred**2).mean(-1, keepdims=True) + EPS))
    return at(f"{name}.hook_normalized", centred / scale) * weight + bias
