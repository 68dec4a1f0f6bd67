"""Norms, activations, rotary embeddings and embedding layers that were fused compute the same after they are written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fused import MICROSOFT, RNG, Array, Fused, difference, normal, run_unfused, same

B, S, D = 3, 5, 24


def x(seed: int = 0, dtype: Any = np.float32) -> Array:
    return normal(seed, B, S, D, dtype=dtype) + np.asarray(0.5, dtype)


def weight(seed: int = 1, width: int = D, dtype: Any = np.float32) -> Array:
    return normal(seed, width, dtype=dtype)


@pytest.mark.parametrize("axis", [-1, -2, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(axis: int, bias: bool) -> None:
    shape = (S, D) if axis in (-2, 1) else (D,)
    inputs = [x(), normal(1, *shape), normal(2, *shape) if bias else None]
    attributes = {"axis": axis, "epsilon": 1e-3}
    same(Fused("LayerNormalization", inputs, 1, "", attributes=attributes, constants=(1, 2)))


def test_outputs_of_layer_norm() -> None:
    fused = Fused("LayerNormalization", [x(), weight(), weight(2)], 3, "")
    same(fused)
    same(Fused("LayerNormalization", [x(), weight(), weight(2)], 3, "", left_out=(1,)))


@pytest.mark.parametrize("operator", ["LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"])
def test_half_norms_are_computed_in_float(operator: str) -> None:
    inputs = [x(dtype=np.float16) * np.float16(40), weight(dtype=np.float16)]
    same(Fused(operator, inputs, 1, "", 23), tolerance=2e-3)


@pytest.mark.parametrize("operator", ["SimplifiedLayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("axis", [-1, 2])
def test_rms_norm(operator: str, axis: int) -> None:
    same(Fused(operator, [x(), weight()], 1, "", 23, {"axis": axis, "epsilon": 1e-3}))


@pytest.mark.parametrize(("of_x", "of_weight"), [(np.float16, np.float32), (np.float32, np.float16)])
def test_a_simplified_norm_has_the_type_of_its_weight(of_x: Any, of_weight: Any) -> None:
    fused = Fused("SimplifiedLayerNormalization", [x(dtype=of_x), weight(dtype=of_weight)], 1, "", 17)
    assert same(fused, tolerance=2e-3)[0].dtype == of_weight


def test_inverse_scale_of_a_simplified_norm() -> None:
    same(Fused("SimplifiedLayerNormalization", [x(), weight()], 2, "", 17))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("skip", [(B, S, D), (1, S, D), (S, D)])
def test_skip_layer_norm(skip: tuple[int, ...], beta: bool, bias: bool) -> None:
    inputs = [x(), normal(3, *skip), weight(), weight(4) if beta else None, weight(5) if bias else None]
    same(Fused("SkipLayerNormalization", inputs, 4, attributes={"epsilon": 1e-5}, left_out=(1, 2)))


@pytest.mark.parametrize("bias", [True, False])
def test_skip_rms_norm(bias: bool) -> None:
    inputs = [x(), x(3), weight(), weight(5) if bias else None]
    same(Fused("SkipSimplifiedLayerNormalization", inputs, 4, attributes={"epsilon": 1e-6}, left_out=(1, 2)))
    same(Fused("SkipSimplifiedLayerNormalization", inputs, 1, attributes={"epsilon": 1e-6}))


@pytest.mark.parametrize("operator", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_half_skip_norms(operator: str) -> None:
    inputs = [x(dtype=np.float16), x(3, np.float16), weight(dtype=np.float16)]
    same(Fused(operator, inputs, 4, attributes={"epsilon": 1e-5}, left_out=(1, 2)), tolerance=2e-3)


def test_the_scale_and_the_normalised_value_are_values() -> None:
    """What hook_scale and hook_normalized are found by: a root, and a quotient by it before weight and bias."""
    for operator in ("LayerNormalization", "RMSNormalization"):
        nodes = list(Fused(operator, [x(), weight()], 1, "", 23).unfused().model.graph)
        kinds = [node.op_type for node in nodes]
        assert kinds.count("Sqrt") == kinds.count("Div") == 1
        root, quotient = nodes[kinds.index("Sqrt")], nodes[kinds.index("Div")]
        assert quotient.inputs[1] is root.outputs[0]
        assert nodes[-1].op_type == "Mul"
        assert nodes[-1].inputs[0] is quotient.outputs[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_gelu(bias: bool, dtype: Any) -> None:
    inputs = [x(dtype=dtype) * dtype(3), weight(dtype=dtype) if bias else None]
    same(Fused("FastGelu", inputs), tolerance=1e-5 if dtype is np.float32 else 2e-3)


@pytest.mark.parametrize("operator", ["BiasGelu", "Gelu", "QuickGelu"])
def test_other_gelus(operator: str) -> None:
    same(Fused(operator, [x() * 3, weight()] if operator == "BiasGelu" else [x() * 3]))


def test_slope_of_quick_gelu() -> None:
    same(Fused("QuickGelu", [x() * 3], attributes={"alpha": 1.0}))
    same(Fused("QuickGelu", [x() * 3], attributes={"alpha": -2.5}))


# Rotary embeddings

HEADS, HEAD, LONGEST = 3, 16, 11


def cache(width: int, dtype: Any = np.float32) -> tuple[Array, Array]:
    angles = np.outer(np.arange(LONGEST), 1.0 / 7 ** np.arange(width // 2))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("width", [HEAD, 8])
@pytest.mark.parametrize("four", [True, False])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("symbolic", [True, False])
def test_rotary(interleaved: int, width: int, four: bool, offset: bool, symbolic: bool) -> None:
    q = normal(0, B, HEADS, S, HEAD) if four else normal(0, B, S, HEADS * HEAD)
    positions = np.array([4]) if offset else RNG(1).integers(0, LONGEST, (B, S))
    attributes = {"interleaved": interleaved}
    if width != HEAD or not four:
        attributes |= {"num_heads": HEADS, "rotary_embedding_dim": width if width != HEAD else 0}
    constants = () if symbolic else (2, 3)
    inputs = [q, positions, *cache(width)]
    same(Fused("RotaryEmbedding", inputs, attributes=attributes, constants=constants, symbolic=symbolic))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("width", [HEAD, 8])
@pytest.mark.parametrize("four", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_standard_rotary(interleaved: int, width: int, four: bool, positions: bool) -> None:
    q = normal(0, B, HEADS, S, HEAD) if four else normal(0, B, S, HEADS * HEAD)
    where = RNG(1).integers(0, LONGEST, (B, S))
    tables = cache(width) if positions else tuple(table[where] for table in cache(width))
    attributes = {"interleaved": interleaved, "num_heads": HEADS}
    attributes |= {"rotary_embedding_dim": width} if width != HEAD else {}
    inputs = [q, *tables, where if positions else None]
    same(Fused("RotaryEmbedding", inputs, 1, "", 23, attributes))


@pytest.mark.parametrize("domain", ["", MICROSOFT])
def test_half_rotary(domain: str) -> None:
    q, where, tables = (
        normal(0, B, S, HEADS * HEAD, dtype=np.float16),
        RNG(1).integers(0, LONGEST, (B, S)),
        cache(HEAD, np.float16),
    )
    inputs = [q, where, *tables] if domain else [q, *tables, where]
    same(Fused("RotaryEmbedding", inputs, 1, domain, 23, {"num_heads": HEADS}), tolerance=2e-3)


def test_gemma_rotary() -> None:
    """ONNX Runtime has no CPU kernel: NumPy, from the function in the operator's schema."""
    angles = normal(0, B, S, HEAD)
    q, turned_q = (normal(seed, B, HEADS, S, HEAD, dtype=np.float16) for seed in (1, 2))
    k, turned_k = (normal(seed, B, HEADS, S, HEAD, dtype=np.float16) for seed in (3, 4))
    fused = Fused("GemmaRotaryEmbedding", [angles, q, turned_q, k, turned_k], 2)
    cos, sin = (each(angles).astype(np.float16)[:, None] for each in (np.cos, np.sin))
    found = run_unfused(fused)
    for given, turned, one in ((q, turned_q, found[0]), (k, turned_k, found[1])):
        assert difference(one, given * cos + turned * sin) <= 2e-3


# The embedding layer of BERT


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("positions", [(B, S), (1, S), None])
def test_embedding_layer(segments: bool, mask: bool, positions: tuple[int, int] | None) -> None:
    words, places, types = normal(1, 31, D), normal(2, LONGEST, D), normal(3, 2, D)
    tokens = RNG(4).integers(0, 31, (B, S)).astype(np.int32)
    kept = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], np.int32)
    inputs = [
        tokens,
        RNG(5).integers(0, 2, (B, S)).astype(np.int32) if segments else None,
        words,
        places,
        types if segments else None,
        weight(6),
        weight(7),
        kept if mask else None,
        RNG(8).integers(0, LONGEST, positions).astype(np.int32) if positions else None,
    ]
    attributes = {"epsilon": 1e-5}
    same(Fused("EmbedLayerNormalization", inputs, 3, attributes=attributes, constants=(2, 3, 4, 5, 6)))
    same(Fused("EmbedLayerNormalization", inputs, 2, attributes={**attributes, "mask_index_type": int(mask)}))
