"""What a HookedRootModule and a torch module have besides: hooks that keep activations, modules by name, devices and modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, InputError, RuntimeUnavailable, UnknownHookPoint
from graphlens.model.hooks import HookPoint

Z = "blocks.1.attn.hook_z"
FILTERS: dict[str, Any] = {
    "one": Z,
    "list": [Z, "hook_embed"],
    "tuple": (Z, "ln_final.hook_scale"),
    "set": {Z, "hook_embed"},
    "function": lambda name: name.endswith("hook_pattern"),
    "all": None,
}


@pytest.fixture
def model(tiny: HookedTransformer) -> Iterator[HookedTransformer]:
    tiny.reset_hooks(including_permanent=True)
    yield tiny
    tiny.reset_hooks(including_permanent=True)


def nothing(value: np.ndarray, hook: HookPoint) -> None:
    """A hook that only looks."""


# Hooks that keep activations


@pytest.mark.parametrize("names", FILTERS)
def test_caching_hooks_keep_what_a_cache_holds(names: str, model: HookedTransformer, tokens: np.ndarray) -> None:
    _, expected = model.run_with_cache(tokens, names_filter=FILTERS[names])
    cache, forward, backward = model.get_caching_hooks(FILTERS[names])
    assert (cache, backward) == ({}, [])
    model.run_with_hooks(tokens, fwd_hooks=forward)
    assert list(cache) == list(expected)
    for name, value in cache.items():
        np.testing.assert_array_equal(value, expected[name])
    assert model.list_hooks() == {}


def test_caching_hooks_stay_until_they_are_removed(model: HookedTransformer, tokens: np.ndarray) -> None:
    mine: dict[str, np.ndarray] = {}
    assert model.add_caching_hooks(Z, cache=mine) is mine
    model.cache_some(mine, lambda name: name.startswith("ln_final."))
    model.forward(tokens)
    assert list(mine) == [Z, "ln_final.hook_scale", "ln_final.hook_normalized"]
    first = mine[Z]
    model.forward(tokens[:, ::-1])
    assert np.abs(mine[Z] - first).max() > 1e-3
    model.remove_all_hook_fns()
    kept = mine[Z]
    model.forward(tokens)
    assert mine[Z] is kept
    every: dict[str, np.ndarray] = {}
    model.cache_all(every)
    model.forward(tokens)
    assert list(every) == list(model.hook_dict)


def test_caching_hooks_keep_gradients(model: HookedTransformer, tokens: np.ndarray) -> None:
    _, expected = model.run_with_cache(tokens, return_type="loss", names_filter=Z, incl_bwd=True)
    cache, forward, backward = model.get_caching_hooks(Z, incl_bwd=True)
    model.run_with_hooks(tokens, return_type="loss", fwd_hooks=forward, bwd_hooks=backward)
    assert set(cache) == {Z, f"{Z}_grad"}
    np.testing.assert_allclose(cache[f"{Z}_grad"], expected[f"{Z}_grad"], rtol=0, atol=1e-7)
    _, forward, backward = model.get_caching_hooks(incl_bwd=True)
    assert {name for name, _ in backward} == {name for name, _ in forward}


@pytest.mark.parametrize("where", [-1, (1, 4), [0, 2], slice(None, None, 2)])
def test_caching_hooks_keep_some_positions(where: Any, model: HookedTransformer, tokens: np.ndarray) -> None:
    names = [Z, "blocks.0.attn.hook_pattern", "hook_embed"]
    _, expected = model.run_with_cache(tokens, names_filter=names, pos_slice=where)
    cache, forward, _ = model.get_caching_hooks(names, pos_slice=where)
    model.run_with_hooks(tokens, fwd_hooks=forward)
    for name in names:
        np.testing.assert_array_equal(cache[name], expected[name])
    cache, forward, _ = model.get_caching_hooks(names, remove_batch_dim=True)
    model.run_with_hooks(tokens[:1], fwd_hooks=forward)
    assert [cache[name].ndim for name in names] == [3, 3, 2]


def test_caching_hooks_of_what_a_run_leaves_out_do_not_fire(model: HookedTransformer, tokens: np.ndarray) -> None:
    """As in TransformerLens, where one set of hooks serves any run; a hook that was asked for by name must fire."""
    cache, forward, _ = model.get_caching_hooks()
    model.run_with_hooks(tokens, stop_at_layer=1, fwd_hooks=forward)
    _, expected = model.run_with_cache(tokens, stop_at_layer=1)
    assert list(cache) == list(expected)
    with pytest.raises(InputError, match="would never fire"):
        model.run_with_hooks(tokens, stop_at_layer=1, fwd_hooks=[(Z, nothing)])


def test_caching_hooks_refuse_what_they_cannot_do(model: HookedTransformer) -> None:
    with pytest.raises(UnknownHookPoint):
        model.get_caching_hooks("blocks.1.attn.hook_zz")
    with pytest.raises(UnknownHookPoint, match="matches none"):
        model.add_caching_hooks(lambda name: False)
    with pytest.raises(InputError, match="does not run on 'mps'"):
        model.get_caching_hooks(device="mps")


# Hooks in every form


def pairs() -> Iterator[tuple[Any, Callable[..., Any]]]:
    yield Z, nothing
    yield (lambda name: name == "hook_embed"), nothing


@pytest.mark.parametrize(
    "given",
    [list(pairs()), tuple(pairs()), [list(pair) for pair in pairs()], dict(pairs()).items(), None],
    ids=["list", "tuple", "lists", "items", "none"],
)
def test_hooks_are_given_in_any_iterable(given: Any, model: HookedTransformer, tokens: np.ndarray) -> None:
    with model.hooks(given):
        assert set(model.list_hooks()) == (set() if given is None else {Z, "hook_embed"})
    model.run_with_hooks(tokens, fwd_hooks=given)
    assert model.run_with_hooks(tokens, return_type="loss", bwd_hooks=given) > 0


def test_a_generator_of_hooks_serves_every_call_of_what_it_decorates(model: HookedTransformer) -> None:
    @model.hooks(pairs())
    def inside() -> set[str]:
        return set(model.list_hooks())

    assert inside() == inside() == {Z, "hook_embed"}
    assert model.list_hooks() == {}


def test_a_handle_removes_its_hook_alone(model: HookedTransformer) -> None:
    for _ in range(2):
        model.add_hook(Z, nothing)
    model.add_perma_hook(Z, nothing)
    with model.hooks([(Z, nothing)]):
        handles = model.hook_dict[Z].fwd_hooks
        assert [(h.is_permanent, h.context_level) for h in handles] == [(False, None)] * 2 + [(True, None), (False, 1)]
        assert all(handle.user_hook is nothing for handle in handles)
        assert model.context_level == 1
        for handle in handles[1:]:
            handle.hook.remove()
        assert model.hook_dict[Z].fwd_hooks == handles[:1]
        handles[1].hook.remove()  # once more: nothing happens
    assert model.context_level == 0
    assert model.hook_dict[Z].fwd_hooks == handles[:1]


def test_hooks_are_listed_by_direction_and_kind(model: HookedTransformer) -> None:
    model.add_hook(Z, nothing)
    model.add_hook("hook_embed", nothing, dir="bwd")
    model.add_perma_hook("hook_embed", nothing)
    assert {name: len(found) for name, found in model.list_hooks().items()} == {"hook_embed": 2, Z: 1}
    assert list(model.list_hooks(dir="bwd")) == ["hook_embed"]
    assert list(model.list_hooks(dir="fwd", including_permanent=False)) == [Z]
    assert list(model.list_hooks(Z)) == [Z]
    model.remove_all_hook_fns("bwd")
    model.remove_all_hook_fns(including_permanent=False)
    assert [hook.is_permanent for found in model.list_hooks().values() for hook in found] == [True]
    with pytest.raises(InputError, match="direction"):
        model.remove_all_hook_fns("sideways")


def test_a_checked_hook_is_added(model: HookedTransformer) -> None:
    point = model.hook_dict[Z]
    model.check_and_add_hook(point, Z, nothing, level=3, prepend=True)
    assert [(h.context_level, h.dir) for h in point.fwd_hooks] == [(3, "fwd")]
    with pytest.raises(UnknownHookPoint):
        model.check_hooks_to_add(point, "blocks.1.attn.hook_result", nothing)
    with pytest.raises(InputError, match="dir"):
        model.check_and_add_hook(point, Z, nothing, dir="both")


# Modules


def test_modules_are_parts_and_hook_points_by_their_names(model: HookedTransformer) -> None:
    named = dict(model.named_modules())
    assert named[""] is model
    assert next(iter(model.modules())) is model
    assert named == {"": model, **model.mod_dict}
    assert {name for name in named if isinstance(named[name], HookPoint)} == set(model.hook_dict)
    for name, module in model.mod_dict.items():
        above, _, leaf = name.rpartition(".")
        assert list(named).index(above) < list(named).index(name)
        around = named[above]
        assert module == (around[int(leaf)] if isinstance(around, list) else getattr(around, leaf))
    assert model.mod_dict[Z] is model.hook_dict[Z]
    assert [name for name, _ in model.named_children()] == [name for name in model.mod_dict if "." not in name]
    assert len(list(model.children())) == len(list(model.named_children()))
    assert [name for name, _ in model.named_modules(prefix="m")][:2] == ["m", f"m.{next(iter(model.mod_dict))}"]


def test_a_part_has_modules_and_parameters_of_its_own(model: HookedTransformer) -> None:
    block, every = model.blocks[1], dict(model.named_parameters())
    mine = dict(block.named_parameters())
    start = "blocks.1."
    assert list(mine) == [name[len(start) :] for name in every if name.startswith(start)]
    assert all(np.array_equal(mine[name], every[start + name]) for name in mine)
    assert sum(array.size for array in block.parameters()) == sum(array.size for array in block.state_dict().values())
    names = [name for name, _ in block.named_modules()]
    assert names == ["", *(name[len(start) :] for name in model.mod_dict if name.startswith(start))]
    assert {"attn", "mlp", "ln1", "hook_resid_pre"} <= {name for name, _ in block.named_children()}
    assert len(list(block.children())) < len(list(block.modules()))


# What a torch module has


def test_a_model_is_where_and_what_it_is(model: HookedTransformer) -> None:
    assert model.eval() is model.train(False) is model.requires_grad_(False) is model.cpu() is model
    for asked in ("cpu", "float32", np.float32, np.dtype("float32")):
        assert model.to(asked) is model
    assert model.float() is model
    assert model.training is False
    assert model.zero_grad() is None


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: m.train(), InputError, "does not train"),
        (lambda m: m.requires_grad_(), InputError, "no gradients"),
        (lambda m: m.half(), InputError, r"has float32, fixed when it is opened.*dtype='float16'"),
        (lambda m: m.double(), InputError, "dtype='float64'"),
        (lambda m: m.bfloat16(), InputError, "dtype='bfloat16'"),
        (lambda m: m.to(float), InputError, "dtype='float64'"),
        (lambda m: m.to("int8"), InputError, "dtype='int8'"),
        (lambda m: m.mps(), InputError, "does not run on 'mps'"),
        (lambda m: m.cuda(), RuntimeUnavailable, 'providers="cuda"'),
        (lambda m: m.cuda(1), RuntimeUnavailable, 'providers="cuda"'),
    ],
)
def test_what_a_model_is_not_is_said(
    call: Callable[[Any], Any], error: type[Exception], said: str, model: HookedTransformer
) -> None:
    with pytest.raises(error, match=said):
        call(model)
