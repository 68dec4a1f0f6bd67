"""SAEs where numbers coincide: equal pre-activations, and as many prompts as tokens as features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from graphlens import Ablate, InputError, Patch, Sae
from tests.saes import odd_model
from tests.saes.sae_cases import D_MODEL, MLP_OUT, RESID, made

Array = npt.NDArray[np.float32]
COUNT = 6  # prompts, tokens of each, and features
IDS = np.random.default_rng(4).integers(1, 101, (COUNT, COUNT))


def test_of_features_that_are_equal_topk_keeps_k_and_no_more() -> None:
    plain = made(hook=RESID, d_sae=9)
    twice = {
        name: np.concatenate([array, array], axis=-1 if name in ("W_enc", "b_enc") else 0)
        for name, array in plain.weights.items()
        if name != "b_dec"
    }
    sae = Sae.from_arrays(**twice, b_dec=plain.b_dec, hook=RESID, architecture="topk", k=5)
    model = odd_model.model()
    _, cache = model.run_with_cache_with_saes(IDS, saes=[sae])
    found, pre = (cache[f"{RESID}.hook_sae_acts_{name}"] for name in ("post", "pre"))
    np.testing.assert_array_equal(pre[..., :9], pre[..., 9:])  # every pre-activation is there twice
    ranked = -np.sort(-np.maximum(pre, 0), axis=-1)
    assert (ranked[..., 4] == ranked[..., 5]).all()  # k is odd: it parts a pair
    assert (ranked[..., 4] > 0).any()
    np.testing.assert_allclose(-np.sort(-found, axis=-1)[..., :5], ranked[..., :5])
    assert (found != 0).sum(-1).max() == 5
    kept = np.argsort(-pre, axis=-1, kind="stable")[..., :5]  # of equals those with the lowest numbers
    wanted = np.zeros_like(pre)
    np.put_along_axis(wanted, kept, np.maximum(np.take_along_axis(pre, kept, -1), 0), -1)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("error_term", [False, True])
def test_as_many_prompts_as_tokens_as_features(error_term: bool) -> None:
    sae = made(hook=MLP_OUT, d_sae=COUNT)
    post = f"{MLP_OUT}.hook_sae_acts_post"
    values = np.random.default_rng(5).normal(size=(COUNT, COUNT)).astype(np.float32)

    def patched(acts: Array, hook: object) -> Array:
        acts[:, -1] = values  # [prompt, feature]
        return acts

    def ablated(acts: Array, hook: object) -> Array:
        acts[:, 2, [1, 4]] = 0
        return acts

    model = odd_model.model()
    with model.saes([sae], use_error_term=error_term):
        for item, function in (
            (Patch(post, values, positions=-1), patched),
            (Ablate(post, positions=2, dims=[1, 4]), ablated),
        ):
            wanted = model.run_with_hooks(IDS, fwd_hooks=[(post, function)])
            found = model.run_with_interventions(IDS, item)
            np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())
            assert np.abs(wanted - model(IDS)).max() > 1e-3
            for row in range(COUNT):  # each prompt has its own
                alone = model.run_with_interventions(
                    IDS[row : row + 1],
                    item if function is ablated else Patch(post, values[row : row + 1], positions=-1),
                )
                np.testing.assert_allclose(alone[0], wanted[row], atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("features", [[3, 3], [-1, 52], [53], [], [True], [1.5]])
def test_features_that_are_none_or_twice_there_are_refused(features: list[int]) -> None:
    with pytest.raises(InputError):
        odd_model.model().add_sae(made(hook=RESID, width=D_MODEL), features=features)
