"""Sweeps that are saved on the way and go on after an interruption, or refuse to go on with another's values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphlens
from graphlens import HookedTransformer, Scale
from graphlens.errors import InputError
from graphlens.experiments import sweep as sweeps
from graphlens.metrics import KLDivergence, LogitDiff
from graphlens.patching import Site, SweepResult, grid, sweep
from tests.sweep_cases import (
    CFG,
    CLEAN,
    CORRUPTED,
    DIFFERENCE,
    FEW,
    METRICS,
    MODEL,
    PADDING,
    SOME,
    agrees,
    loop,
    refused,
)

pytestmark = pytest.mark.usefixtures("no_flags")


class Counted:
    """A metric that counts its calls, and is interrupted at one of them."""

    __name__ = "counted"

    def __init__(self, stop: int | None = None) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, logits: Any) -> float:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return float(logits[0, -1, 5] - logits[1, -1, 9])


BASELINES = 2  # calls of a metric for the baselines, clean and corrupted
ONE_BY_ONE: dict[str, Any] = {"max_batch_tokens": 1, "verbose": False}


@pytest.mark.parametrize("name", ["sweep", "sweep.json", "sweep.v2", "gpt2-0.5"])
@pytest.mark.parametrize("recompute", [True, False])
def test_an_interrupted_sweep_goes_on(name: str, recompute: bool, clean: Mapping[str, Any], tmp_path: Path) -> None:
    options = {**ONE_BY_ONE, "recompute": recompute}
    whole = sweep(MODEL, CORRUPTED, SOME, clean, Counted(), save_to=tmp_path / "whole", **options)
    path, first = tmp_path / name, Counted(stop=BASELINES + 6)
    with pytest.raises(KeyboardInterrupt):
        sweep(MODEL, CORRUPTED, SOME, clean, first, save_to=path, **options)
    held = SweepResult.load(path)
    done = ~np.isnan(held.values)
    assert done.sum() == 5
    np.testing.assert_array_equal(held.values[done], whole.values[done])
    assert (held.labels, held.baselines) == (whole.labels, whole.baselines)
    rest = Counted()
    result = sweep(MODEL, CORRUPTED, SOME, clean, rest, save_to=path, resume=True, **options)
    assert rest.calls == BASELINES + len(SOME) - 5
    assert result == whole
    assert SweepResult.load(path) == whole
    nothing = Counted()
    assert sweep(MODEL, CORRUPTED, SOME, clean, nothing, save_to=path, resume=True, **options) == whole
    assert nothing.calls == 0


def test_going_on_with_several_metrics(clean: Mapping[str, Any], tmp_path: Path) -> None:
    sites = grid("z", ("layer", "head"), {"layer": range(4), "head": range(4)})
    options = {**ONE_BY_ONE, "save_to": tmp_path / "sweep"}

    def metrics(stop: int | None = None) -> dict[str, Any]:
        return {"difference": DIFFERENCE, "counted": Counted(stop), "loss": METRICS["loss"]}

    with pytest.raises(KeyboardInterrupt):
        sweep(MODEL, CORRUPTED, sites, clean, metrics(BASELINES + 8), **options)
    held = SweepResult.load(tmp_path / "sweep")
    assert (np.isnan(held.values).sum((1, 2)) == 16 - 7).all()
    result = sweep(MODEL, CORRUPTED, sites, clean, metrics(), resume=True, **options)
    expected = loop(CORRUPTED, sites.sites, clean, list(metrics().values()))
    agrees(result, expected.reshape(3, 4, 4))


def test_going_on_with_a_value_for_each_prompt(clean: Mapping[str, Any], tmp_path: Path) -> None:
    metric, path = METRICS["positions"], tmp_path / "sweep"
    whole = sweep(MODEL, CORRUPTED, SOME, clean, metric, save_to=path, verbose=False)
    values = whole.values.copy()
    values[[1, 4]] = np.nan
    SweepResult(values, whole.axes, whole.labels, whole.baselines, whole.metadata).save(path)
    agrees(sweep(MODEL, CORRUPTED, SOME, clean, metric, save_to=path, resume=True, verbose=False), whole.values)
    assert not np.isnan(SweepResult.load(path).values).any()


def test_it_is_saved_on_the_way(clean: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "SAVE_EVERY", -1.0)
    done = []

    class Watching(Counted):
        def __call__(self, logits: Any) -> float:
            if (tmp_path / "sweep.json").exists():
                done.append(int((~np.isnan(SweepResult.load(tmp_path / "sweep").values)).sum()))
            return super().__call__(logits)

    sweep(MODEL, CORRUPTED, SOME[:5], clean, Watching(), save_to=tmp_path / "sweep", **ONE_BY_ONE)
    assert done == [1, 2, 3, 4]


def test_without_resume_a_sweep_starts_anew(clean: Mapping[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        counted = Counted()
        sweep(MODEL, CORRUPTED, SOME, clean, counted, save_to=tmp_path / "sweep", verbose=False)
        assert counted.calls == BASELINES + len(SOME)
    counted = Counted()
    sweep(MODEL, CORRUPTED, SOME, clean, counted, save_to=tmp_path / "new", resume=True, verbose=False)
    assert counted.calls == BASELINES + len(SOME)  # there is nothing to go on from yet


@pytest.mark.parametrize(
    "other",
    [
        {"corrupted_tokens": CLEAN},
        {"sites": SOME[1:]},
        {"sites": [*SOME[:-1], Site("attn_scores", 3, position=slice(1, None))]},
        {"metric": LogitDiff([5, 17, 200], [9, 300, 5])},
        {"metric": [DIFFERENCE]},
        {"metric": KLDivergence(MODEL(CLEAN))},
        {"source": "mean"},
        {"attention_mask": PADDING},
    ],
    ids=lambda other: "-".join(other),
)
def test_going_on_with_another_sweep_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        **{"corrupted_tokens": CORRUPTED, "sites": SOME, "source": "zero", "metric": DIFFERENCE},
        **{"save_to": tmp_path / "sweep", "resume": True, "verbose": False},
    }
    first = sweep(MODEL, **asked)
    with pytest.raises(InputError) as error:
        sweep(MODEL, **{**asked, **other})
    assert f"{tmp_path / 'sweep'} holds another sweep" in str(error.value)
    assert SweepResult.load(tmp_path / "sweep") == first


def test_going_on_with_another_long_mask_is_refused(tmp_path: Path) -> None:
    """NumPy prints no more than a few of a thousand numbers: what is compared must not be its text."""
    tokens = np.random.default_rng(2).integers(0, CFG.d_vocab, (11, 100))
    masks = [np.ones((11, 100), int) for _ in range(2)]
    masks[1][5, :50] = 0
    asked: dict[str, Any] = {"metric": LogitDiff(5, 9), "save_to": tmp_path / "sweep", "verbose": False}
    sites = [Site("resid_post", 3, position=-1)]
    sweep(MODEL, tokens, sites, "zero", **asked, attention_mask=masks[0])
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(MODEL, tokens, sites, "zero", **asked, attention_mask=masks[1], resume=True)


def test_going_on_with_another_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    sweep(MODEL, CORRUPTED, SOME, "zero", DIFFERENCE, save_to=tmp_path / "sweep", verbose=False)
    folder = graphlens.process_weights(tiny_folder, tmp_path / "processed")
    other = HookedTransformer.from_onnx(folder, "cpu")
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(other, CORRUPTED, SOME, "zero", DIFFERENCE, save_to=tmp_path / "sweep", resume=True, verbose=False)


def test_going_on_under_other_edits_is_refused(tmp_path: Path) -> None:
    """Half of the values would be those of another model."""
    asked: dict[str, Any] = {"save_to": tmp_path / "sweep", "verbose": False}
    with MODEL.intervene(Scale("blocks.1.hook_mlp_out", 0.5)):
        sweep(MODEL, CORRUPTED, FEW, "zero", DIFFERENCE, **asked)
    with pytest.raises(InputError, match="holds another sweep"):
        sweep(MODEL, CORRUPTED, FEW, "zero", DIFFERENCE, resume=True, **asked)


def test_where_nothing_can_be_saved_nothing_is_computed(tmp_path: Path) -> None:
    counted = Counted()
    said = refused(metric=counted, save_to=tmp_path / "missing" / "sweep")
    assert str(tmp_path / "missing") in said
    assert counted.calls == 0
