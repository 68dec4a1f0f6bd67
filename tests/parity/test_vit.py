"""HookedViT over an adopted file: activations, edits, gradients and baked files, against transformers' modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import graphlens
from graphlens import Ablate, HookedTransformer, HookedViT, Patch, Steer, patching
from graphlens.metrics import CrossEntropy, LogitDiff
from tests.adopt.adopt_cases import inputs_of
from tests.adopt.checkpoints import checkpoint_of, load
from tests.adopt.oracle import Oracle
from tests.adopt.torch_routes import legacy
from tests.one_operator import Array

PIXELS: Array = inputs_of("vit", "plain")["pixel_values"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    legacy("vit", checkpoint_of("vit", folder), folder / "vit.onnx")
    graphlens.adopt(folder / "vit.onnx", folder / "hooked", announce=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def model(root: Path) -> HookedViT[Array]:
    return HookedViT.from_onnx(root / "hooked")


@pytest.fixture(scope="module")
def oracle(root: Path) -> Oracle:
    return Oracle("vit", checkpoint_of("vit", root))


def test_every_activation_is_transformers(model: HookedViT[Array], oracle: Oracle) -> None:
    expected = oracle.run("plain")
    logits, cache = model.run_with_cache(PIXELS)
    assert set(cache) == {name for name in expected if not name.startswith(("in.", "out."))}
    for name, value in cache.items():
        assert value.shape == expected[name].shape, name
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(logits, expected["out.logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(logits, cache["head.hook_out"])
    np.testing.assert_array_equal(model(PIXELS, "predictions"), logits.argmax(-1))
    np.testing.assert_allclose(model(PIXELS[1]), logits[1:], rtol=1e-5, atol=1e-6)  # one image, and another batch
    assert model(PIXELS, None) is None
    one = model.run_with_cache(PIXELS[:1], names_filter="blocks.1.attn.hook_z", remove_batch_dim=True)[1]
    np.testing.assert_allclose(one["z", 1], cache["z", 1][0], rtol=1e-5, atol=1e-6)


def test_an_edit_is_the_same_edit_in_transformers(model: HookedViT[Array], oracle: Oracle, tmp_path: Path) -> None:
    """As an intervention, as a Python hook, and baked into a file."""
    name, direction = "blocks.0.hook_mlp_out", np.linspace(-1, 1, model.cfg.d_model).astype(np.float32)

    def edit(value: Array) -> Array:
        found = value.copy()
        found[:, [0, 3]] = 0
        found[:, 5] += 2 * direction
        return found

    edits = [Ablate(name, positions=[0, 3]), Steer(name, direction, 2.0, positions=5)]
    expected = oracle.edited("plain", name, edit)
    found = model.run_with_interventions(PIXELS, edits)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert float(np.abs(found - model(PIXELS)).max()) > 0.1
    hooked = model.run_with_hooks(PIXELS, fwd_hooks=[(name, lambda value, hook: edit(value))])
    np.testing.assert_allclose(hooked, found, rtol=1e-5, atol=1e-6)
    baked = model.bake(edits, tmp_path / "baked")
    session = onnxruntime.InferenceSession(baked / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["pixel_values"]
    np.testing.assert_allclose(session.run(["logits"], {"pixel_values": PIXELS})[0], found, rtol=1e-5, atol=1e-6)
    head = Patch("blocks.1.attn.hook_z", 0.0, heads=2)
    expected = oracle.edited("plain", "blocks.1.attn.hook_z", lambda z: z * (np.arange(z.shape[2]) != 2)[:, None])
    _, cache = model.run_with_interventions(PIXELS, head, names_filter="head.hook_out")
    np.testing.assert_allclose(cache["head.hook_out"], expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_autograds(model: HookedViT[Array], root: Path) -> None:
    module, kept = load(checkpoint_of("vit", root)), list[Any]()

    def keep(inner: Any, x: Any, y: Any) -> Any:
        value = (y[0] if isinstance(y, tuple) else y).requires_grad_(True) * 1
        value.retain_grad()
        kept.append(value)
        return (value, *y[1:]) if isinstance(y, tuple) else value

    for layer in module.vit.layers:
        layer.register_forward_hook(keep)
    module.classifier.register_forward_hook(keep)
    logits = module(torch.from_numpy(PIXELS)).logits
    (logits[:, 3] - logits[:, 5]).mean().backward()
    found = model.gradients(PIXELS, LogitDiff(3, 5))
    assert set(found) == set(model.hook_dict)
    for name, value in zip(
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "head.hook_out"), kept, strict=True
    ):
        expected = value.grad.numpy()
        np.testing.assert_allclose(found[name], expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)
    # A metric that is not linear, against a small step.
    metric, name = CrossEntropy(2), "blocks.0.attn.hook_z"
    gradient = model.gradients(PIXELS, metric, name)[name]
    direction = np.random.default_rng(0).standard_normal(gradient.shape).astype(np.float32)
    ends = [
        float(metric(model.run_with_interventions(PIXELS, Steer(name, direction, s))[:, None])) for s in (0.02, -0.02)
    ]
    assert (ends[0] - ends[1]) / 0.04 == pytest.approx(float((gradient * direction).sum()), rel=0.01)


def test_weights_are_transformers(model: HookedViT[Array], root: Path) -> None:
    module = load(checkpoint_of("vit", root))
    for name, theirs in (
        ("head.W_H", module.classifier.weight.T),
        ("head.b_H", module.classifier.bias),
        ("pos_embed.W_pos", module.vit.embeddings.position_embeddings[0]),
    ):
        np.testing.assert_array_equal(model.weights[name], theirs.numpy())
    np.testing.assert_array_equal(model.tokens_to_residual_directions([3, 5]), module.classifier.weight[[3, 5]].numpy())
    assert model.blocks[1].mlp.W_in.shape == (model.cfg.d_model, model.cfg.d_mlp)


def test_bad_input(model: HookedViT[Array], root: Path) -> None:
    with pytest.raises(graphlens.InputError, match=r"shape \[2, 3, 24, 23\]; this model's are \[batch, 3, 24, 24\]"):
        model(PIXELS[..., :-1])
    with pytest.raises(graphlens.InputError, match="hold uint8: pass floats"):
        model(np.zeros((1, 3, 24, 24), np.uint8))
    with pytest.raises(graphlens.InputError, match="return_type must be one of"):
        model(PIXELS, "loss")
    with pytest.raises(TypeError, match="does not take 'attention_mask'"):
        model.runner.request(PIXELS, attention_mask=1)
    with pytest.raises(graphlens.UnknownHookPoint, match="unembed"):
        model.run_with_cache(PIXELS, names_filter="unembed.hook_in")
    with pytest.raises(graphlens.InputError, match=r"is a vision model .*open it with graphlens.HookedViT"):
        HookedTransformer.from_onnx(root / "hooked")
    _, cache = model.run_with_cache(PIXELS)
    with pytest.raises(graphlens.InputError, match="are of models of tokens"):
        patching.sweep(model, PIXELS, patching.Site("blocks.0.attn.hook_z", head=1), cache, LogitDiff(3, 5))  # type: ignore[arg-type]
    with pytest.raises(graphlens.InputError, match="exports no vision models"):
        HookedViT.from_pretrained("google/vit-base-patch16-224")
    with pytest.raises(graphlens.InputError, match="token ids go from 0 to"):
        model.gradients(PIXELS, LogitDiff(3, 99))
    with pytest.raises(graphlens.InputError, match="classes are whole numbers from 0 to"):
        model.tokens_to_residual_directions(99)
