"""Phi 3's longrope: other rotary frequencies as soon as an input is longer than the model was first trained for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import KeyValueCache, bake_model, patching
from graphlens.attribution import circuit, edge_attribution, faithfulness
from graphlens.errors import InputError
from graphlens.metrics import LogitDiff
from tests.families.comparing import TOLERANCE, prompt, reference_logits, relative
from tests.families.variants import CHOSEN

NAME, SHORT = "phi3-longrope", 16
pytestmark = pytest.mark.skipif(NAME not in CHOSEN, reason="this commit's hash picked other variants")


@pytest.fixture(scope="module")
def model(family_model: Any) -> Any:
    return family_model(NAME)


@pytest.mark.parametrize("length", [SHORT - 1, SHORT, SHORT + 1, 3 * SHORT])
def test_the_frequencies_change_where_transformers_do(length: int, model: Any, family_reference: Any) -> None:
    assert model.cfg.rotary_short == SHORT
    tokens = prompt(model.cfg.d_vocab, 2, length)
    assert relative(model(tokens), reference_logits(family_reference(NAME), tokens), str(length)) <= TOLERANCE


@pytest.mark.parametrize(("held", "new"), [(5, 6), (10, SHORT - 10), (SHORT + 1, 3)])
def test_a_cache_of_one_kind_of_keys_is_the_whole_run(held: int, new: int, model: Any) -> None:
    tokens = prompt(model.cfg.d_vocab, 2, held + new)
    cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
    parts = [model(part, past_kv_cache=cache) for part in (tokens[:, :held], tokens[:, held:])]
    assert relative(np.concatenate(parts, 1), model(tokens), "logits") <= TOLERANCE


def test_a_cache_whose_keys_would_have_to_turn_is_refused(model: Any) -> None:
    tokens = prompt(model.cfg.d_vocab, 2, SHORT + 1)
    cache = KeyValueCache.init_cache(model.cfg, batch_size=2)
    model(tokens[:, :SHORT], past_kv_cache=cache)
    with pytest.raises(InputError, match=rf"rotates inputs of more than {SHORT} tokens .* the {SHORT} cached keys"):
        model(tokens[:, SHORT:], past_kv_cache=cache)


@pytest.mark.parametrize("length", [SHORT, SHORT + 4])
def test_a_sweep_is_a_run_for_each_patch(length: int, model: Any) -> None:
    """Beyond the short length it takes whole runs: a few positions alone do not tell how long the prompt is."""
    clean, corrupted = prompt(model.cfg.d_vocab, 2, length)[:, None]
    cache = model.run_with_cache(clean)[1]

    def metric(logits: np.ndarray) -> np.ndarray:
        return logits[0, -1, 5]

    found = np.asarray(patching.get_act_patch_resid_pre(model, corrupted, cache, metric))
    for layer, position in ((0, 3), (1, length - 2), (2, length - 1)):
        name = f"blocks.{layer}.hook_resid_pre"

        def patch(activation: np.ndarray, hook: Any, at: int = position) -> np.ndarray:
            activation = activation.copy()
            activation[:, at] = cache[hook.name][:, at]
            return activation

        wanted = metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, patch)]))
        assert relative(found[layer, position], wanted, name) <= TOLERANCE


def test_circuits_of_long_prompts_are_refused(model: Any) -> None:
    """Their blocks are computed some tokens at a time, which need not be the last ones."""
    clean, corrupted = prompt(model.cfg.d_vocab, 2, SHORT + 4)[:, None]
    cache, metric = model.run_with_cache(clean)[1], LogitDiff(7, 60)
    scores = edge_attribution(model, corrupted, cache, metric)
    assert np.isfinite(scores.values).all()
    with pytest.raises(InputError, match=f"more than {SHORT} tokens every key's rotation depends"):
        faithfulness(model, corrupted, cache, metric, {5: circuit(scores, 5)})


def test_a_runtime_that_keeps_its_keys_is_told_the_short_length(model: Any, family_folder: Any, tmp_path: Path) -> None:
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what such a file lacks besides is no matter here
        bake_model(family_folder(NAME), (), tmp_path / "out", with_past=True, announce=said.append)
    assert f"inputs of up to {SHORT} tokens" in said[-1]
    told = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert told["model"]["context_length"] == told["search"]["max_length"] == SHORT
