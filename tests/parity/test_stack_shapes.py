"""Stacks of every shape, against TransformerLens 3.9: what has any axes before its prompts and positions, or lacks some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_oracle import oracle

import graphlens
from graphlens.torch import HookedTransformer as TorchTransformer
from tests.closeness import close

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 101, (2, 7)))
D_MODEL = 40
# No size is that of the prompts (2) or of the positions (7, or 3 of them), so that no axis passes for another.
LEADING = [(), (4,), (4, 5), (1,), (4, 1, 5)]
POSITIONS = [None, -1, (1, 6, 2), [5, 0, 2], (6, 7)]


@pytest.fixture(scope="module")
def lens(odd_checkpoint: Path) -> Any:
    return oracle(odd_checkpoint)


@pytest.fixture(scope="module", params=["arrays", "tensors"])
def ours(request: pytest.FixtureRequest, odd_hooked: Path) -> Any:
    kind: Any = graphlens.HookedTransformer if request.param == "arrays" else TorchTransformer
    return kind.from_onnx(odd_hooked, "cpu")


def given(model: Any, value: Any) -> Any:
    """A value as the face takes it."""
    return value.numpy() if isinstance(value, torch.Tensor) and isinstance(model.W_E, np.ndarray) else value


@pytest.fixture(scope="module", params=["batch", "no batch axis"])
def caches(request: pytest.FixtureRequest, lens: Any, ours: Any) -> tuple[Any, Any]:
    """The same run cached by both: (TransformerLens's, ours)."""
    tokens = TOKENS if request.param == "batch" else TOKENS[:1]
    found = lens.run_with_cache(tokens)[1], ours.run_with_cache(given(ours, tokens))[1]
    if request.param == "no batch axis":
        for cache in found:
            cache.remove_batch_dim()
    return found


def both(caches: tuple[Any, Any], method: str, *args: Any, **options: Any) -> np.ndarray:
    """Calls the method on both caches, compares, and returns what TransformerLens's gave."""
    theirs, mine = caches
    expected = getattr(theirs, method)(*args, **options)
    args, options = tuple(given(mine.model, v) for v in args), {n: given(mine.model, v) for n, v in options.items()}
    found = getattr(mine, method)(*args, **options)
    assert isinstance(found, type(mine["hook_embed"]))
    close(found, expected)
    return np.asarray(expected)


def run_axes(cache: Any, pos_slice: Any) -> tuple[int, ...]:
    """The prompts and positions of a run: [*b, p]."""
    return tuple(cache.decompose_resid(pos_slice=pos_slice).shape[1:-1])


def drawn(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("pos_slice", POSITIONS, ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_any_axes_before_those_of_the_run(caches: Any, leading: tuple[int, ...], pos_slice: Any) -> None:
    axes = run_axes(caches[0], pos_slice)
    stack = drawn(*leading, *axes, D_MODEL)
    batched = [False, True] if stack.ndim > 1 else [False]  # theirs slices a second axis, with nothing to slice
    for has_batch_dim in batched:
        options = {"pos_slice": pos_slice, "has_batch_dim": has_batch_dim}
        for layer, mlp_input in ((None, False), (-1, False), (0, False), (1, True)):
            scaled = both(caches, "apply_ln_to_stack", stack, layer, mlp_input, **options)
            assert scaled.shape == stack.shape
        attrs = both(caches, "logit_attrs", stack, 17, 3, **options)
        assert attrs.shape == stack.shape[:-1]
    one_each = torch.from_numpy(np.random.default_rng(3).integers(0, 101, (2, *axes)))
    both(caches, "logit_attrs", stack, one_each[0], one_each[1], pos_slice, has_batch_dim=False)


@pytest.mark.parametrize("pos_slice", POSITIONS, ids=str)
def test_axes_of_the_run_that_are_missing_or_one_serve_all(caches: Any, pos_slice: Any) -> None:
    axes = run_axes(caches[0], pos_slice)
    shapes = {axes[start:] for start in range(len(axes) + 1)}
    shapes |= {tuple(1 if i == one else size for i, size in enumerate(axes)) for one in range(len(axes))}
    shapes |= {(4, *shape) for shape in shapes if len(shape) == len(axes)}
    tokens = torch.from_numpy(np.random.default_rng(4).integers(0, 101, axes)) if axes else 5
    for shape in sorted(shapes):
        stack = drawn(*shape, D_MODEL)
        both(caches, "apply_ln_to_stack", stack, 2, pos_slice=pos_slice, has_batch_dim=False)
        both(caches, "logit_attrs", stack, tokens, None, pos_slice, has_batch_dim=False)


def test_several_tokens_for_one_prompt(caches: Any) -> None:
    theirs = caches[0]
    if theirs.has_batch_dim:
        return
    stack = theirs.decompose_resid(pos_slice=-1)  # [n, d_model]
    both(caches, "logit_attrs", stack[:, None], torch.tensor([5, 6, 7, 8]), None, -1)  # [n, 4]


@pytest.mark.parametrize("batch_slice", [0, (1,), (1, 2), [1, 0]], ids=str)
@pytest.mark.parametrize("pos_slice", POSITIONS, ids=str)
@pytest.mark.parametrize("face", ["arrays", "tensors"])
def test_slices_of_the_batch_with_any_axes_before_it(
    lens: Any, odd_hooked: Path, face: str, pos_slice: Any, batch_slice: Any
) -> None:
    model: Any = (graphlens.HookedTransformer if face == "arrays" else TorchTransformer).from_onnx(odd_hooked, "cpu")
    caches = lens.run_with_cache(TOKENS)[1], model.run_with_cache(given(model, TOKENS))[1]
    axes = run_axes(caches[0], pos_slice)
    stack = drawn(4, 5, *axes, D_MODEL)
    flat = stack.reshape(20, *axes, D_MODEL)
    for method, args in (("apply_ln_to_stack", (1, True)), ("logit_attrs", (17, 3))):
        options = {"pos_slice": pos_slice, "batch_slice": batch_slice}
        expected = both(caches, method, flat, *args, **options)
        found = getattr(caches[1], method)(given(model, stack), *args, **options)
        close(found, expected.reshape(4, 5, *expected.shape[1:]))
        # Theirs always slices the second axis, which here is that of the positions.
        found = getattr(caches[1], method)(given(model, flat[0]), *args, **options)
        close(found, expected[0])
        sliced = stack[:, :, 1] if batch_slice == (1, 2) else None
        if sliced is not None:  # cut already: only the scale is still to be sliced
            both(caches, method, stack[:, :, 1:2], *args, has_batch_dim=False, **options)


def test_recomputed_norms_of_any_shape(caches: Any) -> None:
    stack = caches[0].accumulated_resid()
    batched = caches[0].has_batch_dim
    expected = both(caches, "apply_ln_to_stack", stack, has_batch_dim=batched, recompute_ln=True)
    mine = caches[1]
    for shaped in (stack[:, None], stack[0]):
        whole = expected[:, None] if shaped.ndim > stack.ndim else expected[0]
        close(mine.apply_ln_to_stack(given(mine.model, shaped), has_batch_dim=False, recompute_ln=True), whole)


# Refused: there broadcasting gives numbers of another prompt or position


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((4, 2), {}, "pos_slice"),  # of one position, without saying so
        ((4, 2, 6), {}, "2 prompts of 7 positions"),
        ((4, 3, 7), {}, "2 prompts of 7 positions"),
        ((4, 2, 7), {"pos_slice": [3]}, "2 prompts of 1 positions"),
        ((2, 5), {"pos_slice": [3]}, "pos_slice"),
        ((4, 3), {"pos_slice": 2}, "2 prompts"),
    ],
)
def test_a_stack_of_other_prompts_or_positions_is_refused(
    ours: Any, shape: tuple[int, ...], options: dict[str, Any], said: str
) -> None:
    cache = ours.run_with_cache(given(ours, TOKENS))[1]
    stack = given(ours, drawn(*shape, D_MODEL))
    for ask in (cache.apply_ln_to_stack, lambda *a, **o: cache.logit_attrs(*a, 5, **o)):
        for kind in (ValueError, RuntimeError):
            with pytest.raises(kind, match=re.escape(said)):
                ask(stack, **options)


def test_vectors_of_prompts_or_positions_where_there_are_as_many_are_refused(ours: Any) -> None:
    cache = ours.run_with_cache(given(ours, TOKENS[:, :2]))[1]
    for shape in ((2,), (1, 2)):
        with pytest.raises(ValueError, match="its prompts or its positions"):
            cache.apply_ln_to_stack(given(ours, drawn(*shape, D_MODEL)))
    stack = drawn(2, 2, D_MODEL)
    whole = cache.apply_ln_to_stack(given(ours, stack))
    for index in (0, 1):
        at = cache.apply_ln_to_stack(given(ours, stack[:, index]), pos_slice=index)
        np.testing.assert_array_equal(np.asarray(at), np.asarray(whole[:, index]))
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        cache.logit_attrs(given(ours, stack), given(ours, torch.tensor([5, 6])))


# run_with_cache


def test_of_several_prompts_without_a_batch_axis_the_first_is_kept(lens: Any, ours: Any) -> None:
    expected = lens.run_with_cache(TOKENS, remove_batch_dim=True)
    with pytest.warns(UserWarning, match="2 prompts: the cache holds the activations of the first"):
        found = ours.run_with_cache(given(ours, TOKENS), remove_batch_dim=True)
    close(found[0], expected[0])
    assert found[1].has_batch_dim is expected[1].has_batch_dim is False
    assert list(found[1]) == list(expected[1])
    for name, value in found[1].items():
        close(np.nan_to_num(np.asarray(value), neginf=0), np.nan_to_num(np.asarray(expected[1][name]), neginf=0))
    both((expected[1], found[1]), "logit_attrs", expected[1].decompose_resid(), 5, has_batch_dim=False)
    with pytest.warns(UserWarning, match="the first"):
        sliced = ours.run_with_cache(
            given(ours, TOKENS), remove_batch_dim=True, pos_slice=(2, 4), return_cache_object=False
        )
    theirs = lens.run_with_cache(TOKENS, remove_batch_dim=True, pos_slice=(2, 4), return_cache_object=False)
    assert type(sliced[1]) is type(theirs[1]) is dict
    close(sliced[1]["blocks.1.hook_resid_pre"], theirs[1]["blocks.1.hook_resid_pre"])
    close(sliced[1]["blocks.1.attn.hook_z"], theirs[1]["blocks.1.attn.hook_z"])


def test_autodiff_is_toggled_on_the_torch_face_alone(ours: Any) -> None:
    cache = ours.run_with_cache(given(ours, TOKENS), names_filter="hook_embed")[1]
    before = torch.is_grad_enabled()
    try:
        if isinstance(ours.W_E, np.ndarray):
            assert cache.toggle_autodiff() is None
            assert torch.is_grad_enabled() is before
            with pytest.raises(ValueError, match="arrays have no automatic differentiation"):
                cache.toggle_autodiff(mode=True)
            return
        for mode in (False, True):
            assert cache.toggle_autodiff(mode) is None
            assert torch.is_grad_enabled() is mode
        cache.toggle_autodiff()
        assert torch.is_grad_enabled() is False
    finally:
        torch.set_grad_enabled(before)
