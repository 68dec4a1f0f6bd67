"""Circuits of features and errors: scores against gradients, curves against Python hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphlens import HookedTransformer, feature_attribution
from graphlens.attribution import FeatureScores, circuit_curves, feature_scores
from graphlens.errors import InputError
from graphlens.metrics import LogitDiff
from tests.saes.odd_model import TOKENS, model
from tests.saes.sae_cases import D_SAE, Z, made

METRIC = LogitDiff([3, 4], [7, 8])
RESID, LATER = "blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"
SAES = [
    made(hook=RESID),
    made(1, hook=Z, reshape_activations="hook_z"),
    made(2, hook="blocks.2.ln2.hook_normalized", hook_out=LATER, architecture="skip_transcoder"),
]
AT = [sae.cfg.writes for sae in SAES]
LENGTH = TOKENS.shape[1]


@pytest.fixture(scope="module")
def odd() -> HookedTransformer:
    return model()


@pytest.fixture(scope="module")
def scores(odd: HookedTransformer) -> FeatureScores:
    return feature_scores(odd, TOKENS, METRIC, SAES)


def close(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 1e-3
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("steps", [0, 3])
def test_scores_are_those_of_each_sae_and_of_its_error(odd: HookedTransformer, steps: int) -> None:
    found = feature_scores(odd, TOKENS, METRIC, SAES, steps=steps)
    method = {"method": "integrated", "steps": steps} if steps else {"method": "patching"}
    with odd.saes(SAES, use_error_term=True):
        for at, sae in zip(AT, SAES, strict=True):
            close(found.features[at], feature_attribution(odd, TOKENS, METRIC, sae.cfg.hook, **method).values)
        if steps:
            return
        names = [f"{at}.hook_sae_error" for at in AT]
        gradients = odd.gradients(TOKENS, METRIC, names)
        _, cache = odd.run_with_cache(TOKENS, names_filter=names)
    for at, name in zip(AT, names, strict=True):
        close(found.errors[at], (gradients[name] * cache[name]).reshape(2, LENGTH, -1).sum((0, 2)))
    summed = feature_scores(odd, TOKENS, METRIC, SAES, by_position=False)
    close(summed.features[RESID][0], found.features[RESID].sum(0))
    close(summed.errors[RESID], found.errors[RESID].sum(keepdims=True))
    assert abs(found.total - float(METRIC(odd(TOKENS)))) < 1e-4


def test_circuits_are_the_largest_scores(scores: FeatureScores) -> None:
    every = np.concatenate([each.ravel() for part in (scores.features, scores.errors) for each in part.values()])
    largest = np.sort(np.abs(every))[::-1]
    for n in (1, 10, 57):
        circuit = scores.circuit(n=n)
        assert len(circuit) == n
        assert sorted(circuit.nodes) == sorted(scores.top(n).labels["node"])
        limit = (largest[n - 1] + largest[n]) / 2
        assert scores.circuit(limit).nodes == circuit.nodes
    (node, value), *_ = scores.top(1).top(1)
    assert abs(value) == largest[0]
    hook, _, place = node["node"].partition("/")
    number, position = place.split(" at ")
    if number != "error":
        assert scores.features[hook][int(position), int(number)] == value
    assert len(scores.circuit(n=3).without()) == every.size - 3
    assert scores.circuit(n=5, errors=False).errors[RESID].all()
    assert len(scores.circuit(n=10**9)) == np.count_nonzero(every)


@pytest.mark.parametrize("source", ["zero", "mean", "cache"])
def test_curves_are_runs_with_hooks(odd: HookedTransformer, scores: FeatureScores, source: str) -> None:
    with odd.saes(SAES, use_error_term=True):
        _, cache = odd.run_with_cache(TOKENS)
        _, other = odd.run_with_cache(np.roll(TOKENS, 1))
    names = [f"{at}.hook_sae_{part}" for at in AT for part in ("acts_post", "error")]
    put = {
        name: {"zero": cache[name] * 0, "mean": cache[name].mean((0, 1), keepdims=True), "cache": other[name]}[source]
        for name in names
    }
    circuits = {
        "few": scores.circuit(n=12),
        "many": scores.circuit(n=300),
        "features": scores.circuit(n=40, errors=False),
    }
    found = circuit_curves(odd, TOKENS, METRIC, SAES, circuits, source=other if source == "cache" else source)

    def left(circuit: Any) -> float:
        hooks = []
        for at in AT:
            for part, mask in (("acts_post", circuit.features[at]), ("error", circuit.errors[at][:, None])):
                name = f"{at}.hook_sae_{part}"
                kept = mask[..., None] if cache[name].ndim == 4 else mask
                hooks.append((name, lambda value, hook, kept=kept, to=put[name]: np.where(kept, value, to)))
        with odd.saes(SAES, use_error_term=True):
            return float(METRIC(odd.run_with_hooks(TOKENS, fwd_hooks=hooks)))

    none = left(scores.circuit(n=0))
    every = float(METRIC(odd(TOKENS)))
    expected = [
        [(left(c if i == 0 else c.without()) - none) / (every - none) for c in circuits.values()] for i in (0, 1)
    ]
    close(found.values, expected, 1e-3)
    assert abs(found.metadata["none"] - none) < 1e-3
    assert found.axes == ("curve", "circuit")


def test_all_nodes_are_the_model_and_none_nothing(odd: HookedTransformer, scores: FeatureScores) -> None:
    nothing = scores.circuit(n=0)
    curves = circuit_curves(odd, TOKENS, METRIC, SAES, {"all": nothing.without(), "none": nothing}, source="zero")
    assert np.abs(curves.values - [[1, 0], [0, 1]]).max() < 1e-4


def test_nodes_summed_over_positions_are_at_all(odd: HookedTransformer) -> None:
    scores = feature_scores(odd, TOKENS, METRIC, SAES[0], by_position=False)
    circuit = scores.circuit(n=9)
    assert circuit.features[RESID].shape == (1, D_SAE)
    wide = {hook: np.repeat(mask, LENGTH, 0) for hook, mask in circuit.features.items()}
    same = type(circuit)(wide, {h: np.repeat(m, LENGTH) for h, m in circuit.errors.items()}, circuit.numbers, True)
    found = circuit_curves(odd, TOKENS, METRIC, SAES[0], {"one": circuit, "each": same}).values
    assert np.array_equal(found[:, 0], found[:, 1])


def test_what_is_refused(odd: HookedTransformer, scores: FeatureScores) -> None:
    with pytest.raises(InputError, match="threshold=, or"):
        scores.circuit()
    circuit = {"one": scores.circuit(n=3)}
    with pytest.raises(InputError, match="is of SAEs at"):
        circuit_curves(odd, TOKENS, METRIC, SAES[:1], circuit)
    with pytest.raises(InputError, match="6 positions"):
        circuit_curves(odd, TOKENS[:, :4], METRIC, SAES, circuit)
    with pytest.raises(InputError, match="none to measure"):
        circuit_curves(odd, TOKENS, METRIC, SAES, {})
    with odd.saes(SAES[0]), pytest.raises(InputError, match="use_error_term=True"):
        feature_scores(odd, TOKENS, METRIC, SAES[0].cfg.hook)
    with pytest.raises(InputError, match="one metric"):
        feature_scores(odd, TOKENS, [METRIC], SAES)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="two SAEs of one call read"):
        feature_scores(odd, TOKENS, METRIC, [SAES[0], SAES[0]])
