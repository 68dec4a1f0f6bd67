"""What holds for every input: reading changes nothing, parts sum to wholes, and a run in pieces is the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphlens.file.bridge import BRIDGE, BRIDGE_BLOCK
from graphlens.file.names import canonical
from graphlens.model.kv_cache import KeyValueCache
from tests.models import MODEL

few = settings(max_examples=8, deadline=None, derandomize=True, database=None)
CFG = MODEL.cfg
LAYERS = CFG.n_layers
NAMES = list(MODEL.hook_dict)
TWINS = [
    *(name for name, twin in BRIDGE.items() if twin in NAMES),
    *(f"blocks.1.{name}" for name, twin in BRIDGE_BLOCK.items() if f"blocks.1.{twin}" in NAMES),
]


@st.composite
def prompts(draw: Callable[..., Any], least: int = 1) -> np.ndarray:
    """Tokens [b, p]."""
    shape = draw(st.integers(1, 3)), draw(st.integers(least, 24))
    return np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, CFG.d_vocab, shape)


@st.composite
def padded(draw: Callable[..., Any], least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [b, p] and a mask [b, p] with padding on the left, at least one token in each row."""
    tokens = draw(prompts(least))
    pads = np.asarray([draw(st.integers(0, tokens.shape[1] - 1)) for _ in tokens])
    return tokens, (np.arange(tokens.shape[1]) >= pads[:, None]).astype(np.int64)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 5e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def keep(activation: np.ndarray, hook: Any) -> np.ndarray:
    return activation


def shake(activation: np.ndarray, hook: Any) -> np.ndarray:
    """Another value at every element."""
    return activation + np.random.default_rng(0).standard_normal(activation.shape).astype(activation.dtype)


@few
@given(prompts(), st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
def test_reading_changes_nothing(tokens: np.ndarray, names: list[str]) -> None:
    expected = MODEL.forward(tokens)
    for names_filter in (None, names, lambda name: name in names):
        logits, cache = MODEL.run_with_cache(tokens, names_filter=names_filter)
        np.testing.assert_array_equal(logits, expected)
        assert len(cache) == (len(NAMES) if names_filter is None else len(set(names)))
    np.testing.assert_array_equal(MODEL.forward(tokens), expected)


@settings(few, max_examples=25)
@given(prompts(), st.sampled_from(NAMES))
def test_a_hook_that_gives_back_what_it_got_is_no_hook(tokens: np.ndarray, name: str) -> None:
    fired: list[str] = []

    def hand_back(activation: np.ndarray, hook: Any) -> np.ndarray:
        fired.append(hook.name)
        return activation

    close(MODEL.run_with_hooks(tokens, fwd_hooks=[(name, hand_back)]), MODEL.forward(tokens), 1e-6)
    assert fired == [name]


@pytest.mark.parametrize("name", TWINS)
def test_a_hook_on_another_name_of_a_point_is_a_hook_on_the_point(name: str, tokens: np.ndarray) -> None:
    twin = canonical(name)
    assert twin != name
    expected = MODEL.run_with_hooks(tokens, fwd_hooks=[(twin, shake)])
    np.testing.assert_array_equal(MODEL.run_with_hooks(tokens, fwd_hooks=[(name, shake)]), expected)
    assert np.abs(expected - MODEL.forward(tokens)).max() > 1e-3
    _, cache = MODEL.run_with_cache(tokens, names_filter=name)
    assert list(cache) == [twin]


@pytest.mark.parametrize("layer", range(-LAYERS, LAYERS + 1))
@pytest.mark.parametrize("masked", [False, True])
def test_a_model_cut_at_any_layer_is_the_model(layer: int, masked: bool) -> None:
    @settings(few, max_examples=3)
    @given(padded())
    def check(pair: tuple[np.ndarray, np.ndarray]) -> None:
        tokens, mask = pair
        options: dict[str, Any] = {"attention_mask": mask} if masked else {}
        whole, cache = MODEL.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_resid_pre"), **options
        )
        middle = MODEL.forward(tokens, stop_at_layer=layer, **options)
        real = mask == 1 if masked else np.ones_like(mask, bool)
        if layer != LAYERS:
            close(middle[real], cache["resid_pre", layer % LAYERS][real], 1e-5)
        close(MODEL.forward(middle, start_at_layer=layer, **options)[real], whole[real], 1e-5)

    check()


@few
@given(padded(), st.integers(0, LAYERS), st.integers(0, LAYERS))
def test_a_model_cut_twice_is_the_model(pair: tuple[np.ndarray, np.ndarray], first: int, second: int) -> None:
    tokens, mask = pair
    first, second = sorted((first, second))
    options: dict[str, Any] = {"attention_mask": mask}
    start = MODEL.forward(tokens, stop_at_layer=first, **options)
    middle = MODEL.forward(start, start_at_layer=first, stop_at_layer=second, **options)
    logits = MODEL.forward(middle, start_at_layer=second, **options)
    close(logits[mask == 1], MODEL.forward(tokens, **options)[mask == 1], 1e-5)


@settings(few, max_examples=15)
@given(padded(), st.data())
def test_logits_with_a_cache_are_those_without(pair: tuple[np.ndarray, np.ndarray], data: st.DataObject) -> None:
    tokens, mask = pair
    length = tokens.shape[1]
    # Anywhere: a piece may be all padding in some rows, or in all of them.
    cuts = sorted({length, *data.draw(st.lists(st.integers(1, length), max_size=5))})
    cache = KeyValueCache.init_cache(CFG, batch_size=len(tokens))
    pieces = [
        MODEL.forward(tokens[:, a:b], attention_mask=mask[:, a:b], past_kv_cache=cache)
        for a, b in zip([0, *cuts], cuts, strict=False)
    ]
    assert cache.length == length
    real = mask == 1
    close(np.concatenate(pieces, 1)[real], MODEL.forward(tokens, attention_mask=mask)[real])


@few
@given(prompts(), st.integers(0, LAYERS), st.booleans())
def test_what_was_written_sums_to_the_residual(tokens: np.ndarray, layer: int, mlp_input: bool) -> None:
    _, cache = MODEL.run_with_cache(tokens)
    mlp_input = mlp_input and layer < LAYERS
    if layer == LAYERS:
        expected = cache["resid_post", LAYERS - 1]
    else:
        expected = cache["resid_mid" if mlp_input else "resid_pre", layer]
    close(cache.decompose_resid(layer, mlp_input=mlp_input).sum(0), expected, 1e-5)


@few
@given(prompts(), st.data())
def test_what_each_part_adds_to_a_logit_difference_sums_to_it(tokens: np.ndarray, data: st.DataObject) -> None:
    right, wrong = (data.draw(st.integers(0, CFG.d_vocab - 1)) for _ in range(2))
    logits, cache = MODEL.run_with_cache(tokens)
    parts = cache.get_full_resid_decomposition(expand_neurons=False)
    found = cache.logit_attrs(parts, tokens=right, incorrect_tokens=wrong).sum(0)
    expected = logits[..., right] - logits[..., wrong]
    # These are of the weights as they are: the norm's own are not folded into W_U, so they are put where they belong.
    direction = MODEL.W_U[:, right] - MODEL.W_U[:, wrong]
    weights = MODEL.weights
    unweighted = cache["ln_final.hook_normalized"]
    close(found, unweighted @ direction, 1e-4)
    whole = (unweighted * weights["ln_final.w"] + weights["ln_final.b"]) @ direction
    close(whole + MODEL.b_U[right] - MODEL.b_U[wrong], expected, 1e-4)
