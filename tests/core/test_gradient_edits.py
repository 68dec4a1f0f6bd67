"""Gradients and attribution in the company of edits: standing, written in the file, or by Python hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from graphlens import Ablate, HookedTransformer, InputError, Scale, Steer, UnknownHookPoint, embedded_model, surgery
from graphlens.attribution import attribution_patch, direct_logit_attribution, edge_attribution, faithfulness
from graphlens.metrics import CrossEntropy, LogitDiff
from graphlens.patching import Site, sweep
from tests.models import MODEL

Array = npt.NDArray[Any]
TOKENS = np.array([[5, 90, 411, 7, 23], [8, 8, 300, 65, 12]])
OTHERS = TOKENS[:, ::-1].copy()
METRIC = LogitDiff(5, 7)
NAME = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return MODEL


def gradient(model: HookedTransformer, metric: Any = METRIC) -> Array:
    found: Array = model.gradients(TOKENS, metric, [NAME])[NAME]
    return found


def close(found: Array, expected: Array) -> None:
    scale = float(np.abs(expected).max())
    assert scale > 0
    assert float(np.abs(found - expected).max()) <= 1e-5 * scale


def test_edits_at_the_logits_are_differentiated(model: HookedTransformer) -> None:
    """The seed of few tokens enters below the logits, where nothing stands in between."""
    plain = gradient(model)
    with model.intervene(Scale("unembed.hook_out", 3.0)):
        close(gradient(model), 3 * plain)
    with model.intervene(Ablate("unembed.hook_out")):
        assert not gradient(model).any()
    with model.hooks(bwd_hooks=[("unembed.hook_out", lambda g, hook: g * 0.5)]):
        close(gradient(model), 0.5 * plain)


@pytest.mark.parametrize(
    "hook",
    ["blocks.1.attn.hook_pattern", "blocks.1.ln1.hook_scale", "ln_final.hook_normalized", "blocks.2.mlp.hook_post"],
)
def test_a_python_hook_that_adds_is_differentiated_through(model: HookedTransformer, hook: str) -> None:
    """Rules that read what their operator gave must read it from before the hook."""
    with (
        model.hooks([(hook, lambda value, hook: value + np.float32(0.02))]),
        pytest.warns(UserWarning, match=f"the forward hook at '{hook}' changed its activation"),
    ):
        found = gradient(model, CrossEntropy(5))
    with model.intervene(Steer(hook, np.float32(0.02))):
        close(found, gradient(model, CrossEntropy(5)))


def test_a_python_hook_that_only_looks_warns_of_nothing(model: HookedTransformer) -> None:
    seen: list[str] = []
    with model.hooks([(NAME, lambda value, hook: seen.append(hook.name))]):
        close(gradient(model), gradient(model))
    assert seen


def test_hook_points_that_fire_several_times_have_no_one_gradient(model: HookedTransformer) -> None:
    model.set_use_split_qkv_input(True)
    try:
        for call in (
            lambda: model.gradients(TOKENS, METRIC, ["blocks.1.ln1.hook_scale"]),
            lambda: attribution_patch(model, TOKENS, Site("blocks.1.ln1.hook_scale"), "zero", METRIC),
        ):
            with pytest.raises(InputError, match=r"'blocks.1.ln1.hook_scale' fires for queries, keys and values apart"):
                call()
        hook = ("blocks.1.ln1.hook_scale", lambda g, hook: None)
        with model.hooks(bwd_hooks=[hook]), pytest.raises(InputError, match="would never fire"):
            gradient(model)
        every = model.gradients(TOKENS, METRIC)
        assert "blocks.1.hook_q_input" in every
        assert not [name for name in every if ".ln1." in name]
    finally:
        model.set_use_split_qkv_input(False)


def test_hooks_chosen_by_a_filter_stand_only_where_there_is_a_gradient(model: HookedTransformer) -> None:
    seen: list[str] = []
    model.set_use_hook_tokens(True)
    try:
        with model.hooks(bwd_hooks=[(lambda name: True, lambda g, hook: seen.append(hook.name))]):
            gradient(model)
        with (
            model.hooks(bwd_hooks=[("hook_tokens", lambda g, hook: None)]),
            pytest.raises(InputError, match="integers"),
        ):
            gradient(model)
        with pytest.raises(InputError, match="picks no hook point of floats"):
            model.gradients(TOKENS, METRIC, lambda name: name == "hook_tokens")
        loss, cache = model.run_with_cache(TOKENS, names_filter="hook_tokens", return_type="loss", incl_bwd=True)
        assert list(cache) == ["hook_tokens"]
        assert float(loss) == pytest.approx(float(model(TOKENS, return_type="loss")))
    finally:
        model.set_use_hook_tokens(False)
    assert len(seen) == 74


@pytest.mark.parametrize("options", [{"loss_per_token": True}, {"stop_at_layer": 3}])
def test_backward_hooks_that_would_never_fire(model: HookedTransformer, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="would never fire"):
        model.run_with_hooks(TOKENS, return_type="loss", bwd_hooks=[(NAME, lambda g, hook: None)], **options)


def test_hook_points_that_share_a_value_get_arrays_of_their_own(model: HookedTransformer) -> None:
    found = model.gradients(TOKENS, METRIC, ["blocks.0.hook_resid_post", NAME])
    before = found[NAME].copy()
    found["blocks.0.hook_resid_post"][:] = 0
    np.testing.assert_array_equal(found[NAME], before)


# Edits written in the file


@pytest.fixture(scope="module")
def baked(model: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, HookedTransformer]:
    edits = {"logits": Scale("unembed.hook_out", 3.0), "stream": Scale("blocks.1.hook_attn_out", 3.0)}
    root = tmp_path_factory.mktemp("baked")
    return {
        name: HookedTransformer.from_onnx(model.bake(edit, root / name, keep_hooks=True), "cpu")
        for name, edit in edits.items()
    }


@pytest.mark.parametrize("where", ["logits", "stream"])
def test_a_baked_file_gives_the_gradients_and_sweeps_of_its_edits(
    model: HookedTransformer, baked: dict[str, HookedTransformer], where: str
) -> None:
    edit = Scale("unembed.hook_out" if where == "logits" else "blocks.1.hook_attn_out", 3.0)
    sites = [Site("z", 1), Site("mlp_out", 2), Site("resid_pre", 0, position=2)]
    with model.intervene(edit):
        expected = gradient(model)
        _, cache = model.run_with_cache(OTHERS)
        values = sweep(model, TOKENS, sites, cache, METRIC, verbose=False).values
    close(gradient(baked[where]), expected)
    found = sweep(baked[where], TOKENS, sites, cache, METRIC, verbose=False)
    assert "general_path" not in found.metadata
    close(found.values, values)


def test_edges_and_components_of_an_edited_stream_are_refused(baked: dict[str, HookedTransformer]) -> None:
    _, cache = baked["stream"].run_with_cache(OTHERS)
    with pytest.raises(InputError, match="not the sum of its components"):
        edge_attribution(baked["stream"], TOKENS, cache, METRIC)
    for model in baked.values():
        with pytest.raises(InputError, match="components sum to"):
            direct_logit_attribution(model, TOKENS, METRIC)


def test_edges_are_of_gradients_as_they_are(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(OTHERS)
    with model.hooks(bwd_hooks=[(NAME, lambda g, hook: g * 0)]):
        for call in (
            lambda: edge_attribution(model, TOKENS, cache, METRIC),
            lambda: attribution_patch(model, TOKENS, Site("z", 1), cache, METRIC),
        ):
            with pytest.raises(InputError, match="bwd_hooks"):
                call()


def test_circuits_as_they_may_be_given(model: HookedTransformer) -> None:
    _, cache = model.run_with_cache(OTHERS)
    scores = edge_attribution(model, TOKENS, cache, METRIC)
    circuits = {
        "all": (edge for edge in scores.labels["edge"]),
        "once": ["embed->logits"],
        "twice": ["embed->logits"] * 2,
    }
    found = faithfulness(model, TOKENS, cache, METRIC.normalised(), circuits).values
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] == found[2] != 0
    with pytest.raises(InputError, match="is the text"):
        faithfulness(model, TOKENS, cache, METRIC, {"mine": "embed->logits"})
    with pytest.raises(InputError, match="maps names to edges"):
        faithfulness(model, TOKENS, cache, METRIC, [["embed->logits"]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reduction='mean'"):
        faithfulness(model, TOKENS, cache, LogitDiff(5, 7, reduction="none"), {"mine": ["embed->logits"]})


# Files


def test_what_cannot_be_differentiated_so() -> None:
    plain = surgery.load(embedded_model())
    with pytest.raises(InputError, match="it has no logits"):
        surgery.differentiate(surgery.segment(plain, 0, 3), ["blocks.1.hook_resid_pre"])
    once = surgery.differentiate(plain, NAME)
    assert surgery.gradient_output(NAME) in surgery.read_manifest(once).hooks
    with pytest.raises(InputError, match="differentiated already"):
        surgery.differentiate(once, [NAME])
    with pytest.raises(UnknownHookPoint, match="hook_resid_mdi"):
        surgery.differentiate(plain, "blocks.1.hook_resid_mdi")


def test_resuming_with_another_function_is_refused(model: HookedTransformer, tmp_path: Path) -> None:
    _, cache = model.run_with_cache(OTHERS)
    given = (model, TOKENS, [Site("z", 1), Site("z", 2)], cache)
    sweep(*given, lambda logits: float(logits[0, -1, 5]), save_to=tmp_path / "kept", verbose=False)
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(*given, lambda logits: float(logits[0, -1, 6]), save_to=tmp_path / "kept", resume=True, verbose=False)
