"""The SAEs that ship with graphlens: they open without a network, fit tiny-gpt2 however it is processed, and are small."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import graphlens
from graphlens import Ablate, HookedTransformer, Sae
from graphlens.errors import ExportError, ModelFileError
from graphlens.file import embedded

RELEASE = "tiny-gpt2-saes"
FOLDER = graphlens.embedded_model().parent / RELEASE
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
TEXTS = [
    "When John and Mary went to the store, John gave a drink to Mary. Mary was happy.",
    "After Alice and Tom went to the park, Tom gave a ball to Alice.",
    "One day Lucy went to the farm with her small dog. The dog was brown.",
    "Today Ben had two apples. Then he found three more. Now he had five apples.",
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def test_there_is_an_sae_of_the_residual_stream_and_a_transcoder_for_each_mlp() -> None:
    saes = {name: Sae.from_pretrained(RELEASE, name) for name in NAMES}
    transcoders = [name for name, sae in saes.items() if sae.cfg.is_transcoder]
    assert transcoders == [f"blocks.{layer}.hook_mlp_out" for layer in range(4)]
    (resid,) = saes.keys() - set(transcoders)
    assert resid.endswith("hook_resid_post")
    assert saes[resid].cfg.architecture == "topk"
    for name, sae in saes.items():
        assert sae.cfg.writes == name
        assert sae.cfg.model_name == "tiny-gpt2"
        assert set(sae.files) == set(sae.cfg.shapes), "mapped, not loaded"
        assert sae.cfg.has_skip == (name in transcoders)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 3_000_000


def test_one_that_there_is_not_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=rf"no folder 'x'.*{re.escape(NAMES[0])}"):
        Sae.from_pretrained(RELEASE, "x")
    with pytest.raises(ModelFileError, match=r"no folder '\.\./tiny-gpt2'"):
        Sae.from_pretrained(RELEASE, "../tiny-gpt2")
    monkeypatch.setattr(embedded, "SAES", (RELEASE, "gone"))
    with pytest.raises(ExportError, match="'gone', which ships with graphlens, is missing"):
        embedded.embedded_folder("gone", embedded.CARD)


@pytest.mark.parametrize("name", NAMES)
def test_it_recovers_the_loss(name: str) -> None:
    """Texts of the model's own kind; the card's figure, of many more, is recomputed by ``python tools/sae_card.py --check``."""
    model, sae = HookedTransformer.from_pretrained_no_processing("tiny-gpt2"), Sae.from_pretrained(RELEASE, name)
    rows = [model.to_tokens(text) for text in TEXTS]

    def loss() -> float:
        return float(np.mean([model(row, return_type="loss") for row in rows]))

    intact = loss()
    with model.saes(sae):
        kept = loss()
    with model.intervene([Ablate(name)]):
        ablated = loss()
    assert ablated > intact
    assert (ablated - kept) / (ablated - intact) >= 0.9


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_same_for_the_model_with_processed_weights(name: str) -> None:
    """What they read and write has no mean over the width, and processing changes nothing else of these hook points."""
    sae = Sae.from_pretrained(RELEASE, name)
    hook, logits, features = f"{name}.hook_sae_acts_post", [], []
    for model in (
        HookedTransformer.from_pretrained_no_processing("tiny-gpt2"),
        HookedTransformer.from_pretrained("tiny-gpt2"),
    ):
        found, cache = model.run_with_cache_with_saes(model.to_tokens(TEXTS[0]), saes=sae, names_filter=hook)
        logits.append(found - found.mean(-1, keepdims=True))  # a processed unembedding's mean is 0
        features.append(cache[hook])
    assert (features[0] > 0).any(axis=-1).all()
    np.testing.assert_allclose(features[0], features[1], atol=2e-4, rtol=0)
    np.testing.assert_allclose(logits[0], logits[1], atol=5e-4, rtol=0)
