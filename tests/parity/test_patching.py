"""TransformerLens's own patching and head detection on our model: every function, beside the same one on its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from graphlens.torch import HookedTransformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from lens_oracle import oracle
    from transformer_lens import head_detector, patching

PROMPT = "When John and Mary went to the store, John gave a drink to"
OTHER = "When John and Mary went to the store, Mary gave a drink to"
NAMED = (
    *("resid_pre", "resid_mid", "attn_out", "mlp_out", "block_every"),
    *(f"attn_head_{part}_by_pos" for part in ("out", "q", "k", "v", "pattern")),
    *(f"attn_head_{part}_all_pos" for part in ("out", "q", "k", "v", "pattern")),
    *("attn_head_pattern_dest_src_pos", "attn_head_all_pos_every", "attn_head_by_pos_every"),
)
FUNCTIONS = [name for name in dir(patching) if name.startswith("get_act_patch_")]
HEADS = ("previous_token_head", "duplicate_token_head", "induction_head")


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "tqdm", lambda items, **_: items)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert isinstance(found, torch.Tensor)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.fixture(scope="module")
def pair(odd_hooked: Path, odd_checkpoint: Path) -> tuple[HookedTransformer, Any]:
    """A random model of odd sizes, where every patch has an effect."""
    return HookedTransformer.from_onnx(odd_hooked, "cpu"), oracle(odd_checkpoint)


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 7] - logits[0, -1, 60]


def inputs(either: Any) -> tuple[torch.Tensor, Any, Callable[[torch.Tensor], torch.Tensor]]:
    """Corrupted tokens, the clean run's cache, the metric."""
    clean, corrupted = torch.tensor([[3, 14, 15, 92]]), torch.tensor([[65, 35, 89, 79]])
    return corrupted, either.run_with_cache(clean)[1], metric


def test_these_are_the_functions_that_transformerlens_has() -> None:
    assert {f"get_act_patch_{name}" for name in NAMED} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_patching(pair: tuple[HookedTransformer, Any], name: str) -> None:
    found, expected = (getattr(patching, name)(either, *inputs(either)) for either in pair)
    close(found, expected)
    assert float(expected.std()) > 1e-2, "patching changes nothing, so this tests nothing"


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_either_cache_can_be_patched_from(pair: tuple[HookedTransformer, Any], whose: str) -> None:
    model, lens = pair
    tokens, cache, measure = inputs(model)
    if whose == "theirs":
        cache = transformer_lens.ActivationCache(dict(cache.items()), model)
    close(
        patching.get_act_patch_resid_pre(model, tokens, cache, measure),
        patching.get_act_patch_resid_pre(lens, *inputs(lens)),
    )


def test_the_generic_function_by_an_index(pair: tuple[HookedTransformer, Any]) -> None:
    index = pd.DataFrame([[0, 1], [2, 2], [1, 0]], columns=["layer", "pos"])
    found, expected = (
        patching.generic_activation_patch(
            either, *inputs(either), patching.layer_pos_patch_setter, "resid_mid", index_df=index
        )
        for either in pair
    )
    assert found.shape == (3,)
    close(found, expected)


def test_the_generic_function_by_axes(pair: tuple[HookedTransformer, Any]) -> None:
    (found, frame), (expected, other) = (
        patching.generic_activation_patch(
            either,
            *inputs(either),
            patching.layer_head_vector_patch_setter,
            "z",
            index_axis_names=["layer", "head"],
            return_index_df=True,
        )
        for either in pair
    )
    close(found, expected)
    pd.testing.assert_frame_equal(frame, other)


# Heads


@pytest.mark.parametrize("pattern", HEADS)
@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
def test_detecting_heads(
    model: HookedTransformer, lens: Any, pattern: Any, measure: Any, exclude_bos: bool, exclude_current_token: bool
) -> None:
    for heads in (None, [(0, 1), (3, 2)], {2: [0, 3]}):
        found, expected = (
            head_detector.detect_head(
                either,
                PROMPT,
                pattern,
                heads,
                exclude_bos=exclude_bos,
                exclude_current_token=exclude_current_token,
                error_measure=measure,
            )
            for either in (model, lens)
        )
        close(found, expected)


def test_detecting_heads_in_several_prompts_from_a_cache_and_by_a_pattern(model: HookedTransformer, lens: Any) -> None:
    length = model.to_tokens(PROMPT).shape[1]
    calls: list[Callable[[Any], torch.Tensor]] = [
        lambda either: head_detector.detect_head(either, [PROMPT, OTHER], "induction_head"),
        lambda either: head_detector.detect_head(
            either, PROMPT, "previous_token_head", cache=either.run_with_cache(PROMPT, remove_batch_dim=True)[1]
        ),
        lambda either: head_detector.detect_head(either, PROMPT, torch.tril(torch.ones(length, length), -1)),
    ]
    for call in calls:
        close(call(model), call(lens))
