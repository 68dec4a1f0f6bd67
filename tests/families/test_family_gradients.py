"""Gradients at every hook point of every family: those of torch autograd, through TransformerLens 3.9 and transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from graphlens import HookedTransformer, InputError
from graphlens.attribution import attribution_patch
from graphlens.export.checkpoint import read_checkpoint
from graphlens.metrics import KLDivergence, LogitDiff
from graphlens.patching import Site, sweep
from tests.families.comparing import prompt
from tests.families.torch_hooks import Place, hooked, places
from tests.families.variants import CHOSEN, VARIANTS

TOLERANCE = 1e-4  # of the largest gradient at a hook point
TOKENS = prompt(101, 3, 11)  # longer than every window
IDS = torch.from_numpy(TOKENS)
BY_LENS = [name for name in CHOSEN if VARIANTS[name].lens is not None]
Model = Callable[[str], HookedTransformer]


def autograd(lens: Any, metric: Callable[[Any], Any]) -> dict[str, Any]:
    """The gradient of a metric at every hook point by torch.

    ln1 runs three times a block there, for queries, keys and values: its total gradient is the sum of their gradients.
    """
    found: dict[str, Any] = {}

    def add(gradient: torch.Tensor, hook: Any) -> None:
        found[hook.name] = found.get(hook.name, 0) + gradient.detach().numpy()

    lens.requires_grad_(True)
    with torch.enable_grad(), lens.hooks(bwd_hooks=[(lambda name: ".experts." not in name, add)]):
        metric(lens(IDS)).backward()
    lens.requires_grad_(False)
    return found


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, gradient in found.items():
        scale = float(np.abs(expected[name]).max())
        assert gradient.shape == expected[name].shape, name
        assert scale > 0, f"the gradient at {name} is zero, so this tests nothing"
        assert float(np.abs(gradient - expected[name]).max()) <= TOLERANCE * scale, name


@pytest.fixture(scope="module")
def lenses(family_checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    from tests.families.lens import lens_of

    return lambda name: lens_of(name, family_checkpoint(name))


def next_token_loss(logits: Any) -> Any:
    return cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("name", BY_LENS)
def test_of_every_kind_of_seed(name: str, family_model: Model, lenses: Callable[[str], Any]) -> None:
    """A sparse one (of two tokens' logits), that of the loss, and a dense one."""
    model, lens = family_model(name), lenses(name)
    found = model.gradients(TOKENS, LogitDiff(7, 60))
    floats = {name for name in model.hook_points() if not name.endswith("expert_indices")}
    assert set(found) == floats
    assert_close(found, autograd(lens, lambda x: (x[:, -1, 7] - x[:, -1, 60]).mean()))

    _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    gradients = {key.removesuffix("_grad"): value for key, value in cache.items() if key.endswith("_grad")}
    assert set(gradients) == floats
    assert_close(gradients, autograd(lens, next_token_loss))

    other = np.asarray(model(TOKENS[::-1]))
    wanted = torch.from_numpy(other)[:, -1].log_softmax(-1)
    some = [name for name in floats if ".1." in name or not name.startswith("blocks")]
    found = model.gradients(TOKENS, KLDivergence(other), some)
    expected = autograd(
        lens,
        lambda x: torch.nn.functional.kl_div(x[:, -1].log_softmax(-1), wanted, reduction="batchmean", log_target=True),
    )
    assert_close(found, expected)


def of_place(model: Any, place: Place, metric: Callable[[Any], Any]) -> Any:
    """The gradient of a metric with respect to what is added to a value of transformers' model."""
    added: list[torch.Tensor] = []

    def use(module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = place.get(module, x, y)
        added.append(torch.zeros_like(value, requires_grad=True))
        assert place.put is not None
        return place.put(module, x, y, value + added[0])

    handle = hooked(model, place, use)
    with torch.enable_grad():
        metric(model(IDS).logits).backward()
    handle.remove()
    assert added[0].grad is not None
    return added[0].grad.numpy()


@pytest.mark.parametrize("name", CHOSEN)
def test_what_torch_hooks_reach(
    name: str, family_model: Model, family_reference: Any, family_checkpoint: Callable[[str], Path]
) -> None:
    """By transformers alone, also where TransformerLens is no oracle."""
    checkpoint, reference = read_checkpoint(family_checkpoint(name)), family_reference(name)
    spec = checkpoint.family.spec_of(checkpoint.hf_config(), name)
    known = {hook: place for hook, place in places(spec).items() if place.put is not None}
    if VARIANTS[name].lens is not None:  # every hook point was compared: here one block is enough
        known = {hook: place for hook, place in known.items() if hook.startswith("blocks.1.")}
    found = family_model(name).gradients(TOKENS, LogitDiff(7, 60), list(known))
    assert len(found) >= 8
    expected = {
        hook: of_place(reference, place, lambda x: (x[:, -1, 7] - x[:, -1, 60]).mean()) for hook, place in known.items()
    }
    # transformers' OPT has batch and positions in one axis there.
    assert_close(found, {hook: value.reshape(found[hook].shape) for hook, value in expected.items()})


@pytest.mark.parametrize("name", BY_LENS)
def test_what_a_backward_hook_returns_goes_on(name: str, family_model: Model, lenses: Callable[[str], Any]) -> None:
    model = family_model(name)
    inner = [f"blocks.1.attn.hook_{part}" for part in ("z", "rot_k", "k")]
    names = ["blocks.2.hook_resid_post", *inner, "blocks.1.hook_resid_pre", "blocks.0.attn.hook_v", "hook_embed"]
    names = [name for name in names if name in model.hook_dict]

    def run(either: Any, tokens: Any, tensors: bool) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def hook(gradient: Any, hook: Any) -> Any:
            seen[hook.name] = gradient.detach().numpy().copy() if tensors else gradient.copy()
            return (gradient * 0.5,) if hook.name in names[:3] else None

        with torch.enable_grad(), either.hooks(bwd_hooks=[(name, hook) for name in names]):
            loss = either(tokens, return_type="loss")
            if tensors:
                loss.backward()
        return seen

    lens = lenses(name).requires_grad_(True)
    expected, found = run(lens, IDS, True), run(model, TOKENS, False)
    assert list(found) == list(expected) == names
    assert_close(found, expected)


@pytest.mark.parametrize("name", CHOSEN)
def test_padding_on_the_left_has_no_gradient(name: str, family_model: Model) -> None:
    model = family_model(name)
    mask = np.ones_like(TOKENS)
    mask[1, :3] = 0
    found = model.gradients(TOKENS, LogitDiff(7, 60), attention_mask=mask)
    alone = model.gradients(TOKENS[1:2, 3:], LogitDiff(7, 60))
    for hook, gradient in found.items():
        assert np.isfinite(gradient).all(), hook
    for hook in ("hook_embed", "blocks.1.attn.hook_v", "blocks.2.ln1.hook_normalized", "blocks.1.hook_mlp_out"):
        assert not found[hook][1, :3].any(), hook
        assert_close({hook: len(TOKENS) * found[hook][1, 3:]}, {hook: alone[hook][0]})


def sites_of(model: HookedTransformer) -> list[Site]:
    """Sites of every kind in the second block, parts of an activation and wholes."""
    ends = ("hook_resid_pre", "attn.hook_k", "attn.hook_rot_q", "attn.q_norm.hook_normalized", "mlp.hook_pre_linear")
    wholes = [Site(f"blocks.1.{end}") for end in (*ends, "ln1_post.hook_normalized", "hook_mlp_out")]
    parts = [Site("z", 1, position=-2, head=1), Site("k", 1, head=0), Site("resid_pre", 1, position=3)]
    names = list(model.hook_dict)  # and none of TransformerLens 4's
    return [site for site in (*wholes, *parts) if site.hook in names]


@pytest.mark.parametrize("name", CHOSEN)
def test_attribution_is_the_first_order_of_a_patch(name: str, family_model: Model) -> None:
    """To a source a thousandth away the estimate is the patch's effect."""
    model, sites = family_model(name), sites_of(family_model(name))
    _, there = model.run_with_cache(TOKENS[::-1].copy())
    _, here = model.run_with_cache(TOKENS)
    near = {key: here[key] + (there[key] - here[key]) / np.float32(1024) for key in {site.hook for site in sites}}
    metric = LogitDiff(7, 60)
    effect = sweep(model, TOKENS, sites, near, metric, verbose=False)
    estimate = attribution_patch(model, TOKENS, sites, near, metric, verbose=False)
    wanted, found = (result.values - result.against() for result in (effect, estimate))
    # What is left is of second order, and float32's noise in a difference of logits.
    np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max() + 2e-6)


@pytest.mark.parametrize("name", CHOSEN)
def test_each_prompt_has_its_own_estimate(name: str, family_model: Model) -> None:
    """That of a run of it alone; refused where prompts and positions are one axis, unless there is one prompt."""
    model, metric = family_model(name), LogitDiff(7, 60, reduction="none")
    _, source = model.run_with_cache(TOKENS[::-1].copy())
    joint = [site for site in sites_of(model) if site.hook.endswith("q_norm.hook_normalized")]
    joint = joint if model.cfg.use_qk_norm and np.asarray(source[joint[0].hook]).ndim == 2 else []
    sites = [site for site in sites_of(model) if site not in joint]
    found = attribution_patch(model, TOKENS, sites, source, metric, verbose=False)
    for row in range(len(TOKENS)):
        own = {site.hook: np.asarray(source[site.hook])[row : row + 1] for site in sites}
        alone = attribution_patch(model, TOKENS[row : row + 1], sites, own, LogitDiff(7, 60), verbose=False)
        wanted = alone.values - alone.against()
        np.testing.assert_allclose(
            found.values[:, row] - found.against()[..., row], wanted, atol=1e-4 * np.abs(wanted).max() + 1e-6
        )
    for site in joint:
        with pytest.raises(InputError, match="prompts and positions in one axis"):
            attribution_patch(model, TOKENS, site, source, metric, verbose=False)
        _, one = model.run_with_cache(TOKENS[1:2])
        each, mean = (
            attribution_patch(model, TOKENS[:1], site, one, chosen, verbose=False).values
            for chosen in (metric, LogitDiff(7, 60))
        )
        assert np.array_equal(each[:, 0], mean)


@pytest.mark.parametrize("name", CHOSEN)
def test_integrated_gradients_add_up_to_the_whole_effect(name: str, family_model: Model) -> None:
    model = family_model(name)
    if model.cfg.num_experts:
        pytest.skip("where another expert is chosen the logits jump, and no gradient on the way says so")
    sites = [site for site in sites_of(model) if site.position is None and site.head is None]
    _, source = model.run_with_cache(TOKENS[::-1].copy())
    metric = LogitDiff(7, 60)
    effect = sweep(model, TOKENS, sites, source, metric, verbose=False)
    # Where values are clipped the gradient jumps on the way, and a sum of few steps is further from the integral.
    steps = 384 if model.cfg.original_architecture == "OlmoForCausalLM" else 48
    estimate = attribution_patch(model, TOKENS, sites, source, metric, steps=steps, verbose=False)
    wanted, found = (result.values - result.against() for result in (effect, estimate))
    np.testing.assert_allclose(found, wanted, atol=1e-2 * np.abs(wanted).max())
