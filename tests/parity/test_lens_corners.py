"""Small things that scripts of TransformerLens do: caches put together by hand, masks of all positions, weights on their side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens
from transformer_lens.factories.activation_function_factory import ActivationFunctionFactory as TheirFactory
from transformer_lens.hook_points import HookIntrospectionMixin as TheirMixin
from transformer_lens.hook_points import HookPoint as TheirHookPoint
from transformer_lens.utilities.cache import get_pos_offset as their_offset
from transformer_lens.weight_processing import ProcessWeights as TheirProcessing

import graphlens.transformer_lens as ours
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.transformer_lens.config.transformer_lens_config import TransformerLensConfig
from graphlens.transformer_lens.factories.activation_function_factory import ActivationFunctionFactory
from graphlens.transformer_lens.hook_points import HookIntrospectionMixin, HookPoint
from graphlens.transformer_lens.utilities.cache import get_pos_offset
from graphlens.transformer_lens.weight_processing import ProcessWeights
from tests.closeness import close

TOKENS = torch.randint(0, 700, (2, 9), generator=torch.Generator().manual_seed(5))


def both(values: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """The same arrays in a cache of each library."""
    return (
        ours.ActivationCache(dict(values), None),
        transformer_lens.ActivationCache(dict(values), None),  # type: ignore[arg-type]  # no model, as their tests
    )


def drawn(batch: int) -> dict[str, torch.Tensor]:
    return {
        "blocks.0.hook_resid_pre": torch.randn(batch, 5, 4),
        "blocks.0.attn.hook_rel_pos_bias": torch.randn(7, 7),  # of positions, whatever the batch
        "blocks.0.hook_mlp_out": torch.randn(batch, 5, 4),
        "hook_pos_indices": torch.randn(1, 5),
    }


def test_arrays_without_a_batch_axis_stay_when_it_is_dropped() -> None:
    found, expected = (cache.remove_batch_dim() for cache in both(drawn(1)))
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert found["blocks.0.attn.hook_rel_pos_bias"].shape == (7, 7)


def test_several_prompts_keep_their_batch_axis_beside_an_array_of_one_row() -> None:
    found, expected = both(drawn(3))
    with pytest.raises(AssertionError):
        expected.remove_batch_dim()
    with pytest.raises(InputError, match=r"'blocks.0.hook_resid_pre': the batch holds 3 prompts"):
        found.remove_batch_dim()
    assert found.has_batch_dim
    assert found["hook_pos_indices"].shape == (1, 5)


@pytest.mark.parametrize("taken", [1, -1, (1, 3), [0, 2]])
def test_arrays_without_a_batch_axis_stay_when_it_is_sliced(taken: Any) -> None:
    found, expected = (cache.apply_slice_to_batch_dim(taken) for cache in both(drawn(3)))
    assert found.has_batch_dim == expected.has_batch_dim
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((6, 11), {"d_vocab": 11, "d_model": 6}),
        ((11, 6), {"d_vocab": 11, "d_model": 6}),
        ((16, 6), {"d_vocab": 11, "d_model": 6}),  # a padded vocabulary
        ((6, 16), {"d_vocab": 11, "d_model": 6}),
        ((6, 6), {"d_vocab": 6, "d_model": 6}),
    ],
)
def test_the_unembedding_is_centred_over_the_vocabulary(shape: tuple[int, int], config: dict[str, int]) -> None:
    weights = {"unembed.W_U": torch.randn(*shape), "unembed.b_U": torch.randn(11)}
    cfg = SimpleNamespace(n_layers=1, **config)
    found, expected = (each.center_unembed(dict(weights), cfg) for each in (ProcessWeights, TheirProcessing))
    for name in weights:
        close(found[name], expected[name])


def test_a_cache_of_one_entry_says_how_many_positions_its_keys_have() -> None:
    keys, mask = torch.zeros(2, 5, 3, 4), torch.zeros(2, 0, dtype=torch.int)
    for one, offset in ((ours, get_pos_offset), (transformer_lens, their_offset)):
        entry = one.TransformerLensKeyValueCacheEntry(past_keys=keys, past_values=keys)
        cache = one.TransformerLensKeyValueCache(entries=[entry], previous_attention_mask=mask)
        assert offset(cache, batch_size=3) == 5  # which number of sequences is asked for does not matter


def test_a_mask_of_all_positions_goes_with_a_kv_cache(model: Any, lens: Any) -> None:
    first = torch.ones(2, 6, dtype=torch.int64)
    first[0, :2] = 0
    last = []
    for one in (model, lens):
        kind = ours.TransformerLensKeyValueCache if one is model else transformer_lens.TransformerLensKeyValueCache
        cache = kind.init_cache(one.cfg, "cpu", 2)
        one(TOKENS[:, :6], past_kv_cache=cache, attention_mask=first, padding_side="left")
        cache.freeze()
        residual, tokens, _, mask = one.input_to_embed(TOKENS[:, 6:], past_kv_cache=cache)
        assert torch.equal(mask, torch.cat([first, torch.ones(2, 3, dtype=torch.int64)], 1))
        options = {"tokens": tokens, "attention_mask": mask, "past_kv_cache": cache}
        last.append(one(residual, start_at_layer=0, **options))
    close(*last)
    with pytest.raises(InputError, match=r"is not the KV cache's at the 6 positions .* mask of the new tokens alone"):
        model(TOKENS[:, 6:], attention_mask=1 - mask, past_kv_cache=cache_of(model))


def cache_of(model: Any) -> Any:
    cache = ours.TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    model(TOKENS[:, :6], past_kv_cache=cache)
    return cache


@pytest.mark.parametrize("name", ["solu", "solu_ln", "gelu_new", "gelu_fast", "silu", "relu", "gelu", "xielu", "relu2"])
def test_a_configuration_picks_its_activation_function(name: str) -> None:
    values = torch.linspace(-3, 3, 22).reshape(2, 11)
    cfg = SimpleNamespace(act_fn=name)
    picked = [each.pick_activation_function(cfg) for each in (ActivationFunctionFactory, TheirFactory)]  # type: ignore[attr-defined]
    close(*(function(values).detach() for function in picked))
    assert [len(list(getattr(function, "parameters", list)())) for function in picked] in ([0, 0], [2, 2])
    with pytest.raises(InputError, match=r"act_fn is 'tanh'\. There are solu, "):
        ActivationFunctionFactory.pick_activation_function(SimpleNamespace(act_fn="tanh"))  # type: ignore[arg-type]


def listed(mixin: Any, point: Any) -> list[Any]:
    """What a class with three hook points, two of them with hooks, answers."""

    class Bag(mixin):  # type: ignore[misc]
        @property
        def hook_dict(self) -> dict[str, Any]:
            return points

    points = {name: point() for name in ("a", "b", "c")}
    points["a"].add_hook(print, dir="fwd", is_permanent=True)
    points["c"].add_hook(repr, dir="fwd")
    points["c"].add_hook(len, dir="bwd")
    asked: list[dict[str, Any]] = [
        {}, {"dir": "bwd"}, {"including_permanent": False}, {"name_filter": "a"}, {"name_filter": lambda name: name > "b"},
    ]  # fmt: skip
    found = [Bag().list_hooks(**options) for options in asked]
    return [{name: [each.user_hook for each in hooks] for name, hooks in one.items()} for one in found]


def test_any_class_with_hook_points_lists_its_hooks() -> None:
    found = listed(HookIntrospectionMixin, HookPoint)
    assert found == listed(TheirMixin, TheirHookPoint)
    assert found[0] == {"a": [print], "c": [repr, len]}
    assert issubclass(ours.HookedRootModule, HookIntrospectionMixin)
    with pytest.raises(UnknownHookPoint):  # of which TransformerLens says nothing
        _ours_of({"a": HookPoint()}).list_hooks("d")


def _ours_of(points: dict[str, Any]) -> Any:
    made = HookIntrospectionMixin()
    made.hook_dict = points  # type: ignore[attr-defined]
    return made


def test_there_is_one_kind_of_configuration() -> None:
    cfg = TransformerLensConfig(d_model=8, d_head=4, n_layers=1, n_ctx=5, d_vocab=11)
    assert isinstance(cfg, ours.HookedTransformerConfig)
    assert (cfg.n_heads, cfg.d_mlp) == (2, 32)
    assert np.isclose(cfg.eps, 1e-5)
