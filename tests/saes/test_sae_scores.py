"""Scores of SAEs, against the formulas of SAELens's evaluations written out in torch over runs with Python hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sae_reference import passed

from graphlens import HookedTransformer, Sae, sae_scores
from graphlens.errors import InputError
from tests.saes.odd_model import model
from tests.saes.sae_cases import D_MODEL, MLP_OUT, NORMED, RESID, VOCABULARY, Z, made

TOKENS = np.random.default_rng(5).integers(1, VOCABULARY, (7, 8))
OUT = [int(TOKENS[0, 2]), int(TOKENS[4, 0])]
PLACES = {
    "resid": made(hook=RESID),
    "topk": made(hook=MLP_OUT, architecture="topk", k=6, rescale_acts_by_decoder_norm=True),
    "hook_z": made(hook=Z, reshape_activations="hook_z", architecture="jumprelu"),
    "normalised": made(hook=RESID, normalize_activations="layer_norm"),
    "transcoder": made(hook=NORMED, hook_out=MLP_OUT, architecture="skip_transcoder"),
}
each_place = pytest.mark.parametrize("sae", PLACES.values(), ids=list(PLACES))


@pytest.fixture(scope="module")
def odd() -> HookedTransformer:
    return model()


def reference(odd: HookedTransformer, sae: Sae, excluded: list[int], mean: bool = False) -> dict[str, float]:
    """Everything in one batch, in float64."""
    cfg, ids = sae.cfg, torch.from_numpy(TOKENS)
    _, cache = odd.run_with_cache(TOKENS)
    x, target = (torch.from_numpy(cache[hook].copy()) for hook in (cfg.hook, cfg.writes))
    there = passed(sae, x, original=target)
    left_out = torch.isin(ids, torch.tensor(excluded)) if excluded else torch.zeros(ids.shape, dtype=torch.bool)
    wide = left_out.reshape(*ids.shape, *[1] * (target.ndim - 2))
    stand_in = torch.where(wide, target, there.output).numpy()
    rows, recons = (each.reshape(*ids.shape, -1)[~left_out].double() for each in (target, there.output))
    ablated = target[~left_out].mean(0).expand_as(target) if mean else torch.zeros_like(target)
    logits = [
        torch.from_numpy(odd.run_with_hooks(TOKENS, fwd_hooks=[(cfg.writes, lambda value, hook, to=to: to)])).double()
        for to in (target.numpy(), stand_in, ablated.numpy())
    ]
    logs = [torch.log_softmax(each, -1) for each in logits]
    losses = [-log[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][~left_out[:, :-1]].mean() for log in logs]
    kls = [(logs[0].exp() * (logs[0] - log)).sum(-1)[~left_out].mean() for log in logs]
    acts = there.values["hook_sae_acts_post"][~left_out].double()
    error = (rows - recons).pow(2).sum(-1)
    norms = rows.norm(dim=-1), recons.norm(dim=-1)
    found = {
        "ce_loss_without_sae": losses[0],
        "ce_loss_with_sae": losses[1],
        "ce_loss_with_ablation": losses[2],
        "ce_loss_score": (losses[2] - losses[1]) / (losses[2] - losses[0]),
        "kl_div_with_sae": kls[1],
        "kl_div_with_ablation": kls[2],
        "kl_div_score": (kls[2] - kls[1]) / kls[2],
        "l0": (acts != 0).sum(-1).double().mean(),
        "l1": acts.abs().sum(-1).mean(),
        "mse": error.mean(),
        "explained_variance": 1 - error.mean() / (rows.pow(2).sum(-1).mean() - rows.mean(0).pow(2).sum()),
        "explained_variance_legacy": (1 - error / (rows - rows.mean(0)).pow(2).sum(-1)).mean(),
        "cossim": torch.nn.functional.cosine_similarity(rows, recons).mean(),
        "l2_norm_in": norms[0].mean(),
        "l2_norm_out": norms[1].mean(),
        "l2_ratio": (norms[1] / norms[0]).mean(),
        "relative_reconstruction_bias": norms[1].pow(2).mean() / (rows * recons).sum(-1).mean(),
        "dead": (acts == 0).all(0).double().mean(),
        "tokens": torch.tensor(len(rows)),
    }
    return {name: float(value) for name, value in found.items()}


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-3 if name == "ce_loss_score" else 1e-4  # a quotient of losses that may differ by little
        assert abs(found[name] - value) <= tolerance * max(1.0, abs(value)), name


@each_place
@pytest.mark.parametrize("excluded", [[], OUT], ids=["all", "without-some"])
def test_scores_are_their_formulas(odd: HookedTransformer, sae: Sae, excluded: list[int]) -> None:
    for ablation in ("zero", "mean"):
        found = sae_scores(odd, sae, TOKENS, ablation=ablation, exclude_special_tokens=excluded, batch_size=100)
        close(found.to_dict(), reference(odd, sae, excluded, ablation == "mean"))
    assert not odd.acts_to_saes


def test_batches_change_what_is_of_batches_alone(odd: HookedTransformer) -> None:
    whole, parts = (sae_scores(odd, PLACES["resid"], TOKENS, batch_size=size) for size in (100, 3))
    assert np.allclose(whole.density, parts.density)
    apart = {name for name, value in whole.to_dict().items() if abs(parts.to_dict()[name] - value) > 1e-5}
    assert apart <= {"explained_variance_legacy", "relative_reconstruction_bias"}


def test_padding_counts_for_nothing(odd: HookedTransformer) -> None:
    """Prompts of two lengths, padded on the left, are their own scores weighted by their tokens."""
    sae = PLACES["resid"]
    alone = [sae_scores(odd, sae, TOKENS[row : row + 1, :length]) for row, length in ((0, 8), (1, 5))]
    padded = TOKENS[:2].copy()
    padded[1, 3:], padded[1, :3] = TOKENS[1, :5], 0
    mask = np.ones_like(padded)
    mask[1, :3] = 0
    found = sae_scores(odd, sae, padded, attention_mask=mask)
    assert found.tokens == 13
    for name, weights in (("mse", (8, 5)), ("l0", (8, 5)), ("ce_loss_with_sae", (7, 4)), ("kl_div_with_sae", (8, 5))):
        expected = sum(getattr(one, name) * w for one, w in zip(alone, weights, strict=True)) / sum(weights)
        assert abs(getattr(found, name) - expected) <= 1e-4 * max(1.0, expected), name


def test_an_exact_sae_loses_nothing(odd: HookedTransformer) -> None:
    eye = np.eye(D_MODEL)
    both = np.concatenate([eye, -eye, 0 * eye], 1)
    found = sae_scores(odd, Sae.from_arrays(both, np.zeros(105), both.T, np.zeros(35), RESID), TOKENS)
    for name in ("ce_loss_score", "kl_div_score", "explained_variance", "cossim", "l2_ratio"):
        assert abs(getattr(found, name) - 1) < 1e-5
    values = odd.run_with_cache(TOKENS)[1][RESID]
    alive = (values > 0).any((0, 1)).sum() + (values < 0).any((0, 1)).sum()
    assert found.l0 == D_MODEL
    assert found.dead == pytest.approx(1 - alive / 105)
    assert "explained_variance " in str(found)


def test_what_is_refused(odd: HookedTransformer) -> None:
    sae: Any = PLACES["resid"]
    with odd.saes(sae), pytest.raises(InputError, match="reset_saes first"):
        sae_scores(odd, sae, TOKENS)
    for tokens, options, said in (
        (TOKENS[:, :1], {}, "two tokens"),
        (TOKENS, {"ablation": "noise"}, "'zero' and 'mean'"),
        (TOKENS, {"batch_size": 0}, "batch_size"),
        (TOKENS[:1], {"exclude_special_tokens": [int(t) for t in TOKENS[0]]}, "no token is left"),
    ):
        with pytest.raises(InputError, match=said):
            sae_scores(odd, sae, tokens, **options)
