"""Flags and their hook points, hooks that stay, and what a run gives back: slices, losses, sessions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, InputError, UnknownHookPoint, surgery
from graphlens.analysis.slices import Slice
from graphlens.file.bridge import BRIDGE, BRIDGE_BLOCK
from graphlens.file.names import FLAGGED, axes_of, axis_sizes, firing_order

FLAGS = sorted(set(FLAGGED.values()))
SPLIT, MLP_IN = "use_split_qkv_input", "use_hook_mlp_in"


def clean(model: HookedTransformer) -> None:
    model.reset_hooks(including_permanent=True)
    for flag in FLAGS:
        getattr(model, f"set_{flag}")(False)


@pytest.fixture
def model(tiny: HookedTransformer) -> Iterator[HookedTransformer]:
    """The embedded model without flags or hooks, before and after."""
    clean(tiny)
    yield tiny
    clean(tiny)


def set_flags(model: HookedTransformer, *flags: str) -> None:
    for flag in flags:
        getattr(model, f"set_{flag}")(True)


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# Flags


@pytest.mark.parametrize("flag", FLAGS)
def test_hook_points_follow_their_flag(flag: str, model: HookedTransformer, tokens: np.ndarray) -> None:
    plain, expected = list(model.hook_dict), model.forward(tokens)
    mine = [rest for rest, needed in FLAGGED.items() if needed == flag]
    names = [name for rest in mine for name in ([rest] if rest == "hook_tokens" else
             [f"blocks.{layer}.{rest}" for layer in range(model.cfg.n_layers)])]  # fmt: skip
    assert not set(names) & set(plain)
    set_flags(model, flag)
    assert getattr(model.cfg, flag)
    assert set(model.hook_dict) == {*plain, *names}
    assert list(model.hook_dict) == firing_order([*plain, *names], model.cfg.n_layers)
    described = model.hook_points()
    assert list(described) == list(model.hook_dict)
    logits, cache = model.run_with_cache(tokens)
    assert list(cache) == list(described)
    sizes = {"batch": 2, "pos": 6, **axis_sizes(model.cfg)}
    for name in names:
        assert cache[name].shape == tuple(sizes[axis] for axis in axes_of(name))
        assert str(cache[name].dtype) == described[name][1]
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    getattr(model, f"set_{flag}")(False)
    assert list(model.hook_dict) == plain == list(model.hook_points())
    np.testing.assert_array_equal(model.forward(tokens), expected)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_an_edit_of_one_input_reaches_that_one_alone(part: str, model: HookedTransformer, tokens: np.ndarray) -> None:
    set_flags(model, SPLIT)
    name = f"blocks.1.hook_{part}_input"
    _, before = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[(name, lambda value, hook: value + noise(value.shape))]):
        _, after = model.run_with_cache(tokens)
    for other in ("q", "k", "v"):
        same = np.array_equal(before[other, 1], after[other, 1])
        assert same == (other != part)
    # The stream itself is not touched before the attention writes to it, which it then does otherwise.
    np.testing.assert_array_equal(before["resid_pre", 1], after["resid_pre", 1])
    assert np.abs(before["attn_out", 1] - after["attn_out", 1]).max() > 1e-3
    np.testing.assert_allclose(after["resid_mid", 1], after["resid_pre", 1] + after["attn_out", 1], atol=1e-5)


def test_an_edit_of_one_heads_input_reaches_that_head_alone(model: HookedTransformer, tokens: np.ndarray) -> None:
    for flag, name in ((SPLIT, "blocks.1.hook_q_input"), ("use_attn_in", "blocks.1.hook_attn_in")):
        clean(model)
        set_flags(model, flag)

        def edit(value: np.ndarray, hook: Any) -> None:
            value[:, :, 2] += noise(value[:, :, 2].shape)

        _, before = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[(name, edit)]):
            _, after = model.run_with_cache(tokens)
        changed = np.abs(before["z", 1] - after["z", 1]).max((0, 1, 3)) > 1e-6
        assert changed.tolist() == [False, False, True, False]


def test_an_edit_of_what_the_mlp_reads_never_reaches_the_residual(model: HookedTransformer, tokens: np.ndarray) -> None:
    set_flags(model, MLP_IN)
    _, before = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_in", lambda value, hook: value * 3 + noise(value.shape))]):
        _, after = model.run_with_cache(tokens)
    np.testing.assert_array_equal(before["mlp_in", 1], before["resid_mid", 1])
    np.testing.assert_array_equal(before["resid_mid", 1], after["resid_mid", 1])
    assert np.abs(before["mlp_out", 1] - after["mlp_out", 1]).max() > 1e-3
    np.testing.assert_allclose(after["resid_post", 1], after["resid_mid", 1] + after["mlp_out", 1], atol=1e-5)


def test_the_norm_fires_for_queries_keys_and_values(model: HookedTransformer, tokens: np.ndarray) -> None:
    fired: list[str] = []
    for flags, times in (((), 1), (("use_attn_in",), 1), ((SPLIT,), 3)):
        clean(model)
        set_flags(model, *flags)
        names = ("blocks.1.ln1.hook_scale", "blocks.1.ln1.hook_normalized", "blocks.1.ln2.hook_scale")
        fired.clear()
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: fired.append(hook.name)) for name in names])
        assert [fired.count(name) for name in names] == [times, times, 1], flags


# Hooks that stay


def recorder(log: list[str], what: str) -> Any:
    def record(activation: np.ndarray, hook: Any) -> None:
        log.append(what)

    return record


def test_hooks_run_in_the_order_they_stand(model: HookedTransformer, tokens: np.ndarray) -> None:
    log: list[str] = []
    model.add_hook("hook_embed", recorder(log, "first"))
    model.add_hook("hook_embed", recorder(log, "second"))
    model.add_hook("hook_embed", recorder(log, "before"), prepend=True)
    model.hook_dict["hook_embed"].add_hook(recorder(log, "point"))
    model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", recorder(log, "run"))])
    assert log == ["before", "first", "second", "point", "run"]
    log.clear()
    model.forward(tokens)
    assert log == ["before", "first", "second", "point"]


def test_resetting_leaves_permanent_hooks_unless_told(model: HookedTransformer, tokens: np.ndarray) -> None:
    log: list[str] = []
    model.add_hook("hook_embed", recorder(log, "added"))
    model.add_perma_hook("hook_embed", recorder(log, "permanent"))
    model.add_hook("hook_embed", recorder(log, "permanent too"), is_permanent=True)
    model.reset_hooks(direction="bwd")
    model.forward(tokens)
    assert log == ["added", "permanent", "permanent too"]
    log.clear()
    model.reset_hooks()
    model.forward(tokens)
    assert log == ["permanent", "permanent too"]
    log.clear()
    model.reset_hooks(including_permanent=True)
    model.forward(tokens)
    assert log == []


def test_a_level_says_which_hooks_are_reset(model: HookedTransformer, tokens: np.ndarray) -> None:
    log: list[str] = []

    def left() -> list[str]:
        log.clear()
        model.forward(tokens)
        return list(log)

    model.add_hook("hook_embed", recorder(log, "one"), level=1)
    model.hook_dict["hook_embed"].add_hook(recorder(log, "seven"), level=7)
    model.add_hook("hook_embed", recorder(log, "none"))
    model.add_perma_hook("hook_embed", recorder(log, "permanent"))
    model.reset_hooks(level=2)
    assert left() == ["one", "seven", "none", "permanent"]
    model.reset_hooks(level=1)
    assert left() == ["seven", "none", "permanent"]
    with model.hooks(fwd_hooks=[("hook_embed", recorder(log, "outer"))]):
        with model.hooks(fwd_hooks=[("hook_embed", recorder(log, "inner"))]):
            model.add_hook("hook_embed", recorder(log, "of the inner block"), level=2)
            model.reset_hooks(level=1)
            assert left() == ["seven", "none", "permanent", "of the inner block", "inner"]
        assert left() == ["seven", "none", "permanent", "outer"]  # put back as the inner block ends
    model.reset_hooks(including_permanent=True, level=3)  # all of them, as in TransformerLens
    assert left() == []


def test_resetting_inside_a_block_removes_its_hooks(model: HookedTransformer, tokens: np.ndarray) -> None:
    log: list[str] = []
    with model.hooks(fwd_hooks=[("hook_embed", recorder(log, "outer"))]):
        with model.hooks(fwd_hooks=[("hook_embed", recorder(log, "inner"))]):
            model.add_hook("hook_embed", recorder(log, "added"))
            model.reset_hooks()
            model.forward(tokens)
            assert log == []
            with model.hooks(fwd_hooks=[("hook_embed", recorder(log, "later"))]):
                model.forward(tokens)
            assert log == ["later"]
        log.clear()
        model.forward(tokens)
        assert log == ["outer"]
    log.clear()
    model.forward(tokens)
    assert log == []


def test_another_threads_block_is_left_alone(model: HookedTransformer, tokens: np.ndarray) -> None:
    log: list[str] = []
    with model.hooks(fwd_hooks=[("hook_embed", recorder(log, "mine"))]):
        thread = threading.Thread(target=model.reset_hooks)
        thread.start()
        thread.join()
        model.forward(tokens)
    assert log == ["mine"]


def test_a_hook_point_tells_and_removes_its_hooks(model: HookedTransformer, tokens: np.ndarray) -> None:
    log: list[str] = []
    point, other = model.hook_dict["hook_embed"], model.hook_dict["hook_pos_embed"]
    first, second = recorder(log, "first"), recorder(log, "second")
    point.add_perma_hook(first)
    point.add_hook(second, level=4)
    other.add_hook(recorder(log, "other"))
    assert [(h.user_hook, h.is_permanent, h.context_level) for h in point.fwd_hooks] == [
        (first, True, None),
        (second, False, 4),
    ]
    assert point.bwd_hooks == []
    assert point.has_hooks()
    assert point.has_hooks("fwd", including_permanent=False, level=4)
    assert not point.has_hooks("fwd", including_permanent=False, level=3)
    assert not point.has_hooks("bwd")
    with model.hooks(fwd_hooks=[("hook_embed", recorder(log, "block"))]):
        assert [h.context_level for h in point.fwd_hooks] == [None, 4, 1]
        point.remove_hooks("bwd")
        point.remove_hooks(level=4)
        model.forward(tokens)
        assert log == ["first", "block", "other"]
    point.remove_hooks()
    assert [h.user_hook for h in point.fwd_hooks] == [first]
    point.remove_hooks(including_permanent=True)
    assert not point.has_hooks()
    assert other.has_hooks()


def test_clear_contexts(model: HookedTransformer) -> None:
    model.hook_dict["hook_embed"].ctx["seen"] = 1
    model.clear_contexts()
    assert model.hook_dict["hook_embed"].ctx == {}


# TransformerLens 4's names


def test_transformerlens_4_names_find_hook_points_and_activations(model: HookedTransformer, tokens: np.ndarray) -> None:
    _, cache = model.run_with_cache(tokens)
    names = list(model.hook_dict)
    twins = {**BRIDGE, **{f"blocks.1.{a}": f"blocks.1.{b}" for a, b in BRIDGE_BLOCK.items()}}
    found = {alias: name for alias, name in twins.items() if name in names}
    assert {"blocks.1.mlp.out.hook_out", "ln_final.hook_out", "blocks.1.hook_in", "hook_unembed"} <= set(found)
    for alias, name in found.items():
        assert model.hook_dict[alias] is model.hook_dict.get(alias) is model.hook_dict[name]
        assert cache[alias] is cache[name]
        assert alias in model.hook_dict
        assert alias in cache
    assert not set(found) & {*model.hook_dict, *cache, *model.hook_dict.keys(), *cache.keys()}
    assert model.blocks[1].hook_in is model.hook_dict["blocks.1.hook_resid_pre"]
    for absent in ("blocks.1.nope", "blocks.9.hook_in", "blocks.1.attn.hook_attn_in"):
        assert absent not in model.hook_dict
        assert model.hook_dict.get(absent) is None
        with pytest.raises(UnknownHookPoint):
            model.hook_dict[absent]
        with pytest.raises(KeyError):
            cache[absent]


def test_a_function_is_asked_for_our_names(model: HookedTransformer, tokens: np.ndarray) -> None:
    asked: list[str] = []
    model.run_with_cache(tokens, names_filter=lambda name: asked.append(name) or name == "hook_embed")
    assert asked == list(model.hook_dict)


# How a run is called


def test_positional_arguments_are_forwards(model: HookedTransformer, tokens: np.ndarray) -> None:
    loss = model.forward(tokens, return_type="loss", loss_per_token=True)
    np.testing.assert_array_equal(model.forward(tokens, "loss", True), loss)
    found, cache = model.run_with_cache(tokens, "loss", True, names_filter="hook_embed")
    np.testing.assert_array_equal(found, loss)
    assert list(cache) == ["hook_embed"]
    np.testing.assert_array_equal(model.run_with_hooks(tokens, "loss", True, fwd_hooks=[]), loss)
    # TransformerLens's order: a place for shortformer_pos_embed, then the mask.
    mask = np.asarray([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model.forward(tokens, attention_mask=mask)
    for found in (
        model.forward(tokens, "logits", False, None, None, None, None, None, mask),
        model.run_with_cache(tokens, "logits", False, None, None, None, None, None, mask)[0],
        model.run_with_hooks(tokens, "logits", False, None, None, None, None, None, mask),
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="shortformer_pos_embed"):
        model.forward(tokens, shortformer_pos_embed=mask)
    with pytest.raises(InputError, match="return_type must be one of"):
        model.run_with_cache(tokens, "hook_embed")  # a filter is named
    with pytest.raises(TypeError, match="nmaes_filter"):
        model.run_with_cache(tokens, nmaes_filter=None)


def test_both_has_names(model: HookedTransformer, tokens: np.ndarray) -> None:
    both = model.forward(tokens, return_type="both")
    logits, loss = both
    assert both.logits is logits
    assert both.loss is loss
    np.testing.assert_array_equal(model.loss_fn(logits, tokens), loss)
    per_token = model.forward(tokens, return_type="loss", loss_per_token=True)
    np.testing.assert_array_equal(model.loss_fn(logits, tokens, per_token=True), per_token)
    mask = np.asarray([[0, 0, 1, 1, 1, 1], [1] * 6])
    masked = model.forward(tokens, return_type="both", attention_mask=mask)
    np.testing.assert_array_equal(model.loss_fn(masked.logits, tokens, mask), masked.loss)


def test_hooks_may_stay_after_their_run(model: HookedTransformer, tokens: np.ndarray) -> None:
    log: list[str] = []
    model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", recorder(log, "kept"))], reset_hooks_end=False)
    model.forward(tokens)
    assert log == ["kept", "kept"]
    model.reset_hooks()
    model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", recorder(log, "gone"))])
    model.forward(tokens)
    assert log == ["kept", "kept", "gone"]


def test_a_context_lives_on_until_it_is_cleared(model: HookedTransformer, tokens: np.ndarray) -> None:
    def count(activation: np.ndarray, hook: Any) -> None:
        hook.ctx["runs"] = hook.ctx.get("runs", 0) + 1

    point = model.hook_dict["hook_embed"]
    for runs in (1, 2):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", count)])
        assert point.ctx == {"runs": runs}
        assert model.hook_dict["hook_embed"] is point
    model.reset_hooks(clear_contexts=False)
    assert point.ctx == {"runs": 2}
    model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", count)], clear_contexts=True)
    assert point.ctx == {}
    model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", count)])
    model.reset_hooks()
    assert point.ctx == {}


# What a run gives back


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [(3, [3]), (-1, [5]), (slice(1, 4), [1, 2, 3]), ([0, 5, 2], [0, 5, 2]), (slice(None, None, 2), [0, 2, 4])],
)
@pytest.mark.parametrize("flags", [(), ("use_attn_result", MLP_IN, "use_hook_tokens"), (SPLIT,), ("use_attn_in",)])
def test_positions_are_sliced_on_their_own_axis(
    flags: tuple[str, ...], chosen: Any, kept: list[int], model: HookedTransformer, tokens: np.ndarray
) -> None:
    set_flags(model, *flags)
    logits, whole = model.run_with_cache(tokens)
    sliced_logits, sliced = model.run_with_cache(tokens, pos_slice=chosen)
    np.testing.assert_array_equal(sliced_logits, logits)
    assert list(sliced) == list(whole)
    for name, value in whole.items():
        axes = axes_of(name)
        axis = axes.index("query_pos" if "query_pos" in axes else "pos")
        np.testing.assert_array_equal(sliced[name], value.take(kept, axis), err_msg=name)


def test_a_slice_of_one_position_drops_the_axis(model: HookedTransformer, tokens: np.ndarray) -> None:
    _, whole = model.run_with_cache(tokens)
    for position in (2, -1):
        _, dropped = model.run_with_cache(tokens, pos_slice=Slice(position))
        _, kept = model.run_with_cache(tokens, pos_slice=position)
        for name, value in whole.items():
            axes = axes_of(name)
            axis = axes.index("query_pos" if "query_pos" in axes else "pos")
            np.testing.assert_array_equal(dropped[name], value.take(position, axis), err_msg=name)
            np.testing.assert_array_equal(kept[name], value.take([position], axis), err_msg=name)
    with pytest.raises(InputError, match="beyond the 6 positions"):
        model.run_with_cache(tokens, pos_slice=Slice(6))


def test_the_batch_axis_can_be_dropped(model: HookedTransformer, tokens: np.ndarray) -> None:
    logits, whole = model.run_with_cache(tokens[:1])
    same, cache = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    np.testing.assert_array_equal(same, logits)
    assert not cache.has_batch_dim
    for name, value in whole.items():
        np.testing.assert_array_equal(cache[name], value[0])


def test_losses_by_their_formula(model: HookedTransformer, tokens: np.ndarray) -> None:
    mask = np.asarray([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for options in ({}, {"attention_mask": mask}):
        logits = model.forward(tokens, **options)
        scores = logits.astype(np.float64)
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        expected = np.asarray([[-scores[b, p, tokens[b, p + 1]] for p in range(5)] for b in range(2)])
        counted = (mask[:, 1:] & mask[:, :-1]) == 1 if options else np.ones((2, 5), bool)
        expected[~counted] = 0
        mean = expected.sum() / counted.sum()
        per_token = model.forward(tokens, return_type="loss", loss_per_token=True, **options)
        np.testing.assert_allclose(per_token, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.forward(tokens, return_type="loss", **options), mean, rtol=1e-5)
        both = model.forward(tokens, return_type="both", **options)
        np.testing.assert_array_equal(both[0], logits)
        np.testing.assert_allclose(both[1], mean, rtol=1e-5)
        assert model.forward(tokens, return_type=None, **options) is None
        residual = model.forward(tokens, stop_at_layer=2, return_type="loss", **options)
        assert residual.shape == (2, 6, model.cfg.d_model)
        resumed = model.forward(residual, start_at_layer=2, tokens=tokens, return_type="loss", **options)
        np.testing.assert_allclose(resumed, mean, rtol=1e-5)


# Sessions


def test_the_number_of_open_sessions_is_bounded(tiny_folder: Any, tokens: np.ndarray) -> None:
    mine = HookedTransformer.from_onnx(tiny_folder, "cpu")
    engine, expected = mine.runner.engine, mine.forward(tokens)
    seen = set()
    for stop in range(mine.cfg.n_layers + 1):
        for flag in ("use_attn_result", MLP_IN):
            clean(mine)
            set_flags(mine, flag)
            mine.forward(tokens, stop_at_layer=stop)
            seen |= set(engine.open_sessions)
            assert len(engine.open_sessions) <= 7
    assert len(seen) > 7, "too few kinds of graph to reach the bound"
    clean(mine)
    np.testing.assert_array_equal(mine.forward(tokens), expected)


@pytest.mark.parametrize("stop", range(5))
def test_a_run_that_stops_early_holds_no_later_weights(stop: int, tiny_folder: Any, tiny: HookedTransformer) -> None:
    whole = surgery.load(tiny_folder)
    part = surgery.segment(whole, stop=stop)
    rest = surgery.segment(whole, start=stop)
    names, others = set(part.graph.initializers), set(rest.graph.initializers)

    def layers(initializers: set[str]) -> set[int]:
        return {layer for layer in range(4) if any(f".h.{layer}." in name for name in initializers)}

    assert layers(set(whole.graph.initializers)) == {0, 1, 2, 3}
    assert layers(names) == set(range(stop))
    assert layers(others) == set(range(stop, 4))
