"""Sweeps that are refused: caches, metrics, places and options that do not fit, each with what would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, Patch
from graphlens.errors import InputError, UnknownHookPoint
from graphlens.metrics import CrossEntropy, KLDivergence, LogitDiff, Probability, normalised
from graphlens.patching import Site
from tests.sweep_cases import CFG, CLEAN, CORRUPTED, DIFFERENCE, METRICS, MODEL, entropy, refused

pytestmark = pytest.mark.usefixtures("no_flags")


@pytest.mark.parametrize("length", [1, 6, 8])
def test_clean_and_corrupted_of_different_lengths(length: int) -> None:
    _, cache = MODEL.run_with_cache(np.ones((3, length), int))
    for hook, shapes in (
        ("blocks.0.hook_resid_pre", (f"[3, {length}, 128]", "[3, 7, 128]")),
        ("blocks.1.attn.hook_pattern", (f"[3, 4, {length}, {length}]", "[3, 4, 7, 7]")),
    ):
        said = refused(source=cache, sites=[Site(hook)])
        assert f"{hook!r} has shape {shapes[0]} in the clean cache and {shapes[1]} in the corrupted run" in said
        assert "same number of tokens" in said


def test_clean_and_corrupted_of_different_batches(clean: Mapping[str, Any]) -> None:
    said = refused(source={name: array[:2] for name, array in clean.items()})
    assert "[2, 7, 128] in the clean cache and [3, 7, 128] in the corrupted run" in said


@pytest.mark.parametrize("kind", ["cache", "dict"])
def test_a_cache_without_what_is_patched(kind: str) -> None:
    _, cache = MODEL.run_with_cache(CLEAN, names_filter=lambda name: not name.endswith("blocks.3.attn.hook_z"))
    said = refused(UnknownHookPoint, source=cache if kind == "cache" else dict(cache))
    assert "blocks.3.attn.hook_z" in said
    assert "clean cache" in said
    assert "names_filter" in said


def test_a_cache_of_other_weight_processing(tiny_folder: Path, tmp_path: Path) -> None:
    folder = graphlens.process_weights(tiny_folder, tmp_path / "processed")
    _, cache = HookedTransformer.from_onnx(folder, "cpu").run_with_cache(CLEAN)
    said = refused(source=cache)
    assert "fold_ln" in said
    assert "than this one (none)" in said


def returned(value: Any) -> Callable[[Any], Any]:
    return lambda logits: value


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda logits: logits[:, -1, 5], "the metric returned ndarray of shape [3]; it must return one number"),
        (returned("large"), "the metric returned str"),
        (returned(None), "the metric returned NoneType"),
        (returned([1.0, 2.0]), "the metric returned list of shape [2]"),
        (returned(1j), "one number"),
        (returned(float("nan")), "the metric '<lambda>' is NaN"),
        (lambda logits: np.nan if logits[0, -1, 0] != MODEL(CORRUPTED)[0, -1, 0] else 1.0, "the metric '<lambda>' is NaN"),
        ([], "metric is one of graphlens.metrics"),
        (["logits"], "metric is one of graphlens.metrics"),
        ({"one": 3}, "metric is one of graphlens.metrics"),
        ([DIFFERENCE, METRICS["positions"]], "reduction='none'"),
        ([METRICS["positions"], entropy], "reduction='none'"),
        (LogitDiff(5, 9, position=7), "LogitDiff.position is 7: prompts of 7 tokens have positions 0 to 6"),
        (LogitDiff(5, 9, position=[0, 1]), "LogitDiff.position is of 2 prompts; there are 3"),
        (LogitDiff(5, CFG.d_vocab), f"LogitDiff.incorrect is {CFG.d_vocab}: token ids go from 0 to {CFG.d_vocab - 1}"),
        (LogitDiff([1, 2], 3), "LogitDiff.correct is of 2 prompts; there are 3"),
        (LogitDiff(" Mary and", " John"), "' Mary and'"),
        (KLDivergence(np.zeros((3, 6, CFG.d_vocab))), "KLDivergence.reference has 6 positions; there are 7"),
        (CrossEntropy(CORRUPTED[:, 1:], position=None), "CrossEntropy.target has 6 tokens a prompt"),
        (normalised(DIFFERENCE), "lacks a baseline: pass clean and corrupted"),
    ],
)  # fmt: skip
def test_metrics_that_do_not_fit(metric: Any, says: str) -> None:
    assert says in refused(metric=metric)


def test_a_metric_that_is_nan_at_a_site_names_it(clean: Mapping[str, Any]) -> None:
    broken = {**clean, "blocks.2.attn.hook_z": np.full_like(clean["blocks.2.attn.hook_z"], np.nan)}
    for metric in (DIFFERENCE, Probability(3), METRICS["loss"]):
        said = refused(source=broken, metric=metric, max_batch_tokens=4096)
        assert "is NaN at blocks.2.attn.hook_z[head 2]" in said
        assert metric.name in said
    assert "the metric 'entropy' is NaN" in refused(source=broken, metric=entropy)


def test_nothing_to_normalise_by() -> None:
    _, cache = MODEL.run_with_cache(CORRUPTED)
    assert "the same on a clean and its corrupted prompt" in refused(source=cache, metric=normalised(DIFFERENCE))


@pytest.mark.parametrize(
    ("sites", "kind", "says"),
    [
        ([], InputError, "the list of sites is empty"),
        (["blocks.0.hook_resid_pre"], InputError, "a sweep takes Site(hook, ...), not str"),
        ([Patch("blocks.0.hook_resid_pre", 0.0)], InputError, "a sweep takes Site(hook, ...), not Patch"),
        ([Site("z", 9)], UnknownHookPoint, "4 layers (0-3). Nearest: 'blocks.3.attn.hook_z'"),
        ([Site("z", 1, head=4)], InputError, "'blocks.1.attn.hook_z': heads=4: there is no 4; head_index has 4 (0-3)"),
        ([Site("z", 1, head=[0, -5])], InputError, "there is no -5"),
        ([Site("z", 1, position=7)], InputError, "'blocks.1.attn.hook_z': positions=7: there is no 7; pos has 7 (0-6)"),
        ([Site("blocks.1.ln1.hook_scale", position=7)], InputError, "there is no 7; pos has 7 (0-6)"),
        ([Site("z", 1, dims=32)], InputError, "dims=32: there is no 32; d_head has 32 (0-31)"),
        ([Site("blocks.1.mlp.hook_post", dims=512)], InputError, "dims=512: there is no 512; d_mlp has 512 (0-511)"),
        ([Site("pattern", 1, dims=7)], InputError, "dims=7: there is no 7; key_pos has 7 (0-6)"),
        ([Site("resid_pre", 1, head=0)], InputError, "'blocks.1.hook_resid_pre': it has no heads"),
        ([Site("z", 0), Site("blocks.1.attn.hook_zz")], UnknownHookPoint, "'blocks.1.attn.hook_z'"),
        ([Site("result", 1)], UnknownHookPoint, "use_attn_result"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:30],
)
def test_places_that_there_are_not(sites: list[Any], kind: type[Exception], says: str) -> None:
    assert says in refused(kind, sites=sites)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "random"}, "source 'random': there is 'zero', 'mean', 'noise', or a cache"),
        ({"source": 3}, "not int"),
        ({"source": None}, "not NoneType"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be a whole number of 1 or more"),
        ({"max_batch_tokens": -4}, "max_batch_tokens=-4"),
        ({"resume": True}, "resume=True needs save_to="),
        ({"stop_at_layer": 2}, "a sweep runs whole prompts"),
        ({"attention_mask": np.ones((3, 6), int)}, "attention_mask has shape [3, 6]; the tokens have [3, 7]"),
        ({"corrupted_tokens": np.full((1, 4), CFG.d_vocab)}, str(CFG.d_vocab)),
    ],
)
def test_other_things_that_do_not_fit(changes: dict[str, Any], says: str) -> None:
    assert says in refused(**changes)


@pytest.mark.parametrize("tokens", [1.5, "64", None])
def test_a_number_of_tokens_that_is_none(tokens: Any) -> None:
    assert f"max_batch_tokens={tokens!r}" in refused(max_batch_tokens=tokens)


def test_what_is_refused_leaves_no_file(tmp_path: Path) -> None:
    refused(sites=[Site("z", 9)], kind=UnknownHookPoint, save_to=tmp_path / "sweep")
    refused(metric=returned("x"), save_to=tmp_path / "sweep")
    assert not list(tmp_path.iterdir())
