"""SAEs in other kinds of model and job: adopted files, encoders, half precision, harvests of features."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np

import graphlens
from graphlens import HookedEncoder, HookedTransformer, Scale, Steer, metrics
from tests import foreign_decoder
from tests.families.encoders import hooked_of, inputs
from tests.saes.odd_model import TOKENS, folder, model
from tests.saes.sae_cases import RESID, made

POST = f"{RESID}.hook_sae_acts_post"


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max()))


def test_an_adopted_file(tmp_path: Path) -> None:
    file = foreign_decoder.decoder(tmp_path / "model.onnx")
    graphlens.adopt(file, tmp_path / "adopted", announce=lambda line: None)
    opened = HookedTransformer.from_onnx(tmp_path / "adopted", "cpu")
    hook = "blocks.0.hook_resid_post"
    tokens = np.random.default_rng(0).integers(1, opened.cfg.d_vocab, (2, 5))
    sae, post = made(1, width=opened.cfg.d_model, hook=hook, architecture="jumprelu"), f"{hook}.hook_sae_acts_post"
    plain = opened(tokens)
    for error_term in (False, True):
        with opened.saes(sae, use_error_term=error_term):
            logits, cache = opened.run_with_cache(tokens)
            edited = opened.run_with_interventions(tokens, Steer(post, 2.0, dims=[3]))
            gradients = opened.gradients(tokens, metrics.LogitDiff([3, 4], [7, 8]), names=[post])
            opened.bake(Steer(post, 2.0, dims=[3]), tmp_path / f"baked-{error_term}", keep_hooks=True)
        for name, value in sae.values(cache[hook], error_term).items():
            close(cache[f"{hook}.{name}"], value)
        close(HookedTransformer.from_onnx(tmp_path / f"baked-{error_term}", "cpu")(tokens), edited)
        assert np.abs(edited - logits).max() > 1e-3
        assert np.any(gradients[post])
    close(logits, plain)
    names = {"hook": "blocks.0.mlp.hook_in", "hook_out": "blocks.0.hook_mlp_out"}  # one that the file has no shape of
    transcoder = made(2, width=opened.cfg.d_model, architecture="skip_transcoder", **names)
    logits, cache = opened.run_with_cache_with_saes(tokens, saes=transcoder)
    read = cache[names["hook"]]
    written = read @ opened.blocks[0].mlp.W_in + opened.blocks[0].mlp.b_in
    close(written, cache["blocks.0.mlp.hook_pre"])
    close(cache[f"{names['hook_out']}.hook_sae_output"], transcoder(read))
    replaced = opened.run_with_hooks(tokens, fwd_hooks=[(names["hook_out"], lambda value, hook: transcoder(read))])
    close(logits, replaced)


def test_saes_that_are_taken_away_are_given_back() -> None:
    """A loop over many keeps those of the sessions and graphs that are open, and no more."""
    odd, opened = model(), []
    gradient_of = metrics.LogitDiff([3, 4], [7, 8])
    for seed in range(32):
        sae = made(seed, hook=RESID)
        opened.append(weakref.ref(sae))
        with odd.saes(sae, use_error_term=True):
            odd.gradients(TOKENS, gradient_of, names=[POST])
            odd.run_with_hooks(TOKENS, fwd_hooks=[(POST, lambda value, hook: value)])
        del sae
    gc.collect()
    assert sum(each() is not None for each in opened) <= 18  # 6 sessions and 12 graphs


def test_an_encoder(tmp_path: Path) -> None:
    opened = HookedEncoder.from_onnx(hooked_of("bert", tmp_path), "cpu")
    hook, tokens = "blocks.0.hook_resid_post", inputs()[0]
    sae = made(1, width=opened.cfg.d_model, hook=hook, architecture="gated")
    with opened.saes(sae):
        logits, cache = opened.run_with_cache(tokens)
        with opened.intervene(Steer(f"{hook}.hook_sae_acts_post", 3.0, dims=[5])):
            assert np.abs(opened(tokens) - logits).max() > 1e-3
    close(cache[f"{hook}.hook_sae_output"], sae(cache[hook]))


def test_a_model_in_half_precision() -> None:
    """The SAE computes in float32, as SAELens's does; what goes on is the model's."""
    opened = HookedTransformer.from_pretrained_no_processing("tiny-gpt2", dtype="float16")
    hook = "blocks.1.hook_resid_post"
    sae, tokens = made(1, width=opened.cfg.d_model, hook=hook), np.arange(2, 14).reshape(2, 6)
    for error_term in (False, True):
        with opened.saes(sae, use_error_term=error_term):
            _, cache = opened.run_with_cache(tokens)
        assert cache[hook].dtype == np.float16
        for name, value in sae.values(cache[hook], error_term).items():
            found = cache[f"{hook}.{name}"]
            assert found.dtype == (np.float16 if name == "hook_sae_output" else np.float32)
            # ONNX Runtime leaves out that a CPU's float16 values were rounded where float32 reads them.
            close(found, value.astype(found.dtype), 2e-3)


def test_a_harvest_of_features(tmp_path: Path) -> None:
    odd = model()
    sae = made(1, hook=RESID, architecture="topk", k=5)
    with odd.saes(sae):
        found = graphlens.harvest(odd, TOKENS, "*.hook_sae_acts_post", tmp_path / "harvest", verbose=False)
        _, cache = odd.run_with_cache(TOKENS, names_filter=POST)
    close(np.asarray(found[POST]).reshape(cache[POST].shape), cache[POST])


def test_weights_files_of_the_model_are_left_alone(tmp_path: Path) -> None:
    """A saved SAE that is opened from its folder gives the same, over the mapped file."""
    sae = made(1, hook=RESID)
    sae.save(tmp_path / "sae")
    before = {file.name: file.stat().st_mtime_ns for file in folder().iterdir()}
    odd, again = model(), graphlens.Sae.from_folder(tmp_path / "sae")
    with odd.intervene(Scale("blocks.0.hook_mlp_out", 1.1)):
        expected = odd.run_with_saes(TOKENS, saes=sae)
        assert np.array_equal(odd.run_with_saes(TOKENS, saes=again), expected)
    assert {file.name: file.stat().st_mtime_ns for file in folder().iterdir()} == before
