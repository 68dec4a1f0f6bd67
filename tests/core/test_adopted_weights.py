"""Weights of adopted files, and what is computed from them: cache algebra, flags, parts, sweeps, gradients, commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

import graphlens
from graphlens import HookedTransformer, adopt, metrics, patching
from graphlens.pipelines.adopt import AdoptReport
from graphlens.surgery.precision import convert_into
from tests import command_line
from tests.foreign_decoder import D_HEAD, D_MODEL, HEADS, LAYERS, POSITIONS, VOCAB, decoder, forward, weights

IDS = np.random.default_rng(1).integers(0, VOCAB, (2, 7))
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("original") / "model.onnx")


@pytest.fixture(scope="module")
def report(original: Path, tmp_path_factory: pytest.TempPathFactory) -> AdoptReport:
    return adopt(original, tmp_path_factory.mktemp("adopted") / "hooked", announce=lambda _: None)


@pytest.fixture(scope="module")
def model(report: AdoptReport) -> HookedTransformer:
    assert report.folder is not None
    return HookedTransformer.from_onnx(report.folder, "cpu")


def test_weights_are_those_of_numpy(model: HookedTransformer) -> None:
    own = weights()
    q, _, v = np.split(own["l1.c"], 3, -1)
    by_head = (D_MODEL, HEADS, D_HEAD)
    np.testing.assert_array_equal(model.W_Q[1], q.reshape(by_head).transpose(1, 0, 2))
    np.testing.assert_array_equal(model.W_V[1], v.reshape(by_head).transpose(1, 0, 2))
    np.testing.assert_array_equal(model.b_K[1], np.split(own["l1.d"], 3)[1].reshape(HEADS, D_HEAD))
    np.testing.assert_array_equal(model.W_O[0], own["l0.e"].reshape(HEADS, D_HEAD, D_MODEL))
    np.testing.assert_array_equal(model.W_in[0], own["l0.i"])
    np.testing.assert_array_equal(model.b_out[1], own["l1.l"])
    np.testing.assert_array_equal(model.W_U, own["w4"])
    np.testing.assert_array_equal(model.b_U, np.zeros(VOCAB))
    np.testing.assert_array_equal(model.W_E, own["w0"])
    np.testing.assert_array_equal(model.W_pos, own["w1"])
    assert model.cfg.n_ctx == POSITIONS
    assert (model.cfg.act_fn, model.cfg.eps) == ("relu", pytest.approx(1e-4))


@pytest.mark.parametrize("rows", [VOCAB, 10, 4096])
def test_an_unembedding_with_a_scale_for_each_token_is_found_whatever_is_looked_at_at_once(
    rows: int, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabularies are multiples of powers of two: 32,768, say."""
    quantize_dynamic(original, tmp_path / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    monkeypatch.setattr("graphlens.pipelines.adopt_weights.ROWS", rows)
    found = adopt(tmp_path / "model.onnx", tmp_path / "hooked", announce=lambda _: None)
    assert "unembed.W_U" in found.weights, found.adopted.missing
    tensors = {each.name: numpy_helper.to_array(each) for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    integers, scale, zero = (tensors[f"w4_{part}"] for part in ("quantized", "scale", "zero_point"))
    assert scale.shape == (VOCAB,)
    expected = (integers.astype(np.float32) - zero) * scale
    np.testing.assert_allclose(HookedTransformer.from_onnx(tmp_path / "hooked", "cpu").W_U, expected, rtol=1e-6)


def test_what_a_cache_makes_of_weights_adds_up(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(IDS)
    heads = cache.stack_head_results(layer=1)
    np.testing.assert_allclose(heads.sum(0) + model.b_O[0], cache["blocks.0.hook_attn_out"], rtol=0, atol=2e-5)
    last = cache[f"blocks.{LAYERS - 1}.hook_resid_post"]
    np.testing.assert_allclose(cache.decompose_resid().sum(0), last, rtol=0, atol=2e-5)
    normed = cache.apply_ln_to_stack(last[None], layer=-1)[0]
    np.testing.assert_allclose(normed, cache["ln_final.hook_normalized"], rtol=0, atol=2e-5)
    parts = [cache.stack_head_results(layer=LAYERS, apply_ln=False)]
    assert parts[0].shape[0] == LAYERS * HEADS


def test_a_weight_that_is_set_is_computed_with(model: HookedTransformer) -> None:
    from copy import copy

    other = copy(model)
    other.set_weights(
        {"blocks.1.attn.W_O": np.zeros_like(model.W_O[1]), "blocks.1.attn.b_O": np.zeros_like(model.b_O[1])}
    )

    def without(name: str, value: np.ndarray) -> np.ndarray:
        return value * 0 if name == "blocks.1.hook_attn_out" else value

    np.testing.assert_allclose(other(IDS), forward(IDS, edit=without)[0], **CLOSE)


def test_flags_and_parts_compute_what_the_graph_computes(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(IDS)
    model.set_use_attn_result(True)
    try:
        _, found = model.run_with_cache(IDS)
        np.testing.assert_allclose(
            found["blocks.1.attn.hook_result"].sum(2) + model.b_O[1], cache["blocks.1.hook_attn_out"], rtol=0, atol=2e-5
        )
    finally:
        model.set_use_attn_result(False)
    residual = cache["blocks.1.hook_resid_pre"]
    np.testing.assert_allclose(model.blocks[1](residual), cache["blocks.1.hook_resid_post"], **CLOSE)
    normed = model.blocks[1].ln1(residual)
    np.testing.assert_allclose(model.blocks[1].attn(normed, normed, normed), cache["blocks.1.hook_attn_out"], **CLOSE)
    middle = model.blocks[1].ln2(cache["blocks.1.hook_resid_mid"])
    np.testing.assert_allclose(model.blocks[1].mlp(middle), cache["blocks.1.hook_mlp_out"], **CLOSE)
    np.testing.assert_allclose(model(residual, start_at_layer=1), model(IDS), **CLOSE)
    np.testing.assert_array_equal(model(IDS, stop_at_layer=1), residual)


def test_patching_is_a_loop_of_runs(model: HookedTransformer) -> None:
    corrupted = IDS[:1].copy()
    corrupted[0, 2] = (corrupted[0, 2] + 3) % VOCAB
    _, clean = model.run_with_cache(IDS[:1])

    def metric(logits: np.ndarray) -> Any:
        return logits[0, -1, 4] - logits[0, -1, 9]

    found = patching.get_act_patch_attn_head_out_by_pos(model, corrupted, clean, metric)
    source = forward(IDS[:1])[1]
    for layer in range(LAYERS):
        for position in range(7):
            for head in range(HEADS):

                def put(name: str, value: np.ndarray, layer=layer, position=position, head=head) -> np.ndarray:  # type: ignore[no-untyped-def]
                    if name == f"blocks.{layer}.attn.hook_z":
                        value[:, position, head] = source[name][:, position, head]
                    return value

                expected = metric(forward(corrupted, edit=put)[0])
                assert abs(float(np.asarray(found)[layer, position, head]) - expected) < 5e-5


def test_gradients_are_those_of_finite_differences(model: HookedTransformer) -> None:
    hook, at = "blocks.0.attn.hook_z", (0, 3, 1, 2)
    metric = metrics.LogitDiff(4, 9)
    gradients = model.gradients(IDS[:1], metric, [hook])

    def moved(step: float) -> float:
        def edit(name: str, value: np.ndarray) -> np.ndarray:
            if name == hook:
                value[at] += step
            return value

        logits = forward(IDS[:1], edit=edit)[0]
        return float(logits[0, -1, 4] - logits[0, -1, 9])

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert float(np.asarray(gradients[hook])[at]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_its_weights_are_neither_processed_nor_converted(report: AdoptReport, tmp_path: Path) -> None:
    assert report.folder is not None
    with pytest.raises(graphlens.ExportError, match=r"adopted from model\.onnx"):
        graphlens.process_weights(report.folder, tmp_path / "processed")
    with pytest.raises(graphlens.ExportError, match="not converted to another dtype"):
        convert_into(report.folder / "model.onnx", tmp_path, "float16")


def test_the_commands_work_on_it(original: Path, tmp_path: Path) -> None:
    found = command_line.graphlens("adopt", original, "-o", tmp_path / "hooked").stdout
    assert "Hook points: 40 found" in found
    assert "Expanded: 5 LayerNormalization" in found
    assert "The original is as it was" in found
    assert "blocks.1.attn.hook_z" in command_line.graphlens("hooks", tmp_path / "hooked").stdout
    assert "nothing was found wrong" in command_line.graphlens("check", tmp_path / "hooked").stdout
    dry = command_line.graphlens("adopt", original, "--dry-run").stdout
    assert "Nothing was written" in dry
    refused = command_line.graphlens("adopt", original)
    assert refused.returncode == 1
    assert "--dry-run" in command_line.sentence(refused.stderr)
