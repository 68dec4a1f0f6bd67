"""GroupQueryAttention computes the same after it is written out, in prompts and steps, with rows of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fused import RNG, Array, Fused, difference, normal, run, run_unfused, same

B, S, P, G, D, LONGEST = 3, 5, 4, 2, 32, 40
HEADS = 3 * G


def cache(width: int = D, dtype: Any = np.float32) -> tuple[Array, Array]:
    angles = np.outer(np.arange(LONGEST), 1.0 / 7 ** np.arange(width // 2))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def grouped(
    lengths: list[int],
    new: int = S,
    past: int | None = None,
    packed: bool = False,
    rotary: int = 0,
    positions: Array | None = None,
    bias: Array | None = None,
    sink: bool = False,
    outputs: int = 3,
    total: int | None = None,
    dtype: Any = np.float32,
    symbolic: bool = True,
    norms: bool = False,
    **attributes: Any,
) -> Fused:
    """A node for rows of so many tokens each, the new ones counted."""
    rows = len(lengths)
    q, k, v = (normal(seed, rows, new, count * D, dtype=dtype) for seed, count in enumerate((HEADS, G, G)))
    if packed:
        q = np.concatenate([q, k, v], -1)
    inputs = [
        q,
        None if packed else k,
        None if packed else v,
        None if past is None else normal(3, rows, G, past, D, dtype=dtype),
        None if past is None else normal(4, rows, G, past, D, dtype=dtype),
        np.array(lengths, np.int32) - 1,
        np.array(max(lengths) if total is None else total, np.int32),
        *(cache(rotary, dtype) if rotary else (None, None)),
        positions,
        bias,
        normal(6, HEADS, dtype=dtype) if sink else None,
        *((None, None, normal(7, D), normal(8, D)) if norms else ()),
    ]
    attributes = {"num_heads": HEADS, "kv_num_heads": G, "do_rotary": int(rotary > 0), **attributes}
    while inputs[-1] is None:
        inputs.pop()
    return Fused("GroupQueryAttention", inputs, outputs, attributes=attributes, constants=(7, 8), symbolic=symbolic)


def in_text(lengths: list[int], new: int, past: int | None = None) -> dict[int, Array]:
    """Which entries of the outputs stand for tokens: the others are not specified."""
    own = np.array(lengths)[:, None]
    before = np.maximum(own - new, 0)
    rows = (np.arange(new) + before < own)[..., None]
    columns = (np.arange(max(max(lengths), past or 0)) < own)[:, None, :, None]
    return {0: rows, 1: columns, 2: columns}


def test_prompt() -> None:
    for packed in (True, False):
        for symbolic in (True, False):
            same(grouped([S] * B, packed=packed, symbolic=symbolic))
            same(grouped([S] * B, packed=packed, symbolic=symbolic, rotary=D))


@pytest.mark.parametrize("rotary", [D, 0])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_prompt_that_is_padded_on_the_right(rotary: int, packed: bool, interleaved: int) -> None:
    lengths = [5, 2, 4]
    fused = grouped(lengths, packed=packed, rotary=rotary, rotary_interleaved=interleaved)
    same(fused, valid=in_text(lengths, S))


@pytest.mark.parametrize("past", [S + 3, 0])
def test_prompt_with_a_cache(past: int) -> None:
    """Of a past of no tokens, and of one that a prompt does not read."""
    lengths = [S, 2, S]
    same(grouped(lengths, past=past, rotary=D), valid=in_text(lengths, S, past))


@pytest.mark.parametrize("rotary", [D, 0])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("lengths", [[P + 1] * B, [P + 1, 2, P]])
@pytest.mark.parametrize("cache", [P, P + 3])
def test_step(rotary: int, packed: bool, lengths: list[int], cache: int) -> None:
    """One new token after pasts, of rows of one length or of several, in a cache that is full or not."""
    fused = grouped(lengths, 1, cache, packed, rotary)
    same(fused, valid=in_text(lengths, 1, cache))


def test_several_tokens_after_a_past() -> None:
    same(grouped([P + 3], 3, P, rotary=D))
    same(grouped([P + 3], 3, P, local_window_size=2))
    same(grouped([P + 3], 3, P, rotary=D, rotary_interleaved=1, softcap=0.8))


@pytest.mark.parametrize("window", [1, 2, 4, 30])
def test_windows(window: int) -> None:
    lengths = [5, 2, 4]
    same(grouped(lengths, local_window_size=window), valid=in_text(lengths, S))
    lengths = [P + 1, 2, P]
    same(grouped(lengths, 1, P, local_window_size=window), valid=in_text(lengths, 1, P))


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}, {"scale": 0.3}, {"local_window_size": 2}])
def test_sinks_and_smooth_softmax(sink: bool, options: dict[str, float]) -> None:
    options = options if sink else {**options, "smooth_softmax": 1}
    same(grouped([S] * B, sink=sink, **options))
    lengths = [P + 1, 2, P]
    same(grouped(lengths, 1, P, sink=sink, **options), valid=in_text(lengths, 1, P))


def test_softcap_and_scale() -> None:
    same(grouped([S] * B, softcap=0.7, scale=0.9))
    same(grouped([S] * B, softcap=0.7, bias=normal(5, B, HEADS, S, S)))


@pytest.mark.parametrize("shape", [(1, 1), (B, 1), (1, HEADS), (B, HEADS)])
def test_attention_bias(shape: tuple[int, int]) -> None:
    same(grouped([S] * B, bias=normal(5, *shape, S, S)))
    lengths = [P + 1, 2, P]
    same(grouped(lengths, 1, P, bias=normal(5, *shape, 1, P + 1)), valid=in_text(lengths, 1, P))


def resident(length: int, capacity: int, window: int) -> int:
    """How many tokens a cache of a window holds, as the operator's schema says."""
    block = capacity - window + 1
    return length if length <= capacity else length - block * -((capacity - length) // block)


@pytest.mark.parametrize("window", [3, 4])
@pytest.mark.parametrize("slack", [0, 2, 9])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 2, 4]])
def test_cache_of_a_window(window: int, slack: int, lengths: list[int]) -> None:
    """A prompt, or rows of different pasts, and six steps, each over the cache that the one before handed on."""
    capacity = window + slack
    options: dict[str, Any] = {"rotary": D, "local_window_size": window, "sliding_window_cache": 1}
    past: tuple[Array, Array] | None = None
    for step in range(7):
        now = [length + step for length in lengths]
        new = S if step == 0 and len(set(lengths)) == 1 else 1
        fused = grouped(now, new, capacity, **options)
        if past is not None:
            fused = Fused(
                fused.operator,
                [*fused.inputs[:3], *past, *fused.inputs[5:]],
                3,
                attributes=fused.attributes,
                constants=(7, 8),
            )
        valid = in_text(now, new)
        kept = np.array([resident(length, capacity, window) for length in now])[:, None]
        valid[1] = valid[2] = (np.arange(capacity) < kept)[:, None, :, None]
        found = same(fused, valid=valid)
        past = (found[1], found[2])


def test_a_cache_that_is_too_small_for_its_window_grows() -> None:
    """The kernel refuses that; what is handed on is a past for the next step, as a cache of all tokens is."""
    options: dict[str, Any] = {"rotary": D, "local_window_size": 4}
    expected: list[Array] = []
    for windowed in (0, 1):
        prompt = run_unfused(grouped([S] * B, past=0, sliding_window_cache=windowed, **options))
        step = grouped([S + 1] * B, 1, 0, sliding_window_cache=windowed, **options)
        inputs = [*step.inputs[:3], *prompt[1:], *step.inputs[5:]]
        found = run_unfused(Fused(step.operator, inputs, 3, attributes=step.attributes, constants=(7, 8)))
        expected = expected or found
        assert difference(found[0], expected[0]) <= 1e-5


@pytest.mark.parametrize("windowed", [0, 1])
def test_lengths_of_queries(windowed: int) -> None:
    """Chunks of a text, padded on the right: of each row so many queries are meant."""
    lengths, queries = [7, 3, 4], [3, 1, 2]
    fused = grouped(lengths, 3, 8, rotary=D, local_window_size=4, sliding_window_cache=windowed)
    inputs = [*fused.inputs, *[None] * (16 - len(fused.inputs)), np.array(queries, np.int32)]
    kept = [resident(length, 8, 4) if windowed else length for length in lengths]
    columns = (np.arange(8) < np.array(kept)[:, None])[:, None, :, None]
    valid = {0: (np.arange(3) < np.array(queries)[:, None])[..., None], 1: columns, 2: columns}
    same(Fused(fused.operator, inputs, 3, attributes=fused.attributes, constants=(7, 8)), valid=valid)


def test_given_positions() -> None:
    """In a prompt the kernel reads only the first one: files count from there, for all rows."""
    positions = RNG(3).integers(0, LONGEST, (B, S))
    same(grouped([S] * B, rotary=D, positions=positions))
    same(grouped([S] * B, past=0, rotary=D, positions=positions))
    same(grouped([P + 1] * B, 1, P, rotary=D, positions=positions[:, :1]))
    same(grouped([P + 3], 3, P, rotary=D, positions=positions[:1, :3]))


def test_a_part_of_each_head_turns() -> None:
    same(grouped([S] * B, rotary=D // 2))
    same(grouped([S] * B, rotary=D // 2, rotary_interleaved=1))


def test_half() -> None:
    same(grouped([S] * B, rotary=D, dtype=np.float16), tolerance=2e-3)
    same(grouped([P + 1] * B, 1, P, rotary=D, packed=True, dtype=np.float16), tolerance=2e-3)


@pytest.mark.parametrize("kind", [1, 2])
def test_products_and_pattern_as_output(kind: int) -> None:
    fused = grouped([S] * B, rotary=D, qk_output=kind, outputs=4)
    expected, found = run(fused.proto(), fused.feeds()), run_unfused(fused)
    seen = np.tril(np.ones((S, S), bool))
    for place in range(4):
        assert difference(found[place], expected[place], seen if place == 3 else None) <= 1e-5


def test_not_causal() -> None:
    same(grouped([S] * B, causal=0))
    lengths = [5, 2, 4]
    same(grouped(lengths, causal=0), valid=in_text(lengths, S))


def test_norms_of_queries_and_keys() -> None:
    """ONNX Runtime refuses them on the CPU: queries and keys that NumPy normalised, as the schema says."""
    fused = grouped([S] * B, rotary=D, norms=True, qk_norm_epsilon=0.1, k_norm_epsilon=0.2)
    inputs = list(fused.inputs[:9])
    for place, count, weight, epsilon in ((0, HEADS, fused.inputs[14], 0.1), (1, G, fused.inputs[15], 0.2)):
        given = inputs[place]
        assert given is not None
        split = given.reshape(B, S, count, D)
        root = np.sqrt((split**2).mean(-1, keepdims=True) + np.float32(epsilon))
        inputs[place] = (split / root * weight).reshape(given.shape)
    plain = Fused("GroupQueryAttention", inputs, 3, attributes=grouped([S] * B, rotary=D).attributes, constants=(7, 8))
    for left, right in zip(run_unfused(fused), run(plain.proto(), plain.feeds()), strict=True):
        assert difference(left, right) <= 1e-5
