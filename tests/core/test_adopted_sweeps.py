"""Sweeps over adopted models: one forward per patch, in NumPy and on plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphlens import Ablate, HookedTransformer, Steer, adopt
from graphlens.metrics import LogitDiff
from graphlens.patching import Site, sweep
from tests.foreign_decoder import D_MLP, HEADS, LAYERS, VOCAB, decoder, forward

Array = np.ndarray[Any, Any]
METRIC = LogitDiff(5, 7, reduction="none")
RANDOM = np.random.default_rng(3)
CLEAN, CORRUPTED = RANDOM.integers(0, VOCAB, (2, 7)), RANDOM.integers(0, VOCAB, (2, 7))
PADDED = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
NEURONS = ("mlp.hook_pre", "mlp.hook_post")
SITES = [
    *(
        Site(f"blocks.{layer}.{hook}", position=place)
        for layer in range(LAYERS)
        for hook in HOOKS
        for place in (0, 4, 6)
    ),
    *(Site(letter, layer, head=head) for layer in range(LAYERS) for letter in "qkvz" for head in range(HEADS)),
    *(Site("pattern", layer, head=1, position=5) for layer in range(LAYERS)),
    *(Site(f"blocks.{layer}.{hook}", position=3, dims=D_MLP - 1) for layer in range(LAYERS) for hook in NEURONS),
    *(Site(f"blocks.{layer}.ln1.hook_normalized", position=2) for layer in range(LAYERS)),
    Site("hook_embed", position=1),
    Site("unembed.hook_in", position=6),
]


@pytest.fixture(scope="module", params=[True, False], ids=["with past", "without"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HookedTransformer:
    folder = tmp_path_factory.mktemp("sweeps")
    adopt(decoder(folder / "model.onnx", past=request.param), folder / "hooked", announce=lambda _: None)
    return HookedTransformer.from_onnx(folder / "hooked", "cpu")


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("tokens", [1024, 40, 1])
def test_each_patch_is_a_forward(model: HookedTransformer, mask: Array | None, tokens: int) -> None:
    clean = {name: value.astype(np.float32) for name, value in forward(CLEAN, mask)[1].items()}
    options = {} if mask is None else {"attention_mask": mask}
    found = sweep(model, CORRUPTED, SITES, clean, METRIC, verbose=False, max_batch_tokens=tokens, **options)
    assert "from its block on" in str(found.metadata["general_path"])
    moved = 0
    base = np.asarray(METRIC(forward(CORRUPTED, mask)[0]))
    for index, site in enumerate(SITES):

        def put(name: str, value: Array, site: Site = site) -> Array:
            if name != site.hook:
                return value
            places: list[Any] = [slice(None)] * value.ndim
            pattern = name.endswith("pattern")
            if site.position is not None:
                places[2 if pattern else 1] = site.position
            if site.head is not None:
                places[1 if pattern else 2] = site.head
            if site.dims is not None:
                places[-1] = site.dims
            value[tuple(places)] = clean[name][tuple(places)]
            return value

        expected = np.asarray(METRIC(forward(CORRUPTED, mask, edit=put)[0]))
        np.testing.assert_allclose(found.values[index], expected, rtol=0, atol=5e-5, err_msg=str(site))
        moved += bool(np.abs(expected - base).max() > 1e-3)
    assert moved > 30


def test_runs_begin_at_the_block_that_is_patched(model: HookedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And several patches share a run."""
    _, clean = model.run_with_cache(CLEAN)
    seen: list[tuple[int | None, int]] = []
    run = type(model.runner).run

    def looked(self: Any, request: Any, *args: Any, **options: Any) -> Any:
        seen.append((request.plan.start, request.shape[0]))
        return run(self, request, *args, **options)

    sites = [Site("z", 1, position=place, head=head) for place in range(7) for head in range(HEADS)]
    sweep(model, CORRUPTED, sites, clean, METRIC, verbose=False)
    monkeypatch.setattr(type(model.runner), "run", looked)
    sweep(model, CORRUPTED, sites, clean, METRIC, verbose=False)
    assert seen == [(None, 2), (1, 2 * len(sites))]


def test_where_runs_change_each_other_each_patch_runs_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A scale of the whole batch is taken while the model runs: side by side, patches would be other numbers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = tmp_path_factory.mktemp("int8")
    quantize_dynamic(decoder(folder / "float.onnx"), folder / "model.onnx", weight_type=QuantType.QInt8)
    adopt(folder / "model.onnx", folder / "hooked", announce=lambda _: None)
    model = HookedTransformer.from_onnx(folder / "hooked", "cpu")
    _, clean = model.run_with_cache(CLEAN)
    sites = [Site("z", 1, position=place, head=head) for place in range(7) for head in range(HEADS)]
    found = sweep(model, CORRUPTED, sites, clean, METRIC, verbose=False)
    for index, site in enumerate(sites):

        def put(value: Array, hook: Any, site: Site = site) -> None:
            value[:, site.position, site.head] = clean[hook.name][:, site.position, site.head]

        expected = np.asarray(METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[(site.hook, put)])))
        np.testing.assert_allclose(found.values[index], expected, rtol=0, atol=1e-5, err_msg=str(site))


@pytest.mark.parametrize("tokens", [1024, 1], ids=["side by side", "alone"])
def test_scores_are_patched_where_masked_ones_are_infinite(tmp_path: Path, tokens: int) -> None:
    """As exporters of today write them."""
    adopt(decoder(tmp_path / "model.onnx", lowest=-np.inf), tmp_path / "hooked", announce=lambda _: None)
    model = HookedTransformer.from_onnx(tmp_path / "hooked", "cpu")
    name = "blocks.0.attn.hook_attn_scores"
    clean = forward(CLEAN)[1][name].astype(np.float32)
    _, cache = model.run_with_cache(CLEAN)
    assert np.isneginf(cache[name]).any()
    sites = [Site(name, position=place, head=head) for place in (2, 6) for head in range(HEADS)]
    found = sweep(model, CORRUPTED, sites, cache, METRIC, verbose=False, max_batch_tokens=tokens)
    base = np.asarray(METRIC(forward(CORRUPTED)[0]))
    for index, site in enumerate(sites):

        def put(hook: str, value: Array, site: Site = site) -> Array:
            if hook == name:
                value[:, site.head, site.position] = clean[:, site.head, site.position]
            return value

        expected = np.asarray(METRIC(forward(CORRUPTED, edit=put)[0]))
        np.testing.assert_allclose(found.values[index], expected, rtol=0, atol=5e-5, err_msg=str(site))
        assert np.abs(expected - base).max() > 1e-4


@pytest.mark.parametrize("kind", ["edits", "hooks"])
def test_what_is_active_counts_in_every_patch(kind: str, model: HookedTransformer) -> None:
    """Before, in and behind the block that is patched. At one place edits come first, then the patch, then hooks."""
    clean = {name: value.astype(np.float32) for name, value in forward(CLEAN, None)[1].items()}
    sites = [Site(f"blocks.{layer}.{hook}", position=4) for layer in range(LAYERS) for hook in HOOKS]
    z, mid = "blocks.0.attn.hook_z", f"blocks.{LAYERS - 1}.hook_resid_mid"
    vector = np.linspace(-1, 1, clean["hook_embed"].shape[-1], dtype=np.float32)
    larger = ("hook_embed", "blocks.0.hook_mlp_out") if kind == "hooks" else ()
    if kind == "edits":
        active = model.intervene([Ablate(z, heads=1), Steer(mid, vector)])
    else:
        active = model.hooks([(name, lambda x, hook: x * np.float32(1.5)) for name in larger])
    with active:
        found = sweep(model, CORRUPTED, sites, clean, METRIC, verbose=False)
    for index, site in enumerate(sites):

        def put(name: str, value: Array, site: Site = site) -> Array:
            if kind == "edits" and name == z:
                value[:, :, 1] = 0
            if kind == "edits" and name == mid:
                value = value + vector
            if name == site.hook:
                value[:, site.position] = clean[name][:, site.position]
            return value * 1.5 if name in larger else value

        expected = np.asarray(METRIC(forward(CORRUPTED, None, edit=put)[0]))
        np.testing.assert_allclose(found.values[index], expected, rtol=0, atol=5e-5, err_msg=str(site))
