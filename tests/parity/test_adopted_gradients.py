"""Gradients, segments and sweeps of files that torch exported, adopted, against autograd on transformers' modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphlens
from graphlens import HookedTransformer, patching
from graphlens.metrics import LogitDiff
from tests.adopt.checkpoints import checkpoint_of, load
from tests.adopt.oracle import places_of
from tests.adopt.torch_routes import dynamo, legacy
from tests.families.torch_hooks import hooked
from tests.one_operator import Array

METRIC = LogitDiff(5, 7)
Route = Callable[[str, Path, Path], None]
ROUTES: dict[str, tuple[str, Route]] = {
    "gpt2-legacy": ("gpt2", lambda *given: legacy(*given, attention="sdpa")),
    "llama-dynamo": ("llama", lambda *given: dynamo(*given, opset=20)),
    "neox-legacy": ("neox", lambda *given: legacy(*given)),
}


class Adopted:
    """A family's checkpoint, exported by a route and adopted."""

    def __init__(self, family: str, route: Route, root: Path) -> None:
        self.family = family
        self.checkpoint = checkpoint_of(family, root)
        route(family, self.checkpoint, root / "foreign.onnx")
        graphlens.adopt(root / "foreign.onnx", root / "hooked", announce=lambda line: None)
        self.model = HookedTransformer.from_onnx(root / "hooked")
        self.tokens = np.random.default_rng(0).integers(1, self.model.cfg.d_vocab, (3, 7))
        self.mask = np.ones_like(self.tokens)
        self.mask[1, :3] = 0
        self.real = self.mask.astype(bool)

    def by_torch(self, mask: Array) -> dict[str, Array]:
        """d(METRIC)/d(activation) by autograd, at every hook point that a module takes or gives."""
        module, kept = load(self.checkpoint), dict[str, Any]()

        def keep(hook: str, place: Any) -> Callable[..., Any]:
            def called(inner: Any, x: Any, y: Any) -> Any:
                value = place.get(inner, x, y).requires_grad_(True) * 1
                value.retain_grad()
                kept[hook] = value
                return place.put(inner, x, y, value)

            return called

        placed = {hook: place for hook, place in places_of(self.family, module).items() if place.put is not None}
        handles = [hooked(module, place, keep(hook, place)) for hook, place in placed.items()]
        positions = np.maximum(mask.cumsum(-1) - 1, 0)
        given = {"input_ids": self.tokens, "attention_mask": mask, "position_ids": positions}
        logits = module(**{name: torch.from_numpy(array) for name, array in given.items()}, use_cache=False).logits
        (logits[:, -1, 5] - logits[:, -1, 7]).mean().backward()
        for handle in handles:
            handle.remove()
        return {hook: value.grad.numpy() for hook, value in kept.items() if value.grad is not None}


@pytest.fixture(scope="module", params=list(ROUTES))
def adopted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adopted:
    return Adopted(*ROUTES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_autograds(adopted: Adopted, padded: bool) -> None:
    mask = adopted.mask if padded else np.ones_like(adopted.mask)
    found = adopted.model.gradients(adopted.tokens, METRIC, attention_mask=mask)
    expected = adopted.by_torch(mask)
    assert dict(found.straight_through) == {}
    compared = 0
    for name, gradient in expected.items():
        if name not in found or found[name].shape != gradient.shape:
            continue
        compared += 1
        scale = float(np.abs(gradient).max())
        assert float(np.abs(found[name] - gradient).max()) <= 2e-5 * scale, name
    assert compared >= 8 * adopted.model.cfg.n_layers, compared
    assert all(np.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("padded", [False, True])
def test_a_segment_computes_what_the_whole_computes(adopted: Adopted, padded: bool) -> None:
    """From each layer to each later one, with what a run from the tokens left at the hook points."""
    model, real = adopted.model, adopted.real if padded else np.ones_like(adopted.real)
    options: dict[str, Any] = {"attention_mask": adopted.mask} if padded else {}
    logits, cache = model.run_with_cache(adopted.tokens, **options)
    layers = model.cfg.n_layers
    stream = [*(f"blocks.{layer}.hook_resid_pre" for layer in range(layers)), f"blocks.{layers - 1}.hook_resid_post"]
    for start in range(layers + 1):
        for stop in (None, *range(start, layers + 1)):
            found, part = model.run_with_cache(
                cache[stream[start]], start_at_layer=start, stop_at_layer=stop, **options
            )
            expected = logits if stop is None else cache[stream[stop]]
            np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-6)
            for name, value in part.items():
                same = np.isclose(value, cache[name], rtol=1e-4, atol=1e-5)
                assert same[0].all(), (name, start, stop)
    with pytest.raises(graphlens.InputError, match="start_at_layer"):
        model.run_with_cache(cache[stream[1]], start_at_layer=1, names_filter="hook_embed")


def test_a_segment_follows_an_edit_of_its_residual(adopted: Adopted) -> None:
    """A residual of another batch and length than the file's example."""
    model = adopted.model
    tokens = adopted.tokens[:2, :4]
    _, cache = model.run_with_cache(tokens)
    residual = cache["blocks.1.hook_resid_pre"] * np.float32(1.5)
    expected = model.run_with_interventions(tokens, graphlens.Patch("blocks.1.hook_resid_pre", residual))
    np.testing.assert_allclose(model(residual, start_at_layer=1), expected, rtol=1e-5, atol=1e-6)


def test_a_sweep_runs_whole(adopted: Adopted) -> None:
    """Each value is that of a forward with the patch."""
    model = adopted.model
    clean, corrupted = adopted.tokens[:1], adopted.tokens[1:2]
    _, cache = model.run_with_cache(clean)
    found = np.asarray(patching.get_act_patch_resid_pre(model, corrupted, cache, METRIC))
    for layer, position in ((0, 2), (1, 6)):
        name = f"blocks.{layer}.hook_resid_pre"
        patch = graphlens.Patch(name, cache[name][:, position], positions=position)
        expected = float(METRIC(model.run_with_interventions(corrupted, patch)))
        assert found[layer, position] == pytest.approx(expected, abs=1e-5)


def test_a_segment_with_earlier_tokens(tmp_path: Path) -> None:
    """Its own blocks' keys and values say how many there are, where the original reads it off block 0."""
    legacy("llama", checkpoint_of("llama", tmp_path), tmp_path / "foreign.onnx", past=True)
    graphlens.adopt(tmp_path / "foreign.onnx", tmp_path / "hooked", announce=lambda line: None)
    model = HookedTransformer.from_onnx(tmp_path / "hooked")
    tokens = np.random.default_rng(0).integers(1, model.cfg.d_vocab, (2, 9))
    logits, cache = model.run_with_cache(tokens)
    for start in range(model.cfg.n_layers):
        earlier = graphlens.KeyValueCache.init_cache(model.cfg, batch_size=2)
        model(tokens[:, :5], past_kv_cache=earlier)
        residual = cache[f"blocks.{start}.hook_resid_pre"][:, 5:]
        found = model(residual, start_at_layer=start, past_kv_cache=earlier)
        np.testing.assert_allclose(found, logits[:, 5:], rtol=1e-5, atol=1e-5)


def test_blocks_and_their_parts_called_alone(adopted: Adopted) -> None:
    model = adopted.model
    _, cache = model.run_with_cache(adopted.tokens)
    block = model.blocks[1]
    whole = block(cache["blocks.1.hook_resid_pre"])
    np.testing.assert_allclose(whole, cache["blocks.1.hook_resid_post"], rtol=1e-5, atol=1e-6)

    def normed(norm: str) -> Array:
        value: Array = cache[f"blocks.1.{norm}.hook_normalized"] * model.weights[f"blocks.1.{norm}.w"]
        return value + model.weights[f"blocks.1.{norm}.b"] if f"blocks.1.{norm}.b" in model.weights else value

    given = normed("ln1")
    np.testing.assert_allclose(block.attn(given, given, given), cache["blocks.1.hook_attn_out"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(block.mlp(normed("ln2")), cache["blocks.1.hook_mlp_out"], rtol=1e-5, atol=1e-6)
