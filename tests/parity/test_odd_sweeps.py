"""Sweeps of a random model of odd sizes, on both faces: against TransformerLens's hooks, and against loops of whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_oracle import oracle

import graphlens
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Probability
from graphlens.patching import Noise, Site, grid, sweep
from graphlens.torch import HookedTransformer
from tests.core.test_cutting import pieces_are_the_model
from tests.intervention_specs import patch_of, reference, shape_of
from tests.sweep_cases import KINDS

CLEAN, CORRUPTED = (np.random.default_rng(seed).integers(0, 101, (3, 7)) for seed in (1, 2))
PADDING = np.ones((3, 7), int)
PADDING[0, :3] = PADDING[2, :1] = 0


@pytest.fixture(scope="module")
def numpy_face(odd_hooked: Path) -> graphlens.HookedTransformer:
    model = graphlens.HookedTransformer.from_onnx(odd_hooked, "cpu")
    model.set_use_attn_result(True)
    return model


@pytest.fixture(scope="module")
def torch_face(odd_hooked: Path) -> HookedTransformer:
    model = HookedTransformer.from_onnx(odd_hooked, "cpu")
    model.set_use_attn_result(True)
    return model


@pytest.fixture(scope="module")
def lens(odd_checkpoint: Path) -> Any:
    model = oracle(odd_checkpoint)
    model.set_use_attn_result(True)
    return model


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 7), (3, 7)])
@pytest.mark.parametrize("max_rows", [1, 4, 1000])
def test_cut_then_join_is_the_whole(odd_hooked: Path, batch: int, length: int, max_rows: int) -> None:
    model = graphlens.HookedTransformer.from_onnx(odd_hooked, "cpu")
    tokens = np.random.default_rng(length).integers(0, 101, (batch, length))
    pieces_are_the_model(model, tokens, max_rows)


def places(model: Any, tail: str) -> list[Site]:
    axes, sizes = shape_of(model, "blocks.0." + tail if "embed" not in tail else tail, 3, 7)
    heads = "head_index" in axes
    last = sizes[-1] if tail != "attn.hook_result" else None
    found = []
    for layer in range(3) if "embed" not in tail else (0,):
        hook = f"blocks.{layer}.{tail}" if "embed" not in tail else tail
        found += [
            Site(hook),
            Site(hook, position=[1, 4], head=4 if heads else None),
            Site(hook, position=slice(3, None), dims=None if last is None else [0, 2, last - 1]),
            Site(hook, position=-1, head=[0, 2, 3] if heads else None),
        ]
    return found


def difference(logits: Any) -> Any:
    return (logits[:, -1, 7] - logits[:, 4, 60]).mean()


def by_lens(lens: Any, ours: Any, sites: Sequence[Site], cache: Any) -> list[float]:
    """A patch at each site, written out with NumPy, in TransformerLens's runs."""
    found = []
    for site in sites:
        axes, _ = shape_of(ours, site.hook, 3, 7)
        item = patch_of(site, cache[site.hook].numpy(), axes)

        def edit(activation: Any, hook: Any, item: Any = item, axes: Any = axes) -> Any:
            return torch.from_numpy(reference(item, activation.numpy(), axes, scores=False))

        logits = lens.run_with_hooks(torch.from_numpy(CORRUPTED), fwd_hooks=[(site.hook, edit)])
        found.append(float(difference(logits)))
    return found


@pytest.mark.parametrize("tail", KINDS)
def test_as_with_transformerlenss_hooks(
    tail: str, numpy_face: graphlens.HookedTransformer, torch_face: HookedTransformer, lens: Any
) -> None:
    sites = places(numpy_face, tail)
    _, theirs = lens.run_with_cache(torch.from_numpy(CLEAN))
    if tail == "hook_pos_embed":  # the same in every run: so another order of it
        theirs = {tail: theirs[tail].flip(1)}
    expected = np.asarray(by_lens(lens, numpy_face, sites, theirs))
    assert expected.std() > 1e-3, "patching changes nothing, so this tests nothing"
    for model in (numpy_face, torch_face):
        _, cache = model.run_with_cache(CLEAN)
        for source in (theirs, cache if tail != "hook_pos_embed" else theirs):
            result = sweep(model, CORRUPTED, sites, source, difference, verbose=False)
            assert "general_path" not in result.metadata
            assert np.abs(result.values - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


METRICS: dict[str, Any] = {
    "difference": LogitDiff([7, 50, 3], [60, 8, 9], position=[-1, 3, 5], reduction="none"),
    "probability": Probability(100, position=-2, reduction="none"),
    "loss": CrossEntropy(CORRUPTED, position=None, reduction="none"),
    "KL": KLDivergence(np.random.default_rng(0).standard_normal((3, 7, 101)), reduction="none"),
}


@pytest.mark.parametrize("options", [{}, {"attention_mask": PADDING}], ids=["whole", "left-padded"])
@pytest.mark.parametrize("tail", KINDS)
def test_as_a_loop_of_whole_runs(tail: str, options: dict[str, Any], numpy_face: graphlens.HookedTransformer) -> None:
    sites = places(numpy_face, tail)
    _, cache = numpy_face.run_with_cache(CLEAN, **options)
    rows = []
    for site in sites:
        patch = patch_of(site, cache[site.hook], shape_of(numpy_face, site.hook, 3, 7)[0])
        logits = numpy_face.run_with_interventions(CORRUPTED, patch, **options)
        rows.append([metric.masked(options.get("attention_mask"))(logits) for metric in METRICS.values()])
    for given in (METRICS, {"loss": METRICS["loss"]}, {"difference": METRICS["difference"]}):
        for tokens in (5, 4096):
            result = sweep(
                numpy_face, CORRUPTED, sites, cache, given, max_batch_tokens=tokens, verbose=False, **options
            )
            assert "general_path" not in result.metadata
            for name in given:
                found, expected = result.sel(metric=name).values, np.stack([r[list(METRICS).index(name)] for r in rows])
                assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name


@pytest.mark.parametrize("source", ["zero", "mean", Noise(1.0, seed=3)], ids=str)
def test_both_faces_give_the_same(
    source: Any, numpy_face: graphlens.HookedTransformer, torch_face: HookedTransformer
) -> None:
    sites = grid("q", ("layer", "pos", "head"), {"layer": range(3), "pos": range(0, 7, 2), "head": (0, 4)})

    def on_tensors(logits: Any) -> Any:
        assert isinstance(logits, torch.Tensor)
        return difference(logits)

    one = sweep(numpy_face, CORRUPTED, sites, source, {"f": difference, "loss": CrossEntropy(5)}, verbose=False)
    two = sweep(
        torch_face,
        torch.from_numpy(CORRUPTED),
        sites,
        source,
        {"f": on_tensors, "loss": CrossEntropy(torch.tensor(5))},
        verbose=False,
    )
    assert two.shape == (2, 3, 4, 2)
    np.testing.assert_allclose(two.values, one.values, rtol=1e-6, atol=1e-6)
