"""Patching and head detection as TransformerLens has them: its own functions on our model, and ours beside them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import graphlens
from graphlens import patching as ours
from graphlens.errors import InputError
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff
from graphlens.torch import HookedTransformer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from lens_oracle import oracle
    from transformer_lens import head_detector, patching

PROMPT = "When John and Mary went to the store, John gave a drink to"
OTHER = "When John and Mary went to the store, Mary gave a drink to"
NAMED = (
    *("resid_pre", "resid_mid", "attn_out", "mlp_out", "block_every"),
    *(f"attn_head_{part}_by_pos" for part in ("out", "q", "k", "v", "pattern")),
    *(f"attn_head_{part}_all_pos" for part in ("out", "q", "k", "v", "pattern")),
    *("attn_head_pattern_dest_src_pos", "attn_head_all_pos_every", "attn_head_by_pos_every"),
)
FUNCTIONS = [name for name in dir(patching) if name.startswith("get_act_patch_")]
HEADS = ("previous_token_head", "duplicate_token_head", "induction_head")


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "tqdm", lambda items, **_: items)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert isinstance(found, torch.Tensor)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.fixture(scope="module")
def pair(odd_hooked: Path, odd_checkpoint: Path) -> tuple[HookedTransformer, Any]:
    """A random model of odd sizes, where every patch has an effect."""
    return HookedTransformer.from_onnx(odd_hooked, "cpu"), oracle(odd_checkpoint)


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 7] - logits[0, -1, 60]


def inputs(either: Any) -> tuple[torch.Tensor, Any, Callable[[torch.Tensor], torch.Tensor]]:
    """Corrupted tokens, the clean run's cache, the metric."""
    clean, corrupted = torch.tensor([[3, 14, 15, 92]]), torch.tensor([[65, 35, 89, 79]])
    return corrupted, either.run_with_cache(clean)[1], metric


def test_these_are_the_functions_that_transformerlens_has() -> None:
    assert {f"get_act_patch_{name}" for name in NAMED} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_patching(pair: tuple[HookedTransformer, Any], name: str) -> None:
    found, expected = (getattr(patching, name)(either, *inputs(either)) for either in pair)
    close(found, expected)
    assert float(expected.std()) > 1e-2, "patching changes nothing, so this tests nothing"


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_either_cache_can_be_patched_from(pair: tuple[HookedTransformer, Any], whose: str) -> None:
    model, lens = pair
    tokens, cache, measure = inputs(model)
    if whose == "theirs":
        cache = transformer_lens.ActivationCache(dict(cache.items()), model)
    close(
        patching.get_act_patch_resid_pre(model, tokens, cache, measure),
        patching.get_act_patch_resid_pre(lens, *inputs(lens)),
    )


def test_the_generic_function_by_an_index(pair: tuple[HookedTransformer, Any]) -> None:
    index = pd.DataFrame([[0, 1], [2, 2], [1, 0]], columns=["layer", "pos"])
    found, expected = (
        patching.generic_activation_patch(
            either, *inputs(either), patching.layer_pos_patch_setter, "resid_mid", index_df=index
        )
        for either in pair
    )
    assert found.shape == (3,)
    close(found, expected)


def test_the_generic_function_by_axes(pair: tuple[HookedTransformer, Any]) -> None:
    (found, frame), (expected, other) = (
        patching.generic_activation_patch(
            either,
            *inputs(either),
            patching.layer_head_vector_patch_setter,
            "z",
            index_axis_names=["layer", "head"],
            return_index_df=True,
        )
        for either in pair
    )
    close(found, expected)
    pd.testing.assert_frame_equal(frame, other)


# Ours beside TransformerLens's, each on its own model

CLEAN = torch.tensor([[3, 14, 15, 92], [65, 35, 89, 79], [1, 2, 3, 4]])
CORRUPTED = torch.tensor([[27, 18, 28, 18], [65, 99, 9, 79], [100, 50, 25, 12]])
METRICS: dict[str, Any] = {
    "difference": LogitDiff([7, 50, 3], [60, 8, 9]),
    "difference early": LogitDiff(7, 60, position=[1, -1, 2]),
    "loss": CrossEntropy(CORRUPTED, position=None),
    "function": lambda logits: (logits[:, -1, 7] - logits[:, -1, 60]).mean() + logits[1, 2, 5],
}


@pytest.fixture(scope="module")
def faces(pair: tuple[HookedTransformer, Any], odd_hooked: Path) -> dict[str, Any]:
    """Our model on both faces, and TransformerLens's."""
    return {"numpy": graphlens.HookedTransformer.from_onnx(odd_hooked, "cpu"), "torch": pair[0], "lens": pair[1]}


def arguments(faces: dict[str, Any], face: str, metric: Any) -> tuple[Any, Any, Any, Any]:
    """(model, corrupted tokens, the clean run's cache, metric) in the face's own kind."""
    model, clean, corrupted = faces[face], CLEAN, CORRUPTED
    if face == "numpy":
        clean, corrupted = clean.numpy(), corrupted.numpy()
    return model, corrupted, model.run_with_cache(clean)[1], metric


def same(found: Any, expected: torch.Tensor, face: str) -> None:
    assert isinstance(found, np.ndarray if face == "numpy" else torch.Tensor)
    close(torch.as_tensor(found), expected)


@pytest.fixture(scope="module")
def theirs(faces: dict[str, Any]) -> Callable[..., tuple[dict[str, torch.Tensor], Any]]:
    """TransformerLens's results by metric, and its index frame where that is asked for.

    One of its loops serves all metrics: at each run it computes every one, and returns the run's number, which then stands
    in its result wherever that run's value would.
    """

    @functools.cache
    def results(function: str, *given: Any, axes: tuple[str, ...] = (), frame: bool = True) -> Any:
        rows: list[list[float]] = []

        def number(logits: torch.Tensor) -> torch.Tensor:
            rows.append([float(metric(logits)) for metric in METRICS.values()])
            return torch.tensor(float(len(rows) - 1))

        options: dict[str, Any] = {"index_axis_names": list(axes)} if axes else {}
        options |= {"return_index_df": True} if frame else {}
        found = getattr(patching, function)(*arguments(faces, "lens", number), *given, **options)
        runs, index = found if frame else (found, None)
        values = torch.tensor(rows)
        return {name: values[:, i][runs.long()] for i, name in enumerate(METRICS)}, index

    return results


FACES = pytest.mark.parametrize("face", ["numpy", "torch"])
BY_METRIC = pytest.mark.parametrize("metric", METRICS)


def test_ours_are_all_that_transformerlens_has() -> None:
    public = {name for name in dir(patching) if name.startswith("get_act_patch_") or name.endswith("_patch_setter")}
    assert public | {"generic_activation_patch"} <= set(ours.__all__)


def test_one_loop_of_transformerlens_for_all_metrics_gives_what_one_for_each_does(
    faces: dict[str, Any], theirs: Callable[..., Any]
) -> None:
    every, _ = theirs("get_act_patch_attn_head_out_by_pos")
    for name, metric in METRICS.items():
        alone = patching.get_act_patch_attn_head_out_by_pos(*arguments(faces, "lens", metric))
        assert alone.dtype == every[name].dtype
        torch.testing.assert_close(every[name], alone, rtol=1e-6, atol=1e-6)


@FACES
@BY_METRIC
@pytest.mark.parametrize("name", FUNCTIONS)
def test_our_functions(faces: dict[str, Any], theirs: Callable[..., Any], name: str, metric: str, face: str) -> None:
    found = getattr(ours, name)(*arguments(faces, face, METRICS[metric]))
    expected = theirs(name, frame=not name.endswith("every"))[0][metric]
    same(found, expected, face)
    assert float(expected.std()) > 1e-3, "patching changes nothing, so this tests nothing"


def test_a_divergence_of_either(faces: dict[str, Any]) -> None:
    for face in ("numpy", "torch"):
        reference = faces["lens"](CLEAN)
        found, expected = (
            module.get_act_patch_resid_mid(*arguments(faces, which, KLDivergence(reference)))
            for module, which in ((ours, face), (patching, "lens"))
        )
        same(found, expected, face)


@FACES
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.endswith("every")])
def test_our_functions_index_as_theirs(faces: dict[str, Any], theirs: Callable[..., Any], name: str, face: str) -> None:
    found, frame = getattr(ours, name)(*arguments(faces, face, METRICS["difference"]), return_index_df=True)
    expected, other = theirs(name, frame=True)
    same(found, expected["difference"], face)
    pd.testing.assert_frame_equal(frame, other)


@FACES
def test_arguments_by_name(faces: dict[str, Any], face: str) -> None:
    for name, metric_name in (("get_act_patch_attn_out", "patching_metric"), ("get_act_patch_block_every", "metric")):
        found, expected = (
            getattr(module, name)(
                **dict(zip(("model", "corrupted_tokens", "clean_cache", metric_name), given, strict=True))
            )
            for module, given in (
                (ours, arguments(faces, face, METRICS["difference"])),
                (patching, arguments(faces, "lens", METRICS["difference"])),
            )
        )
        same(found, expected, face)


SETTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "layer_pos_patch_setter": ("resid_mid", ("layer", "pos")),
    "layer_pos_head_vector_patch_setter": ("v", ("layer", "pos", "head_index")),
    "layer_head_vector_patch_setter": ("k", ("layer", "head")),
    "layer_head_pattern_patch_setter": ("pattern", ("layer", "head_index")),
    "layer_head_pos_pattern_patch_setter": ("attn_scores", ("layer", "head", "dest_pos")),
    "layer_head_dest_src_pos_pattern_patch_setter": ("pattern", ("layer", "head_index", "dest_pos", "src_pos")),
}


@FACES
@BY_METRIC
@pytest.mark.parametrize("setter", SETTERS)
def test_our_generic_function_with_each_setter(
    faces: dict[str, Any], theirs: Callable[..., Any], setter: str, metric: str, face: str
) -> None:
    activation, axes = SETTERS[setter]
    found, frame = ours.generic_activation_patch(
        *arguments(faces, face, METRICS[metric]),
        getattr(ours, setter),
        activation,
        index_axis_names=list(axes),
        return_index_df=True,
    )
    expected, other = theirs("generic_activation_patch", getattr(patching, setter), activation, axes=axes)
    same(found, expected[metric], face)
    pd.testing.assert_frame_equal(frame, other)


@FACES
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("resid_pre", {"index_axis_names": None, "index_df": pd.DataFrame([[2, 1], [0, 3]], columns=["layer", "pos"])}),
        ("attn_out", {"index_axis_names": ["layer", "pos"], "return_index_df": True}),
        ("attn_out", {"activation_name": "mlp_out"}),
        ("attn_head_out_all_pos", {"activation_name": "q"}),
        ("attn_head_v_by_pos", {"patch_setter": "halfway"}),
        (
            "attn_head_out_by_pos",
            {"patch_setter": "layer_head_vector_patch_setter", "index_axis_names": ("layer", "head")},
        ),
    ],
    ids=str,
)
def test_the_arguments_of_the_generic_function_by_name(
    faces: dict[str, Any], name: str, given: dict[str, Any], face: str
) -> None:
    results = []
    for module, which in ((ours, face), (patching, "lens")):
        options = dict(given)
        if "patch_setter" in given:
            setter = given["patch_setter"]
            options["patch_setter"] = halfway if setter == "halfway" else getattr(module, setter)
        call = getattr(module, f"get_act_patch_{name}")
        results.append(call(*arguments(faces, which, METRICS["difference"]), **options))
    found, expected = results
    if given.get("return_index_df"):
        pd.testing.assert_frame_equal(found[1], expected[1])
        found, expected = found[0], expected[0]
    same(found, expected, face)


def test_tables_of_ranges() -> None:
    for ranges, names in (((2, 3), ("layer", "pos")), ([1, 2, 2], ["a", "b", "c"]), ([0], ["layer"])):
        pd.testing.assert_frame_equal(
            ours.make_df_from_ranges(ranges, names), patching.make_df_from_ranges(ranges, names)
        )
    with pytest.raises(InputError, match="a name for each"):
        ours.make_df_from_ranges([2], ["layer", "pos"])


def halfway(corrupted: Any, index: Any, clean: Any) -> Any:
    """A setter of one's own, which hands back another array."""
    _, position, head = index
    mixed = corrupted + 0.0
    mixed[:, position, head] = (corrupted[:, position, head] + clean[:, position, head]) / 2
    return mixed


def swapped(corrupted: Any, index: Any, clean: Any) -> None:
    """One that works in place, and puts a position where another was."""
    _, position, head = index
    corrupted[:, position, head] = clean[:, position - 1, head - 1]


@FACES
@BY_METRIC
@pytest.mark.parametrize("setter", [halfway, swapped])
def test_our_generic_function_with_a_setter_of_ones_own(
    faces: dict[str, Any], theirs: Callable[..., Any], setter: Any, metric: str, face: str
) -> None:
    axes = ("layer", "pos", "head")
    found = ours.generic_activation_patch(
        *arguments(faces, face, METRICS[metric]), setter, "z", index_axis_names=list(axes)
    )
    expected = theirs("generic_activation_patch", setter, "z", axes=axes)[0][metric]
    same(found, expected, face)
    assert float(expected.std()) > 1e-3


def test_our_generic_function_with_transformerlenss_setter(faces: dict[str, Any]) -> None:
    found, expected = (
        module.generic_activation_patch(
            *arguments(faces, which, METRICS["difference"]),
            patching.layer_pos_patch_setter,
            "mlp_out",
            index_axis_names=["layer", "pos"],
        )
        for module, which in ((ours, "torch"), (patching, "lens"))
    )
    same(found, expected, "torch")


@FACES
@pytest.mark.parametrize("setter", ["layer_pos_head_vector_patch_setter", halfway], ids=["its", "one's own"])
def test_our_generic_function_by_an_index(faces: dict[str, Any], setter: Any, face: str) -> None:
    index = pd.DataFrame([[0, 1, 4], [2, 2, 0], [1, 0, 3], [2, -1, -2]], columns=["layer", "pos", "head"])
    (found, frame), (expected, other) = (
        module.generic_activation_patch(
            *arguments(faces, which, METRICS["difference early"]),
            getattr(module, setter) if isinstance(setter, str) else setter,
            "z",
            index_df=index.copy(),
            return_index_df=True,
        )
        for module, which in ((ours, face), (patching, "lens"))
    )
    assert tuple(found.shape) == (4,)
    same(found, expected, face)
    pd.testing.assert_frame_equal(frame, other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either index_axis_names or index_df"),
        ({"index_axis_names": ["layer"], "index_df": pd.DataFrame([[0]])}, "either index_axis_names or index_df"),
        ({"index_axis_names": ["layer", "neuron"]}, r"not \['layer', 'neuron'\]"),
        ({"index_axis_names": ["pos", "layer"]}, r"not \['pos', 'layer'\]"),
        ({"index_df": pd.DataFrame([], columns=["layer", "pos"])}, "index_df is empty"),
    ],
)
def test_our_generic_function_refuses(faces: dict[str, Any], options: dict[str, Any], says: str) -> None:
    given = arguments(faces, "torch", METRICS["difference"])
    with pytest.raises(InputError, match=says):
        ours.generic_activation_patch(*given, ours.layer_pos_patch_setter, "resid_pre", **options)


def test_our_generic_function_refuses_nan(faces: dict[str, Any]) -> None:
    given = arguments(faces, "torch", lambda logits: logits.sum() * float("nan"))
    for setter in (ours.layer_pos_head_vector_patch_setter, halfway):
        with pytest.raises(InputError, match="NaN"):
            ours.generic_activation_patch(*given, setter, "z", index_axis_names=["layer", "pos", "head"])


# Heads


@pytest.mark.parametrize("pattern", HEADS)
@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
def test_detecting_heads(
    model: HookedTransformer, lens: Any, pattern: Any, measure: Any, exclude_bos: bool, exclude_current_token: bool
) -> None:
    for heads in (None, [(0, 1), (3, 2)], {2: [0, 3]}):
        found, expected = (
            head_detector.detect_head(
                either,
                PROMPT,
                pattern,
                heads,
                exclude_bos=exclude_bos,
                exclude_current_token=exclude_current_token,
                error_measure=measure,
            )
            for either in (model, lens)
        )
        close(found, expected)


def test_detecting_heads_in_several_prompts_from_a_cache_and_by_a_pattern(model: HookedTransformer, lens: Any) -> None:
    length = model.to_tokens(PROMPT).shape[1]
    calls: list[Callable[[Any], torch.Tensor]] = [
        lambda either: head_detector.detect_head(either, [PROMPT, OTHER], "induction_head"),
        lambda either: head_detector.detect_head(
            either, PROMPT, "previous_token_head", cache=either.run_with_cache(PROMPT, remove_batch_dim=True)[1]
        ),
        lambda either: head_detector.detect_head(either, PROMPT, torch.tril(torch.ones(length, length), -1)),
    ]
    for call in calls:
        close(call(model), call(lens))
