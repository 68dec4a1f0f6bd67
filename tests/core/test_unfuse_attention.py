"""ONNX Runtime's Attention, MultiHeadAttention and the standard Attention compute the same after they are written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fused import RNG, Array, Fused, difference, normal, run_unfused, same

B, S, P, H, D = 3, 5, 4, 3, 8
HIDDEN = H * D


def lengths(total: int) -> Array:
    return np.array([total, 2, total - 1], np.int32)


def padding(kind: str, total: int) -> Array | None:
    """A mask of each kind. The last row of the 2-D one has gaps, and its first row is masked whole."""
    if kind == "none":
        return None
    if kind == "lengths":
        return lengths(total)
    if kind == "ends and starts":
        return np.concatenate([lengths(total), np.array([1, 0, 2], np.int32)])
    if kind == "rows":
        mask = RNG(3).integers(0, 2, (B, total)).astype(np.int32)
        mask[0] = 0
        mask[1] = 1
        return mask
    mask = RNG(4).integers(0, 2, (B, S, total)).astype(np.int32)
    mask[0, 1] = 0
    return mask


KINDS = ["none", "lengths", "ends and starts", "rows", "rows and columns"]


def attention(past: bool = False, mask: str = "none", bias: Any = None, wide: int = D, **attributes: Any) -> Fused:
    total = S + (P if past else 0)
    width = 2 * HIDDEN + H * wide
    inputs = [
        normal(0, B, S, 10),
        normal(1, 10, width),
        normal(2, width),
        padding(mask, total),
        normal(5, 2, B, H, P, D) if past else None,
        bias,
    ]
    if wide != D:
        attributes["qkv_hidden_sizes"] = [HIDDEN, HIDDEN, H * wide]
    outputs = 2 if past or wide == D else 1
    return Fused("Attention", inputs, outputs, attributes={"num_heads": H, **attributes}, constants=(1, 2))


@pytest.mark.parametrize("mask", KINDS)
@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_attention(mask: str, past: bool, unidirectional: int) -> None:
    same(attention(past, mask, unidirectional=unidirectional))


def test_attention_without_a_bias_or_constants() -> None:
    fused = attention()
    same(Fused("Attention", [*fused.inputs[:2], None], 1, attributes={"num_heads": H}))
    same(Fused("Attention", [*fused.inputs[:2], None], 1, attributes={"num_heads": H}, symbolic=False))


@pytest.mark.parametrize("mask", KINDS)
def test_options_of_attention(mask: str) -> None:
    same(attention(mask=mask, scale=0.3, mask_filter_value=-5.0))
    same(attention(mask=mask, wide=11))
    same(attention(mask=mask, wide=11, unidirectional=1, mask_filter_value=float(np.finfo(np.float32).min)))
    same(attention(mask=mask, mask_filter_value=float(np.finfo(np.float32).min)))


@pytest.mark.parametrize("shape", [(B, H), (1, H), (B, 1), (1, 1)])
@pytest.mark.parametrize("mask", ["none", "rows"])
def test_bias_of_attention(shape: tuple[int, int], mask: str) -> None:
    same(attention(mask=mask, bias=normal(6, *shape, S, S)))


@pytest.mark.parametrize("past", [True, False])
def test_mask_of_the_longest_text(past: bool) -> None:
    """ONNX Runtime's CPU kernel refuses it: the same as the part of it that is meant, by the schema."""
    total = S + (P if past else 0)
    whole = RNG(8).integers(0, 2, (B, 1, 20, 20)).astype(np.int32)
    fused = attention(past, "rows and columns")
    part = whole[:, 0, total - S : total, :total]
    of_part = Fused("Attention", [*fused.inputs[:3], part, *fused.inputs[4:]], 2, attributes=fused.attributes)
    of_whole = Fused("Attention", [*fused.inputs[:3], whole, *fused.inputs[4:]], 2, attributes=fused.attributes)
    for left, right in zip(run_unfused(of_whole), same(of_part), strict=True):
        assert difference(left, right) <= 1e-6


def test_one_query_after_a_past() -> None:
    inputs = [normal(0, B, 1, 10), normal(1, 10, 3 * HIDDEN), normal(2, 3 * HIDDEN), None, normal(5, 2, B, H, P, D)]
    same(Fused("Attention", inputs, 2, attributes={"num_heads": H, "unidirectional": 1}))


def multi_head(
    past: bool = False,
    mask: str = "none",
    bias: bool = False,
    keys: int = 7,
    wide: int = D,
    score: Any = None,
    **attributes: Any,
) -> Fused:
    total = keys + (P if past else 0)
    given = padding(mask, total)
    inputs = [
        normal(0, B, S, HIDDEN),
        normal(1, B, keys, HIDDEN),
        normal(2, B, keys, H * wide),
        normal(3, 2 * HIDDEN + H * wide) if bias else None,
        given,
        score,
        normal(5, B, H, P, D) if past else None,
        normal(6, B, H, P, wide) if past else None,
    ]
    return Fused("MultiHeadAttention", inputs, 3, attributes={"num_heads": H, **attributes})


@pytest.mark.parametrize("mask", ["none", "lengths", "rows", "rows and columns"])
@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("unidirectional", [0, 1])
def test_multi_head(mask: str, past: bool, bias: bool, unidirectional: int) -> None:
    for keys in (S, 7, 3):
        same(multi_head(past, mask, bias, keys=keys, unidirectional=unidirectional))


@pytest.mark.parametrize("mask", ["none", "rows"])
def test_options_of_multi_head(mask: str) -> None:
    same(multi_head(mask=mask, scale=0.3, mask_filter_value=-5.0))
    same(multi_head(mask=mask, mask_filter_value=float(np.finfo(np.float32).min)))
    same(multi_head(mask=mask, wide=11, bias=True))
    same(multi_head(mask=mask, score=normal(8, B, H, S, 7)))
    same(multi_head(True, mask, score=normal(8, 1, 1, S, 7 + P)))


def test_keys_that_are_split_into_heads() -> None:
    inputs = [normal(0, B, S, HIDDEN), normal(1, B, H, 7, D), normal(2, B, H, 7, D)]
    same(Fused("MultiHeadAttention", inputs, attributes={"num_heads": H}))


def test_scores_of_multi_head() -> None:
    fused = multi_head(mask="rows")
    same(Fused("MultiHeadAttention", fused.inputs, 4, attributes=fused.attributes, typed=(3,)))


def test_packed_queries_and_keys() -> None:
    """ONNX Runtime has no CPU kernel: the same as separate ones, from the layout in the operator's schema."""
    q, k, v = (normal(seed, B, S, HIDDEN) for seed in range(3))
    expected = same(Fused("MultiHeadAttention", [q, k, v], attributes={"num_heads": H}))[0]
    parts = [part.reshape(B, S, H, D) for part in (q, k, v)]
    packed = Fused("MultiHeadAttention", [np.stack(parts, 3)], attributes={"num_heads": H})
    keys = Fused("MultiHeadAttention", [q, np.stack(parts[1:], 3)], attributes={"num_heads": H})
    assert difference(run_unfused(packed)[0], expected) <= 1e-6
    assert difference(run_unfused(keys)[0], expected) <= 1e-6


def test_what_is_inside() -> None:
    """One Softmax, between the two products of a [b, heads, s, d_head] layout."""
    for fused in (attention(True, "rows", unidirectional=1), multi_head(mask="rows", bias=True), standard(is_causal=1)):
        nodes = list(fused.unfused().model.graph)
        kinds = [node.op_type for node in nodes]
        assert kinds.count("Softmax") == 1
        products = [node for node in nodes if node.op_type == "MatMul" and len(node.outputs[0].shape or ()) == 4]
        assert len(products) == 2
        assert products[1].inputs[0] is nodes[kinds.index("Softmax")].outputs[0]


# The standard operator


def standard(
    past: bool = False,
    groups: int = H,
    four: bool = False,
    mask: Array | None = None,
    outputs: int = 1,
    opset: int = 23,
    keys: int = S,
    dtype: Any = np.float32,
    ends: Array | None = None,
    **attributes: Any,
) -> Fused:
    heads = 2 * groups if groups != H else H

    def of(seed: int, count: int, length: int) -> Array:
        whole = normal(seed, B, count, length, D, dtype=dtype)
        return whole if four else whole.transpose(0, 2, 1, 3).reshape(B, length, count * D)

    if not four:
        attributes |= {"q_num_heads": heads, "kv_num_heads": groups}
    inputs = [
        of(0, heads, S),
        of(1, groups, keys),
        of(2, groups, keys),
        mask,
        normal(5, B, groups, P, D, dtype=dtype) if past else None,
        normal(6, B, groups, P, D, dtype=dtype) if past else None,
        ends,
    ]
    return Fused("Attention", inputs, outputs, "", opset, attributes, symbolic=not four)


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("is_causal", [0, 1])
@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("groups", [H, 2])
@pytest.mark.parametrize("four", [True, False])
def test_standard_attention(opset: int, is_causal: int, past: bool, groups: int, four: bool) -> None:
    same(standard(past, groups, four, outputs=3 if past else 1, opset=opset, is_causal=is_causal))


def booleans(*shape: int) -> Array:
    mask = RNG(9).integers(0, 2, shape).astype(bool)
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("is_causal", [0, 1])
@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (H,), (1, 1), (B, 1), (B, H)])
def test_masks_of_standard_attention(kind: str, is_causal: int, past: bool, lead: tuple[int, ...]) -> None:
    shape = (*lead, S, S + (P if past else 0))
    mask = booleans(*shape) if kind == "bool" else normal(9, *shape)
    same(standard(past, mask=mask, is_causal=is_causal, outputs=3 if past else 1))


@pytest.mark.parametrize("is_causal", [0, 1])
@pytest.mark.parametrize("masked", [False, -np.inf, np.finfo(np.float32).min])
def test_a_row_that_is_masked_whole(masked: float, is_causal: int) -> None:
    mask = booleans(B, 1, S, S)
    mask[1, 0, 2] = False
    found = same(
        standard(mask=mask if masked is False else np.where(mask, 0, masked).astype(np.float32), is_causal=is_causal)
    )
    assert not found[0][1, 2].any()


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("opset", [23, 24])
def test_what_standard_attention_shows(mode: int, softcap: float, opset: int) -> None:
    mask = normal(9, B, H, S, S + P)
    same(
        standard(
            True, mask=mask, outputs=4, opset=opset, qk_matmul_output_mode=mode, softcap=softcap, scale=0.2, is_causal=0
        )
    )


def test_other_keys_than_queries() -> None:
    same(standard(keys=8, mask=normal(9, S, 8)))
    same(standard(keys=8, is_causal=1))
    same(standard(keys=3, is_causal=1))


@pytest.mark.parametrize("precision", [{}, {"softmax_precision": 1}])
def test_half_standard_attention(precision: dict[str, int]) -> None:
    same(standard(dtype=np.float16, is_causal=1, **precision), tolerance=3e-3)
    same(standard(True, 2, dtype=np.float16, outputs=3, mask=booleans(S, S + P), **precision), tolerance=3e-3)


def test_lengths_of_keys() -> None:
    same(standard(opset=24, ends=np.array([5, 0, 3])))
    same(standard(opset=24, ends=np.array([5, 2, 3])))
    for keys in (5, 8):
        same(standard(opset=24, keys=keys, ends=np.array([5, 2, 3]), is_causal=1))
        same(standard(opset=24, keys=keys, groups=2, four=True, ends=np.array([5, 0, keys]), is_causal=1, softcap=0.5))
    same(standard(opset=24, ends=np.array([5, 2, 3]), mask=normal(9, B, 1, S, S)))
