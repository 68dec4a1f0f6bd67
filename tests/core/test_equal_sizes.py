"""Batch, positions, layers and heads of one size: no axis is taken for another where every shape would fit.

The other suites use odd sizes, which a mixed-up axis fails loudly. Here it would only give other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, Patch, patching
from graphlens.patching import Cache

ALL = slice(None)
# A sweep of TransformerLens's, the hook point it patches, and what it patches there at (place, place).
SWEEPS: list[tuple[Callable[..., Any], str, Callable[..., tuple[Any, ...]]]] = [
    (patching.get_act_patch_resid_pre, "hook_resid_pre", lambda pos: (ALL, pos)),
    (patching.get_act_patch_attn_head_out_all_pos, "attn.hook_z", lambda head: (ALL, ALL, head)),
    (patching.get_act_patch_attn_head_out_by_pos, "attn.hook_z", lambda pos, head: (ALL, pos, head)),
    (patching.get_act_patch_attn_head_pattern_all_pos, "attn.hook_pattern", lambda head: (ALL, head)),
    (patching.get_act_patch_attn_head_pattern_by_pos, "attn.hook_pattern", lambda head, pos: (ALL, head, pos)),
]


@pytest.fixture(scope="module")
def size(tiny: HookedTransformer) -> int:
    assert tiny.cfg.n_layers == tiny.cfg.n_heads
    return tiny.cfg.n_heads


@pytest.fixture(scope="module")
def corrupted(tiny: HookedTransformer, size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, tiny.cfg.d_vocab, (size, size))


@pytest.fixture(scope="module")
def clean(tiny: HookedTransformer, size: int) -> Cache:
    return tiny.run_with_cache(np.random.default_rng(2).integers(0, tiny.cfg.d_vocab, (size, size)))[1]


def metric(logits: np.ndarray) -> float:
    return float((logits[:, -1] @ np.linspace(-1, 1, logits.shape[-1])).sum())


@pytest.mark.parametrize(("get", "name", "index"), SWEEPS, ids=[get.__name__ for get, _, _ in SWEEPS])
def test_a_sweep_is_its_loop(
    get: Callable[..., Any],
    name: str,
    index: Callable[..., tuple[Any, ...]],
    tiny: HookedTransformer,
    size: int,
    corrupted: np.ndarray,
    clean: Cache,
) -> None:
    def patched(layer: int, place: tuple[int, ...]) -> float:
        def patch(value: np.ndarray, hook: Any) -> None:
            value[index(*place)] = clean[hook.name][index(*place)]

        return metric(tiny.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.{name}", patch)]))

    found = np.asarray(get(tiny, corrupted, clean, metric))
    assert set(found.shape) == {size}
    expected = np.array([patched(layer, place) for layer, *place in np.ndindex(found.shape)]).reshape(found.shape)
    for axis in range(1, found.ndim):  # the test could tell
        assert np.abs(expected - expected.swapaxes(0, axis)).max() > 0.1 * expected.std()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", ["pos, d_model", "batch, 1, d_model"])
def test_a_patch_is_aligned_at_its_last_axes(
    shape: str, tiny: HookedTransformer, size: int, corrupted: np.ndarray
) -> None:
    value = np.random.default_rng(3).normal(size=(size, tiny.cfg.d_model)).astype(np.float32)
    source = value if shape.startswith("pos") else value[:, None]
    name = "blocks.1.hook_resid_pre"

    def run(put: np.ndarray) -> np.ndarray:
        whole = np.broadcast_to(put, (size, size, tiny.cfg.d_model)).copy()
        return tiny.run_with_hooks(corrupted, fwd_hooks=[(name, lambda x, hook: whole)])

    by_position, by_row = run(value[None]), run(value[:, None])
    assert np.abs(by_position - by_row).max() > 1
    found = tiny.run_with_interventions(corrupted, [Patch(name, source)])
    np.testing.assert_array_equal(found, by_position if shape.startswith("pos") else by_row)
