"""Models, caches, hook points, results and edits are copied, pickled and sent to other processes with equal values."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import Ablate, ActivationCache, HookedTransformer, KeyValueCache, Patch, Scale, Steer
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Probability
from graphlens.model.hooks import HookPoint
from graphlens.patching import get_act_patch_resid_pre

TOKENS = [[1, 2, 3, 4]]
Z = "blocks.1.attn.hook_z"


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = [pytest.param(way, id=name) for name, way in (("pickle", pickled), ("deepcopy", copy.deepcopy))]
ALL_COPIES = [*COPIES, pytest.param(copy.copy, id="copy")]


def halved(z: np.ndarray, hook: HookPoint) -> np.ndarray:
    return z * np.float32(0.5)


# Models


def test_a_deep_copy_shares_the_engine_and_nothing_that_can_be_set(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    logits, built = model(TOKENS), model.runner.engine.sessions_built
    other = copy.deepcopy(model)
    np.testing.assert_array_equal(other(TOKENS), logits)
    assert other.runner.engine is model.runner.engine
    assert model.runner.engine.sessions_built == built == 1
    other.add_hook(Z, halved)
    other.set_use_attn_result(True)
    other.tokenizer.padding_side = "left"
    with other.intervene(Ablate(Z)):
        np.testing.assert_array_equal(model(TOKENS), logits)
    assert (model.cfg.use_attn_result, model.tokenizer.padding_side) == (False, "right")


def run_elsewhere(sent: tuple[Any, ...], answers: Any) -> None:
    """What a spawned worker does with what it is sent."""
    model, cache, past, edit, metric = sent
    _, found = model.run_with_cache(TOKENS)
    logits = model.run_with_interventions(TOKENS, edit)
    attrs = cache.logit_attrs(cache.accumulated_resid(), 5, 7)
    answers.put((found["unembed.hook_out"], attrs, model([[5]], past_kv_cache=past), logits, metric(logits)))


def test_a_spawned_worker_computes_the_same(tiny_copy: Path) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    model.set_weights({"blocks.2.mlp.W_out": model.blocks[2].mlp.W_out * 0.5})
    past, edit, metric = KeyValueCache.init_cache(model.cfg, batch_size=1), Ablate(Z, heads=2), LogitDiff(5, 7)
    model(TOKENS, past_kv_cache=past)
    _, cache = model.run_with_cache(TOKENS)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=run_elsewhere, args=((model, cache, past, edit, metric), answers))
    worker.start()
    found = answers.get(timeout=120)
    worker.join(timeout=60)
    assert worker.exitcode == 0
    logits = model.run_with_interventions(TOKENS, edit)
    attrs = cache.logit_attrs(cache.accumulated_resid(), 5, 7)
    expected = (cache["unembed.hook_out"], attrs, model([[5]], past_kv_cache=past), logits, metric(logits))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


# Hook points


@pytest.mark.parametrize("copied", COPIES)
def test_hook_points_are_those_of_the_models_copy(tiny_copy: Path, copied: Callable[[Any], Any]) -> None:
    model = HookedTransformer.from_onnx(tiny_copy, "cpu")
    model.add_hook(Z, halved)
    model.hook_dict[Z].ctx["kept"] = np.arange(3)
    other, points, point = copied((model, model.hook_dict, model.hook_dict[Z]))
    assert list(points) == list(model.hook_dict)
    assert points[Z] is point is other.hook_dict[Z]
    assert points["blocks.1.attn.o.hook_in"] is point  # TransformerLens 4's name
    assert point.fwd_hooks == []
    np.testing.assert_array_equal(point.ctx["kept"], np.arange(3))
    point.ctx.clear()
    assert list(model.hook_dict[Z].ctx) == ["kept"]
    point.add_hook(halved)
    np.testing.assert_array_equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("copied", ALL_COPIES)
def test_hook_points_alone(tiny: HookedTransformer, copied: Callable[[Any], Any]) -> None:
    points = copied(tiny.hook_dict)
    assert type(points) is type(tiny.hook_dict)
    assert [point.name for point in points.values()] == list(tiny.hook_dict)
    assert copied(tiny.hook_dict[Z]).layer() == 1
    assert copied(HookPoint("apart")).name == "apart"
    assert repr(copied(tiny.blocks[1].attn)) == repr(tiny.blocks[1].attn)


# Key-value caches


@pytest.mark.parametrize("copied", ALL_COPIES)
@pytest.mark.parametrize("filled", [True, False])
def test_a_copy_of_a_key_value_cache_goes_its_own_way(
    tiny: HookedTransformer, copied: Callable[[Any], Any], filled: bool
) -> None:
    past = KeyValueCache.init_cache(tiny.cfg, batch_size=1)
    if filled:
        tiny(TOKENS, past_kv_cache=past)
    past.freeze()
    expected = tiny([[5, 6]], past_kv_cache=past)
    other = copied(past)
    assert (type(other), other.length, other.frozen, other.owner) == (KeyValueCache, past.length, True, past.owner)
    other.unfreeze()
    np.testing.assert_array_equal(tiny([[5, 6]], past_kv_cache=other), expected)
    assert (other.length, past.length) == (past.length + 2, 4 if filled else 0)
    np.testing.assert_array_equal(tiny([[5, 6]], past_kv_cache=past), expected)
    whole = tiny([[1, 2, 3, 4, 5, 6]] if filled else [[5, 6]])[:, -2:]
    np.testing.assert_allclose(expected, whole, atol=1e-4)


# Records


@pytest.mark.parametrize("copied", ALL_COPIES)
def test_records_come_back_equal(tiny: HookedTransformer, copied: Callable[[Any], Any]) -> None:
    _, clean = tiny.run_with_cache(TOKENS)
    sweep = get_act_patch_resid_pre(tiny, [[4, 3, 2, 1]], clean, LogitDiff(5, 7))
    edits = [Ablate(Z, heads=2), Scale(Z, 0.5), Patch(Z, clean[Z], positions=1), Steer("hook_embed", 0.1)]
    metrics = [
        LogitDiff(5, 7),
        Probability(3),
        KLDivergence(clean["unembed.hook_out"]),
        CrossEntropy(TOKENS, position=None),
    ]
    for value in (*edits, *metrics, tiny.cfg):
        assert copied(value) == value
    np.testing.assert_array_equal(np.asarray(copied(sweep)), np.asarray(sweep))
    np.testing.assert_array_equal(copied(tiny.OV[1]).AB, tiny.OV[1].AB)


@pytest.mark.parametrize("copied", ALL_COPIES)
def test_an_activation_cache(tiny: HookedTransformer, copied: Callable[[Any], Any]) -> None:
    _, cache = tiny.run_with_cache(TOKENS, remove_batch_dim=True)
    other = copied(cache)
    assert type(other) is ActivationCache
    assert list(other) == list(cache)
    for name, value in cache.items():
        np.testing.assert_array_equal(other[name], value)
    np.testing.assert_array_equal(other.stack_head_results(), cache.stack_head_results())
