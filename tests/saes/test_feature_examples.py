"""The tokens at which features are largest, from runs and from harvests; the logits they raise; a page of both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from graphlens import HookedTransformer, Sae, Steer, feature_examples, feature_page, harvest, views
from graphlens.analysis.feature_examples import FeatureExamples
from graphlens.errors import InputError
from graphlens.experiments.feature_search import feature_logits
from tests.saes.odd_model import model
from tests.saes.sae_cases import D_SAE, MLP_OUT, NORMED, RESID, VOCABULARY, Z, made

TOKENS = np.random.default_rng(8).integers(1, VOCABULARY, (9, 7))
SAE = made(hook=RESID)
POST = f"{RESID}.hook_sae_acts_post"
K = 5


@pytest.fixture(scope="module")
def odd() -> HookedTransformer:
    return model()


@pytest.fixture(scope="module")
def acts(odd: HookedTransformer) -> np.ndarray:
    _, cache = odd.run_with_cache_with_saes(TOKENS, saes=[SAE], use_error_term=True)
    return cache[POST].reshape(-1, D_SAE)


@pytest.mark.parametrize("features", [None, [40, 3, 17]])
def test_they_are_the_largest_of_all_runs(odd: HookedTransformer, acts: np.ndarray, features: list[int] | None) -> None:
    found = feature_examples(odd, TOKENS, SAE, features, k=K, batch_size=2)
    wanted = acts if features is None else acts[:, features]
    expected = np.sort(wanted, 0)[::-1][:K]
    assert np.abs(found.values - expected).max() < 1e-4
    assert np.abs(np.take_along_axis(wanted, found.places, 0) - expected).max() < 1e-4
    assert np.allclose(found.density, (wanted > 0).mean(0), atol=2 / len(acts))
    assert np.array_equal(found.tokens, TOKENS.ravel())
    assert found.numbers == tuple(range(D_SAE) if features is None else features)


def test_contexts_and_histograms(odd: HookedTransformer, acts: np.ndarray) -> None:
    found = feature_examples(odd, TOKENS, SAE, [17], k=K)
    for one in found.contexts(17, before=3, after=2):
        assert TOKENS[one.prompt, one.position] == one.ids[one.at]
        start = max(0, one.position - 3)
        assert np.array_equal(one.ids, TOKENS[one.prompt, start : one.position + 3])
        place = one.prompt * TOKENS.shape[1]
        here = acts[place + start : place + min(7, one.position + 3), 17]
        assert np.abs(one.activations - here).max() < 1e-4
        assert one.activations[one.at] == one.value > 0
    counts, edges = found.histogram(17, bins=6)
    expected = np.histogram(found.activations[found.activations > 0], 6)
    assert np.array_equal(counts, expected[0])
    assert edges[-1] == found.values[0, 0]
    assert counts.sum() == (acts[:, 17] > 0).sum()


def test_padding_and_tokens_left_out(odd: HookedTransformer) -> None:
    padded = TOKENS.copy()
    mask = np.ones_like(padded)
    padded[2, 3:], padded[2, :3], mask[2, :3] = TOKENS[2, :4], 0, 0
    out = int(TOKENS[0, 0])
    found = feature_examples(odd, padded, SAE, [3], k=100, attention_mask=mask, exclude=[out])
    assert len(found.tokens) == TOKENS.size - 3
    seen = found.places[found.places >= 0]
    assert len(seen) == (found.tokens != out).sum()
    assert out not in found.tokens[seen]
    assert np.array_equal(found.positions[found.prompts == 2], range(4))
    alone = feature_examples(odd, TOKENS[2:3, :4], SAE, [3])
    assert np.abs(found.activations[found.prompts == 2] - alone.activations).max() < 1e-4


@pytest.mark.parametrize("kept", [True, False])
def test_of_a_harvest(odd: HookedTransformer, acts: np.ndarray, tmp_path: Path, kept: bool) -> None:
    with odd.saes(SAE, use_error_term=True):
        made_of = harvest(odd, TOKENS, POST, tmp_path / "acts", reduce=() if kept else ("top",), verbose=False)
    for features in (None, [40, 3]):
        found = FeatureExamples.of_harvest(made_of, POST, features, k=K)
        wanted = acts if features is None else acts[:, features]
        assert np.abs(found.values - np.sort(wanted, 0)[::-1][:K]).max() < 1e-4
    live = feature_examples(odd, TOKENS, SAE, [3], k=K)
    for one, other in zip(found.contexts(3), live.contexts(3), strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert (one.prompt, one.position, one.at) == (other.prompt, other.position, other.at)
        if kept:
            assert np.abs(one.activations - other.activations).max() < 1e-4
        else:
            assert np.isnan(np.delete(one.activations, one.at)).all()
    if not kept:
        assert np.isnan(found.density).all()
        with pytest.raises(InputError, match="not kept"):
            found.histogram(3)


@pytest.mark.parametrize(
    "sae",
    [SAE, made(hook=Z, reshape_activations="hook_z"), made(hook=NORMED, hook_out=MLP_OUT, architecture="transcoder")],
    ids=["resid", "hook_z", "transcoder"],
)
def test_logits_are_what_a_small_push_at_the_last_stream_does(odd: HookedTransformer, sae: Sae) -> None:
    """A step along the row changes the logits, but for the norm's scale, by the row's logits; differences of logits do not
    see the mean that was taken off."""
    feature = 17
    row = sae.W_dec[feature].astype(np.float64)
    if sae.cfg.hook == Z:
        row = row @ np.asarray(odd.weights["blocks.1.attn.W_O"], np.float64).reshape(len(row), -1)
    last, size = "blocks.2.hook_resid_post", 1e-3
    scale = odd.run_with_cache(TOKENS)[1]["ln_final.hook_scale"].astype(np.float64)
    up, down = (
        np.asarray(odd.run_with_interventions(TOKENS, Steer(last, (sign * size * row).astype(np.float32))), np.float64)
        for sign in (1, -1)
    )
    push = (up - down) / (2 * size) * scale
    normed = odd.run_with_cache(TOKENS)[1]["ln_final.hook_normalized"].astype(np.float64)
    centred = row - row.mean()
    # The norm takes away what lies along the stream itself.
    unit = normed / np.asarray(1.0)
    along = (unit @ centred)[..., None] * unit / (unit**2).sum(-1, keepdims=True)
    weight = np.asarray(odd.weights["ln_final.w"], np.float64)
    lost = (along * weight) @ np.asarray(odd.W_U, np.float64)
    expected = (push + lost).reshape(-1, VOCABULARY)
    expected = expected - expected.mean(-1, keepdims=True)
    (found,) = feature_logits(odd, sae, [feature])
    assert np.abs(found).max() > 0.1
    assert np.abs(expected - found).max() <= 2e-2 * np.abs(found).max()


def test_a_page(odd: HookedTransformer, tmp_path: Path) -> None:
    page = feature_page(odd, TOKENS, SAE, [17, 3], k=4)
    kinds = [view.kind for view in page.views]
    assert kinds == ["bars", *["text"] * 4, "table"] * 2
    html = page.save(tmp_path / "features.html").read_text("utf-8")
    assert "Feature 17: logits" in html
    assert "position" in html
    rows = page.views[5].data["rows"]
    (logits,) = feature_logits(odd, SAE, [17])
    assert [int(row[0]) for row in rows] == list(np.argsort(-logits, kind="stable")[:10])
    assert [row[3] for row in rows] == pytest.approx(np.sort(logits)[:10])
    silent = Sae.from_arrays(SAE.W_enc, np.full(D_SAE, -1e3), SAE.W_dec, SAE.b_dec, RESID)
    assert "none of these tokens" in str(feature_page(odd, TOKENS, silent, [0]).html())
    assert [view.kind for view in feature_page(odd, TOKENS, made(hook=NORMED), [0]).views] == [
        "bars",
        *["text"] * 10,
        "table",
    ]


def test_what_is_refused(odd: HookedTransformer) -> None:
    for features in ([D_SAE], [-1], []):
        with pytest.raises(InputError, match="feature"):
            feature_examples(odd, TOKENS, SAE, features)
    found = feature_examples(odd, TOKENS, SAE)
    with pytest.raises(InputError, match="not kept"):
        found.histogram(3)
    with pytest.raises(InputError, match="not among"):
        found.contexts(99)
    with pytest.raises(InputError, match="not among"):
        views.feature(found, 99)
    assert len(views.feature(found, 3).views) == 10
    assert not re.search("NaN", json.dumps([dict(view.data) for view in views.feature(found, 3).views], default=str))
