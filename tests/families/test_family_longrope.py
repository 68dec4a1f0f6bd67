"""Phi 3's longrope: other rotary frequencies as soon as an input is longer than the model was first trained for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphlens import KeyValueCache
from graphlens.errors import InputError
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
    with pytest.raises(InputError, match=rf"{SHORT} cached positions and 1 new ones are more than {SHORT}"):
        model(tokens[:, SHORT:], past_kv_cache=cache)
