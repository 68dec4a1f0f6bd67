"""Weight processing, precision and shortening of a hooked file, without torch: what must stay and what must change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphlens import HookedTransformer, process_weights, surgery
from graphlens.analysis.numerics import log_softmax
from graphlens.errors import ExportError, InputError
from graphlens.surgery.graph import write_manifest
from graphlens.surgery.precision import convert_into
from graphlens.surgery.process import STEPS
from graphlens.surgery.processed import process_group


@pytest.fixture(scope="module")
def processed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    return HookedTransformer.from_onnx(process_weights(tiny_folder, tmp_path_factory.mktemp("processed") / "model"))


def assert_same_predictions(found: np.ndarray, expected: np.ndarray) -> None:
    reference = log_softmax(expected)
    assert np.abs(log_softmax(found) - reference).max() <= 1e-5 * np.abs(reference).max()


def test_processing_keeps_the_predictions(
    processed: HookedTransformer, tiny: HookedTransformer, tokens: np.ndarray
) -> None:
    assert processed.cfg.processing == STEPS[:4]
    found, expected = processed(tokens), tiny(tokens)
    assert_same_predictions(found, expected)
    assert np.abs(found - expected).max() > 0.1  # centred logits are other numbers


@pytest.mark.parametrize("step", STEPS)
def test_each_step_alone_keeps_the_predictions(
    step: str, tiny: HookedTransformer, tiny_folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    folder = process_weights(tiny_folder, tmp_path / "model", **{name: name == step for name in STEPS})
    model = HookedTransformer.from_onnx(folder)
    assert model.cfg.processing == (step,)
    assert_same_predictions(model(tokens), tiny(tokens))
    assert (folder / "processed.safetensors").read_bytes() != (tiny_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["blocks.1.ln2.w", "blocks.0.attn.W_O", "pos_embed.W_pos", "unembed.W_U"])
def test_a_weight_that_the_manifest_does_not_place_is_not_left_unprocessed(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    model = surgery.load(tiny_folder)
    manifest = surgery.read_manifest(model)
    views = {other: view for other, view in manifest.weights.items() if other != name}
    write_manifest(model, replace(manifest, weights=views))
    surgery.save(model, tmp_path / "less")
    with pytest.raises(ExportError, match=rf"where its weight '{name}' lies"):
        process_weights(tmp_path / "less", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if name.endswith("W_O"):
        with pytest.raises(InputError, match=rf"where its weight '{name}' lies, which this flag needs"):
            surgery.with_flagged(model, ["use_attn_result"])


def test_processed_weights_have_the_properties_they_are_processed_for(processed: HookedTransformer) -> None:
    weights = processed.weights
    assert not [name for name in weights if "ln" in name.split(".")[-2]]
    for name in ("embed.W_E", "pos_embed.W_pos", "blocks.2.attn.W_O", "blocks.2.mlp.W_out", "blocks.2.mlp.b_out"):
        assert np.abs(weights[name].mean(-1)).max() < 1e-6, name
    assert np.abs(weights["unembed.W_U"].mean(-1)).max() < 1e-6
    assert np.abs(weights["blocks.1.attn.W_Q"].mean(1)).max() < 1e-6
    assert not weights["blocks.3.attn.b_V"].any()


def test_a_folded_norm_gives_its_normalized_input(processed: HookedTransformer, tokens: np.ndarray) -> None:
    _, cache = processed.run_with_cache(tokens)
    np.testing.assert_array_equal(cache["unembed.hook_in"], cache["ln_final.hook_normalized"])
    np.testing.assert_array_equal(processed.ln_final(cache["resid_post", -1]).shape, cache["unembed.hook_in"].shape)
    assert np.abs(processed.ln_final(cache["resid_post", -1]) - cache["unembed.hook_in"]).max() < 1e-5


def test_an_edit_where_folded_hook_points_share_a_value_reaches_the_logits(
    processed: HookedTransformer, tokens: np.ndarray
) -> None:
    def zero(x: np.ndarray, hook: object) -> np.ndarray:
        return np.zeros_like(x)

    for name in ("unembed.hook_in", "ln_final.hook_normalized"):
        logits = processed.run_with_hooks(tokens, fwd_hooks=[(name, zero)])
        np.testing.assert_allclose(logits, np.broadcast_to(processed.weights["unembed.b_U"], logits.shape), atol=1e-6)


def test_refactoring_keeps_the_circuits(tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path) -> None:
    flags = {**dict.fromkeys(STEPS, False), "refactor_factored_attn_matrices": True}
    model = HookedTransformer.from_onnx(process_weights(tiny_folder, tmp_path / "model", **flags))
    for left, right in (("W_Q", "W_K"), ("W_V", "W_O")):
        a, b = (
            m.weights[f"blocks.1.attn.{left}"]
            @ (m.weights[f"blocks.1.attn.{right}"].transpose(0, 2, 1) if right == "W_K" else m.weights[f"blocks.1.attn.{right}"])
            for m in (tiny, model)
        )  # fmt: skip
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    gram = model.weights["blocks.1.attn.W_O"] @ model.weights["blocks.1.attn.W_O"].transpose(0, 2, 1)
    assert np.abs(gram - np.eye(model.cfg.d_head)).max() < 1e-5  # rows of W_O are a rotation's


def convert(folder: Path, out: Path, dtype: str) -> HookedTransformer:
    out.mkdir()
    convert_into(folder / "model.onnx", out, dtype)
    return HookedTransformer.from_onnx(out)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 5e-6), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_other_precisions_compute_the_same_model(
    dtype: str, tolerance: float, tiny: HookedTransformer, tiny_folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    model = convert(tiny_folder, tmp_path / "model", dtype)
    computed = "float32" if dtype == "bfloat16" else dtype
    assert model.cfg.dtype == computed
    assert model.dtype == ("bfloat16 weights, float32 activations" if dtype == "bfloat16" else dtype)
    expected, expected_cache = tiny.run_with_cache(tokens)
    logits, cache = model.run_with_cache(tokens)
    assert {str(value.dtype) for value in cache.values()} == {computed}
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()
    assert np.abs(logits - expected).max() > 0  # it is not the float32 file
    seen = []

    def halve(x: np.ndarray, hook: object) -> np.ndarray:
        seen.append(x.dtype)
        return x / 2

    name = "blocks.1.attn.hook_z"
    edited, reference = (m.run_with_hooks(tokens, fwd_hooks=[(name, halve)]) for m in (model, tiny))
    assert [str(kind) for kind in seen] == [computed, "float32"]
    assert np.abs(edited - reference).max() <= tolerance * np.abs(reference).max()
    assert list(cache) == list(expected_cache)


def test_the_first_layers_are_the_lens_of_their_residual(
    tiny: HookedTransformer, tiny_folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    short = surgery.first_layers(surgery.load(tiny_folder), 2)
    surgery.save(short, tmp_path / "short")
    model = HookedTransformer.from_onnx(tmp_path / "short", tokenizer=None)
    _, cache = tiny.run_with_cache(tokens)
    expected = tiny.unembed(tiny.ln_final(cache["resid_post", 1]))
    assert model.cfg.n_layers == 2
    assert np.abs(model(tokens) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert not [name for name in model.hook_dict if name.startswith(("blocks.2", "blocks.3"))]


def test_the_gates_weights_are_not_centred(tiny: HookedTransformer) -> None:
    """As in TransformerLens, which centres W_in beside it: an edit of the norm's output that has a mean reaches the gate."""
    random = np.random.default_rng(0)
    given = {name: random.normal(size=(5, 7)) for name in ("mlp.W_gate", "mlp.W_in")} | {"ln2.w": random.normal(size=5)}
    found = {name: array.copy() for name, array in given.items()}
    config = replace(tiny.runner.config, gated_mlp=True)
    process_group(found, ["fold_ln"], config)
    folded = {name: given[name] * given["ln2.w"][:, None] for name in ("mlp.W_gate", "mlp.W_in")}
    np.testing.assert_array_equal(found["mlp.W_gate"], folded["mlp.W_gate"])
    np.testing.assert_allclose(found["mlp.W_in"], folded["mlp.W_in"] - folded["mlp.W_in"].mean(0), atol=1e-12)
