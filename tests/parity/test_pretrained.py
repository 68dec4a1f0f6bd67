"""The constructors as people call them: processing, precision, fine-tunes in memory, tokenizers, fewer layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from lens_oracle import PROCESSING, oracle

import graphlens
import graphlens.torch
from graphlens import HookedTransformer


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHLENS_CACHE", str(tmp_path_factory.getbasetemp() / "pretrained-cache"))


TOKENS = np.random.default_rng(0).integers(0, 101, (2, 9))


def test_float64_is_torchs_to_the_last_digits(odd_checkpoint: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing(odd_checkpoint, dtype=torch.float64)
    logits, cache = model.run_with_cache(TOKENS)
    expected, expected_cache = oracle(odd_checkpoint, dtype=torch.float64).run_with_cache(torch.from_numpy(TOKENS))
    assert logits.dtype == np.float64
    for name, reference in {"logits": expected, **dict(expected_cache.items())}.items():
        value = reference.numpy()
        found = logits if name == "logits" else cache[name]
        finite = np.isfinite(value)
        assert np.abs(found[finite] - value[finite]).max() <= 1e-11 * max(1, np.abs(value[finite]).max()), name


def test_processed_float64_is_torchs_but_for_weights_processed_in_float32(odd_checkpoint: Path) -> None:
    model = HookedTransformer.from_pretrained(odd_checkpoint, dtype=torch.float64)
    lens = oracle(odd_checkpoint, dtype=torch.float64, **dict.fromkeys(PROCESSING, True))
    expected, expected_cache = lens.run_with_cache(torch.from_numpy(TOKENS))
    logits, cache = model.run_with_cache(TOKENS)
    assert logits.dtype == np.float64
    worst = 0.0
    for name, reference in {"logits": expected, **dict(expected_cache.items())}.items():
        value, found = reference.numpy(), logits if name == "logits" else cache[name]
        finite = np.isfinite(value)
        worst = max(worst, np.abs(found[finite] - value[finite]).max() / max(1, np.abs(value[finite]).max()))
    assert worst <= 1e-6  # measured: 2.3e-7 here, 1.6e-7 on the embedded model
    # Ours are processed in float32 and then widened, TransformerLens's are processed in float64: that is the difference.
    for name in ("W_E", "W_Q", "W_U", "b_O"):
        reference = getattr(lens, name).numpy()
        assert np.abs(getattr(model, name) - reference).max() <= 1e-6 * max(1, np.abs(reference).max()), name


def test_what_is_computed_from_float64_weights_is_float64(odd_checkpoint: Path) -> None:
    model = graphlens.torch.HookedTransformer.from_pretrained_no_processing(odd_checkpoint, dtype=torch.float64)
    lens = oracle(odd_checkpoint, dtype=torch.float64)
    for mode in ("Q", "K", "V"):
        found, expected = model.all_composition_scores(mode), lens.all_composition_scores(mode)
        assert found.dtype == torch.float64
        assert (found - expected).abs().max() <= 1e-12
    assert model.accumulated_bias(2).dtype == torch.float64
    expected = lens.b_O[:2].sum(0) + lens.b_out[:2].sum(0)  # lens.accumulated_bias adds them up in float32
    assert (model.accumulated_bias(2) - expected).abs().max() <= 1e-14


@pytest.mark.parametrize("flag", [*PROCESSING, "refactor_factored_attn_matrices"])
def test_each_processing_flag_gives_transformerlenss_weights(odd_checkpoint: Path, flag: str) -> None:
    flags = {name: name == flag for name in (*PROCESSING, "refactor_factored_attn_matrices")}
    model, lens = HookedTransformer.from_pretrained(odd_checkpoint, **flags), oracle(odd_checkpoint, **flags)
    expected = lens(torch.from_numpy(TOKENS)).numpy()
    assert np.abs(model(TOKENS) - expected).max() <= 5e-5 * np.abs(expected).max()
    for name in ("W_E", "W_pos", "W_U", "b_U", "W_in", "b_in", "W_out", "b_out", "b_O"):
        reference = getattr(lens, name).numpy()
        assert np.abs(getattr(model, name) - reference).max() <= 5e-5 * max(1, np.abs(reference).max()), name
    for left, right in (("W_Q", "W_K"), ("W_V", "W_O")):  # an SVD is unique but for signs: compare the products
        ours, theirs = ((getattr(m, left), getattr(m, right)) for m in (model, lens))
        product = ours[0] @ (ours[1].swapaxes(-1, -2) if right == "W_K" else ours[1])
        reference = (theirs[0] @ (theirs[1].mT if right == "W_K" else theirs[1])).numpy()
        assert np.abs(product - reference).max() <= 5e-5 * max(1, np.abs(reference).max()), left


def test_a_fine_tune_in_memory_is_what_runs(odd_checkpoint: Path) -> None:
    tuned = transformers.GPT2LMHeadModel.from_pretrained(odd_checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        tuned.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
        expected = tuned(torch.from_numpy(TOKENS)).logits.numpy()
    model = HookedTransformer.from_pretrained_no_processing(odd_checkpoint, hf_model=tuned)
    assert np.abs(model(TOKENS) - expected).max() <= 5e-5 * np.abs(expected).max()
    plain = HookedTransformer.from_pretrained_no_processing(odd_checkpoint)
    assert np.abs(plain(TOKENS) - expected).max() > 1e-2


def test_a_fine_tune_that_float32_would_round_is_refused(odd_checkpoint: Path) -> None:
    tuned = transformers.GPT2LMHeadModel.from_pretrained(odd_checkpoint).eval()
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(graphlens.InputError, match=r"float64, which float32 would round.*hf_model\.float\(\)"):
            HookedTransformer.from_pretrained(odd_checkpoint, hf_model=tuned.double(), dtype=dtype)
    half = HookedTransformer.from_pretrained_no_processing(odd_checkpoint, hf_model=tuned.half())  # fits
    np.testing.assert_array_equal(half.W_E, tuned.transformer.wte.weight.detach().float().numpy())


def test_a_cache_of_a_fine_tunes_original_is_refused(odd_checkpoint: Path) -> None:
    tuned = transformers.GPT2LMHeadModel.from_pretrained(odd_checkpoint).eval()
    with torch.no_grad():
        tuned.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
    one = HookedTransformer.from_pretrained_no_processing(odd_checkpoint)
    two = HookedTransformer.from_pretrained_no_processing(odd_checkpoint, hf_model=tuned)
    assert one.cfg.model_name == two.cfg.model_name
    cache = graphlens.KeyValueCache.init_cache(one.cfg, batch_size=2)
    one(TOKENS, past_kv_cache=cache)
    with pytest.raises(graphlens.InputError, match="filled by another model"):
        two(TOKENS, past_kv_cache=cache)


@pytest.mark.parametrize("constructor", ["from_pretrained", "from_pretrained_no_processing"])
def test_what_transformerlens_orders_otherwise_is_passed_by_name(odd_checkpoint: Path, constructor: str) -> None:
    make = getattr(HookedTransformer, constructor)
    make(odd_checkpoint, True, True, True)
    with pytest.raises(TypeError, match="positional"):
        make(odd_checkpoint, True, True, True, False)  # refactor_factored_attn_matrices there
    assert make(odd_checkpoint, checkpoint_label=None).cfg.n_layers == 3


def test_the_same_name_opens_from_the_cache_afterwards(odd_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = HookedTransformer.from_pretrained(odd_checkpoint)
    monkeypatch.setattr("graphlens.pipelines.cache.export_to_new_folder", None)
    second = HookedTransformer.from_pretrained(odd_checkpoint)
    assert second.runner.engine.path == first.runner.engine.path
    np.testing.assert_array_equal(second(TOKENS), first(TOKENS))
    assert second.cfg == first.cfg
    assert first.cfg.processing == PROCESSING


def test_a_transformers_tokenizer_can_be_given(odd_checkpoint: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(graphlens.embedded_model())
    folder = graphlens.embedded_model()
    given = HookedTransformer.from_pretrained_no_processing(folder, tokenizer=tokenizer)
    own = HookedTransformer.from_pretrained_no_processing(folder)
    text = "When John and Mary went to the store"
    np.testing.assert_array_equal(given.to_tokens(text), own.to_tokens(text))


def test_fewer_layers_are_transformerlenss(odd_checkpoint: Path) -> None:
    model = HookedTransformer.from_pretrained(odd_checkpoint, first_n_layers=2, n_ctx=20)
    whole = HookedTransformer.from_pretrained(odd_checkpoint)
    residual = whole(TOKENS, stop_at_layer=2)
    expected = whole.unembed(whole.ln_final(residual))
    assert np.abs(model(TOKENS) - expected).max() <= 5e-5 * np.abs(expected).max()
    assert (model.cfg.n_layers, model.cfg.n_ctx, model.W_pos.shape[0]) == (2, 20, 20)
    with pytest.raises(graphlens.InputError, match=r"21 tokens.*at most 20"):
        model(np.zeros((1, 21), np.int64))


def test_the_torch_face_opens_processed_models(odd_checkpoint: Path) -> None:
    model = graphlens.torch.HookedTransformer.from_pretrained(odd_checkpoint, device="cpu", dtype=torch.float32)
    expected = oracle(odd_checkpoint, **dict.fromkeys(PROCESSING, True))(torch.from_numpy(TOKENS))
    assert (model(torch.from_numpy(TOKENS)) - expected).abs().max() <= 5e-5 * expected.abs().max()
