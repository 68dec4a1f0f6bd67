"""Gradients of quantised files that were adopted: those of the model with the dequantised weights, and they say so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, patching
from graphlens.attribution import attribution_patch
from graphlens.metrics import LogitDiff
from tests.adopt.checkpoints import checkpoint_of
from tests.adopt.made_smaller import make_smaller
from tests.adopt.torch_routes import legacy
from tests.command_line import graphlens as command
from tests.one_operator import Array

METRIC = LogitDiff(5, 7)
ROUNDED = {"DynamicQuantizeLinear", "MatMulInteger"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float file of a Llama, and the folders of it, of its int8 and of its int4 adopted."""
    folder = tmp_path_factory.mktemp("quantised")
    file = folder / "float.onnx"
    legacy("llama", checkpoint_of("llama", folder), file)
    make_smaller("int8-channel", "llama", file, folder / "int8.onnx")
    make_smaller("int4", "llama", file, folder / "int4.onnx")
    for name in ("float", "int8", "int4"):
        words = folder / "llama-checkpoint"
        graphlens.adopt(folder / f"{name}.onnx", folder / name, tokenizer=words, announce=lambda line: None)
    return folder


def opened(root: Path, name: str) -> HookedTransformer[Array]:
    return HookedTransformer.from_onnx(root / name)


def dequantised(root: Path, name: str) -> HookedTransformer[Array]:
    """The float model with the numbers that a quantised one's integers stand for."""
    quantised, plain = opened(root, name), opened(root, "float")
    assert set(quantised.weights) == set(plain.weights)
    plain.set_weights({key: np.asarray(value) for key, value in quantised.weights.items()})
    return plain


def test_packed_weights_have_the_gradients_of_what_they_stand_for(root: Path) -> None:
    """Nothing else is rounded there, so the two models are the same."""
    tokens = np.random.default_rng(0).integers(1, 90, (2, 6))
    model, plain = opened(root, "int4"), dequantised(root, "int4")
    np.testing.assert_allclose(model(tokens), plain(tokens), rtol=2e-3, atol=2e-3)
    found, expected = model.gradients(tokens, METRIC), plain.gradients(tokens, METRIC)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert float(np.abs(found[name] - gradient).max()) <= 1e-3 * float(np.abs(gradient).max()), name
    assert set(found.straight_through) == {"MatMulNBits"}
    assert dict(expected.straight_through) == {}


def test_rounded_activations_are_passed_straight_through(root: Path) -> None:
    """At activations that are rounded on the way, so they point where the float model's do, and nearly as far."""
    tokens = np.random.default_rng(0).integers(1, 90, (2, 6))
    model, plain = opened(root, "int8"), dequantised(root, "int8")
    found, expected = model.gradients(tokens, METRIC), plain.gradients(tokens, METRIC)
    for name in ("hook_embed", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.2.mlp.hook_post"):
        one, other = found[name].ravel().astype(float), expected[name].ravel().astype(float)
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.98, name
        assert 0.9 < np.linalg.norm(one) / np.linalg.norm(other) < 1.1, name
    assert set(found.straight_through) == ROUNDED
    assert all(count > 0 for count in found.straight_through.values())


def test_what_was_passed_is_said_in_every_result(root: Path, tmp_path: Path) -> None:
    model = opened(root, "int8")
    tokens = np.random.default_rng(1).integers(1, 90, (1, 6))
    corrupted = tokens.copy()
    corrupted[0, 2] += 1
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert set(cache.straight_through) == ROUNDED
    assert set(cache.apply_slice_to_batch_dim(0).straight_through) == ROUNDED
    assert dict(model.run_with_cache(tokens)[1].straight_through) == {}
    sites = patching.Site("blocks.1.hook_resid_pre", position=2)
    found = attribution_patch(model, corrupted, sites, cache, METRIC, verbose=False)
    assert set(found.metadata["straight_through"]) == ROUNDED
    plain = attribution_patch(opened(root, "float"), corrupted, sites, cache.cache_dict, METRIC, verbose=False)
    assert "straight_through" not in plain.metadata
    # On the command line too.
    words = [model.tokenizer.decode([token]) for token in (11, 12, 13, 14)]
    prompts = ["--clean", " ".join(words[:3]), "--corrupted", " ".join([words[3], *words[1:3]])]
    more = ["--answer", words[0], "--wrong", words[3], "--sites", "resid_pre", "-o", tmp_path / "out"]
    printed = command("attribute", root / "int8", *prompts, *more)
    assert printed.returncode == 0, printed.stderr
    assert "gradients pass" in printed.stdout
    assert "MatMulInteger" in printed.stdout


def test_a_half_precision_body_under_float_logits(root: Path) -> None:
    make_smaller("fp16", "llama", root / "float.onnx", root / "fp16.onnx")
    graphlens.adopt(root / "fp16.onnx", root / "fp16", announce=lambda line: None)
    model, plain = opened(root, "fp16"), opened(root, "float")
    tokens = np.random.default_rng(0).integers(1, 90, (2, 6))
    found, expected = model.gradients(tokens, METRIC), plain.gradients(tokens, METRIC)
    assert found["blocks.1.hook_resid_pre"].dtype == np.float16
    for name, gradient in expected.items():
        if not name.endswith("hook_scale"):  # a sum over a whole row, whose terms cancel
            assert float(np.abs(found[name] - gradient).max()) <= 2e-2 * float(np.abs(gradient).max()), name
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    _, other = plain.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    name = "blocks.1.hook_resid_pre_grad"
    assert float(np.abs(cache[name] - other[name]).max()) <= 2e-2 * float(np.abs(other[name]).max())
