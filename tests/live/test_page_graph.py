"""The graph of a live page in plain ONNX Runtime: its logits and patterns are the model's, and its lens what NumPy computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Scale, Steer, adopt, surgery
from graphlens.errors import InputError
from graphlens.surgery.page_graph import LENS_COUNT, page_graph
from tests.foreign_decoder import VOCAB, decoder
from tests.live.page_models import run

IDS = [0, 311, 7, 45, 12, 602, 9]


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    return graphlens.embedded_model(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedTransformer:
    return HookedTransformer.from_onnx(folder, "cpu")


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def lens(model: HookedTransformer, residual: np.ndarray) -> np.ndarray:
    """The probabilities after the final norm and the unembedding of a residual, in float64, from their definitions."""
    x, weights = residual.astype(np.float64), model.weights
    if model.cfg.normalization_type == "LN":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.cfg.eps) * np.asarray(weights["ln_final.w"], np.float64)
    assert "unembed.b_U" not in weights  # both unembed without a bias
    x = x + (np.asarray(weights["ln_final.b"], np.float64) if "ln_final.b" in weights else 0)
    return softmax(x @ np.asarray(weights["unembed.W_U"], np.float64))


def test_without_edits_it_computes_what_the_model_does(folder: Path, model: HookedTransformer) -> None:
    graph = page_graph(surgery.load(folder))
    found = run(graph, folder, IDS)
    logits, cache = model.run_with_cache(np.array([IDS]))
    np.testing.assert_allclose(found["logits"], logits, atol=2e-5, rtol=0)
    for hook, output in graph.outputs.items():
        np.testing.assert_allclose(found[output], cache[hook], atol=2e-5, rtol=0)
    assert len(graph.gates) == 6 * model.cfg.n_layers


def test_the_lens_is_the_final_norm_and_the_unembedding_of_each_layer(folder: Path, model: HookedTransformer) -> None:
    graph = page_graph(surgery.load(folder))
    at = [1, 5, 6]
    found = run(graph, folder, IDS, at=at)
    _, cache = model.run_with_cache(np.array([IDS]))
    assert graph.lens is not None
    assert len(graph.lens) == model.cfg.n_layers + 1
    for row, hook in enumerate(graph.lens):
        expected = lens(model, cache[hook][0, at])
        top = np.argsort(-expected, axis=-1)[:, :LENS_COUNT]
        np.testing.assert_allclose(
            found["lens/probabilities"][row], np.take_along_axis(expected, top, -1), atol=1e-5, rtol=0
        )
        np.testing.assert_allclose(  # the tokens that it names have those probabilities: equal ones may change places
            np.take_along_axis(expected, found["lens/tokens"][row], -1), found["lens/probabilities"][row], atol=1e-5
        )


def test_its_gates_do_what_interventions_do_and_the_lens_sees_it(folder: Path, model: HookedTransformer) -> None:
    cfg, rng = model.cfg, np.random.default_rng(3)
    wide = rng.standard_normal(cfg.d_model).astype(np.float32)
    edits = {
        "blocks.0.attn.hook_z": [
            Ablate("blocks.0.attn.hook_z", heads=[1, 3]),
            Scale("blocks.0.attn.hook_z", 1.5, heads=2),
        ],
        "blocks.1.hook_resid_pre": [Patch("blocks.1.hook_resid_pre", wide, positions=3)],
        "blocks.1.hook_resid_mid": [Scale("blocks.1.hook_resid_mid", 0.5, positions=slice(2, 5))],
        "blocks.1.hook_mlp_out": [Ablate("blocks.1.hook_mlp_out")],
        "blocks.2.hook_resid_post": [Steer("blocks.2.hook_resid_post", wide, 0.25)],
        "blocks.3.hook_attn_out": [Steer("blocks.3.hook_attn_out", wide, positions=-1)],
    }
    graph, manifest = page_graph(surgery.load(folder)), surgery.read_manifest(surgery.load(folder))
    found = run(graph, folder, IDS, edits, manifest)
    tokens, every = np.array([IDS]), [item for items in edits.values() for item in items]
    with model.intervene(every):
        logits, cache = model.run_with_cache(tokens)
    assert np.abs(logits - model(tokens)).max() > 1
    np.testing.assert_allclose(found["logits"], logits, atol=5e-5, rtol=0)
    for hook, output in graph.outputs.items():
        np.testing.assert_allclose(found[output], cache[hook], atol=5e-5, rtol=0)
    assert graph.lens is not None
    for row, hook in enumerate(graph.lens):
        largest = np.sort(lens(model, cache[hook][0]), -1)[:, : -LENS_COUNT - 1 : -1]
        np.testing.assert_allclose(found["lens/probabilities"][row], largest, atol=2e-5, rtol=0)


def test_a_processed_and_a_baked_model_have_pages(folder: Path, tmp_path: Path) -> None:
    surgery.process_weights(folder, tmp_path / "processed", announce=lambda _: None)
    edits = [Ablate("blocks.1.attn.hook_z", heads=0), Scale("blocks.2.hook_resid_post", 0.5)]
    graphlens.bake_model(tmp_path / "processed", edits, tmp_path / "baked", keep_hooks=True, announce=lambda _: None)
    for made in (tmp_path / "processed", tmp_path / "baked"):
        model, hooked = HookedTransformer.from_onnx(made, "cpu"), surgery.load(made)
        graph, manifest, z = page_graph(hooked), surgery.read_manifest(hooked), "blocks.2.attn.hook_z"
        logits = model.run_with_interventions(np.array([IDS]), Ablate(z, heads=1))
        found = run(graph, made, IDS, {z: [Ablate(z, heads=1)]}, manifest)
        np.testing.assert_allclose(found["logits"], logits, atol=5e-5, rtol=0)
        np.testing.assert_allclose(
            found["lens/probabilities"][-1, :, 0], softmax(logits[0].astype(np.float64)).max(-1), atol=1e-5, rtol=0
        )


def test_an_adopted_file_has_a_page(tmp_path: Path) -> None:
    report = adopt(decoder(tmp_path / "model.onnx"), tmp_path / "hooked", announce=lambda _: None)
    assert report.folder is not None
    model, graph = HookedTransformer.from_onnx(report.folder, "cpu"), page_graph(surgery.load(report.folder))
    ids = [3, VOCAB - 1, 5, 8]
    found, logits = run(graph, report.folder, ids), model(np.array([ids]))
    np.testing.assert_allclose(found["logits"], logits, atol=2e-5, rtol=0)
    np.testing.assert_allclose(found["lens/probabilities"][-1, -1, 0], softmax(logits[0, -1]).max(), atol=1e-6)
    assert graph.no_lens == ""


def test_a_model_that_stops_elsewhere_has_a_page_without_a_lens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = surgery.load(folder)

    def refuse(*_: object) -> None:
        raise InputError("tiny has no logit lens: what follows its last block reads 'x' besides the residual stream.")

    monkeypatch.setattr("graphlens.surgery.page_graph.with_lens", refuse)
    graph = page_graph(hooked)
    assert graph.lens is None
    assert "reads 'x'" in graph.no_lens
    assert set(run(graph, folder, IDS)) == {"logits", *graph.outputs.values()}


def test_a_model_of_another_dtype_is_refused(folder: Path) -> None:
    from dataclasses import replace

    from graphlens.surgery.graph import write_manifest

    hooked = surgery.load(folder)
    manifest = surgery.read_manifest(hooked)
    write_manifest(
        hooked, manifest.with_hooks({name: replace(entry, dtype="float16") for name, entry in manifest.hooks.items()})
    )
    with pytest.raises(InputError, match="activations of float16: a page runs models of float32"):
        page_graph(hooked)
