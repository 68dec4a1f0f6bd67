"""``graphlens patch``: what it keeps is what the API gives; interrupted, it goes on; errors are one block on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from graphlens import HookedTransformer
from graphlens.attribution import attribution_patch
from graphlens.cli.app import app
from graphlens.errors import GraphlensError
from graphlens.experiments.recompute import Recomputation
from graphlens.metrics import KLDivergence, LogitDiff, Probability
from graphlens.patching import (
    SweepResult,
    act_patch_sites,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_mlp_out,
    get_act_patch_resid_pre,
)

CLEAN = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
ANSWERS = ("--answer", " Mary", "--wrong", " John")


def command(model: Path, out: Path, *more: str, clean: str = CLEAN, corrupted: str = CORRUPTED) -> list[str]:
    return ["patch", str(model), "--clean", clean, "--corrupted", corrupted, "-o", str(out), "--provider", "cpu", *more]


def run(*arguments: str) -> Any:
    done = CliRunner().invoke(app, list(arguments))
    assert isinstance(done.exception, (GraphlensError, SystemExit, type(None))), "a defect of graphlens"
    return done


def test_it_keeps_what_the_api_gives(tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path) -> None:
    sites = ("--sites", "resid_pre", "--sites", "attn_head_out_all_pos")
    done = run(*command(tiny_folder, tmp_path / "out", *ANSWERS, *sites))
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert "resid_pre: normalised logit difference; clean +1.000, corrupted +0.000" in done.stdout
    tokens = tiny.to_tokens(CORRUPTED)
    _, cache = tiny.run_with_cache(CLEAN)
    metric = LogitDiff(" Mary", " John").normalised()
    functions = {"resid_pre": get_act_patch_resid_pre, "attn_head_out_all_pos": get_act_patch_attn_head_out_all_pos}
    for name, function in functions.items():
        found = SweepResult.load(tmp_path / "out" / name)
        np.testing.assert_allclose(found.values, function(tiny, tokens, cache, metric), atol=1e-6)
    found = SweepResult.load(tmp_path / "out" / "resid_pre")
    assert found.labels["pos"][10] == " Mary_10"
    assert found.baselines == {"clean": 1.0, "corrupted": 0.0}
    assert found.top(1)[0][0]["pos"] in (" Mary_10", " to_14")


@pytest.mark.parametrize("metric", ["probability", "kl"])
def test_other_metrics_and_raw_values(tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path, metric: str) -> None:
    more = ("--answer", " Mary", "--metric", metric, "--raw", "--sites", "mlp_out", "--json", "--picture", "txt")
    done = run(*command(tiny_folder, tmp_path, *more))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["axes"] == ["layer", "pos"]
    logits, cache = tiny.run_with_cache(CLEAN)
    measure = Probability(" Mary") if metric == "probability" else KLDivergence(logits)
    expected = get_act_patch_mlp_out(tiny, tiny.to_tokens(CORRUPTED), cache, measure)
    np.testing.assert_allclose(SweepResult.load(tmp_path / "mlp_out").values, expected, atol=1e-6)
    assert "L3" in (tmp_path / "mlp_out.txt").read_text(encoding="utf-8")


def test_interrupted_it_keeps_what_is_done_and_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*command(tiny_folder, tmp_path / "whole", *ANSWERS)).exit_code == 0
    groups, batches = Recomputation.groups, []

    def few(self: Recomputation, variants: Any) -> Iterator[Any]:
        self._max_tokens = 6
        for group in groups(self, variants):
            if len(batches) == 4:
                raise KeyboardInterrupt
            batches.append(len(group))
            yield group

    with monkeypatch.context() as patched:
        patched.setattr(Recomputation, "groups", few)
        stopped = run(*command(tiny_folder, tmp_path / "out", *ANSWERS))
    assert stopped.exit_code == 130
    assert "--resume" in stopped.output
    part = SweepResult.load(tmp_path / "out" / "resid_pre")
    done = int((~np.isnan(part.values)).sum())
    assert sum(batches) <= done < part.values.size
    assert f"{done} of 60 values" in stopped.output

    refused = run(*command(tiny_folder, tmp_path / "out", *ANSWERS))
    assert refused.exit_code == 1
    assert "--resume" in str(refused.exception)
    counted: list[int] = []

    def counting(self: Recomputation, variants: Any) -> Iterator[Any]:
        for group in groups(self, variants):
            counted.append(len(group))
            yield group

    monkeypatch.setattr(Recomputation, "groups", counting)
    resumed = run(*command(tiny_folder, tmp_path / "out", *ANSWERS, "--resume"))
    assert resumed.exit_code == 0, resumed.output
    assert sum(counted) == 60 - done
    found, expected = (SweepResult.load(tmp_path / name / "resid_pre") for name in ("out", "whole"))
    np.testing.assert_allclose(found.values, expected.values, atol=1e-5)
    other = run(*command(tiny_folder, tmp_path / "out", "--answer", " John", "--wrong", " Mary", "--resume"))
    assert other.exit_code == 1
    assert "holds another sweep" in str(other.exception)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--answer", " Mary"), "needs --wrong"),
        (("--answer", " Mary and", "--wrong", " John"), "Mary and"),
        ((*ANSWERS, "--sites", "heads"), "no sites are called 'heads'"),
        ((*ANSWERS, "--metric", "accuracy"), "--metric 'accuracy'"),
        ((*ANSWERS, "--picture", "bmp"), "bmp"),
    ],
)
def test_bad_input(tiny_folder: Path, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    done = run(*command(tiny_folder, tmp_path / "out", *more))
    assert done.exit_code == 1
    assert said in str(done.exception)


def test_prompts_of_different_lengths(tiny_folder: Path, tmp_path: Path) -> None:
    done = run(*command(tiny_folder, tmp_path, *ANSWERS, corrupted="Mary gave a drink to"))
    assert done.exit_code == 1
    assert "15 tokens" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_attribute_keeps_the_estimate_and_compares_it(
    tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path
) -> None:
    given = command(tiny_folder, tmp_path, *ANSWERS, "--sites", "mlp_out", "--compare", "--raw")
    done = run("attribute", *given[1:])
    assert done.exit_code == 0, done.output
    assert "correlation" in done.output
    _, cache = tiny.run_with_cache(CLEAN)
    sites = act_patch_sites(tiny, tiny.to_tokens(CORRUPTED), "mlp_out")
    metric = LogitDiff(" Mary", " John")
    expected = attribution_patch(tiny, CORRUPTED, sites, cache, metric, verbose=False)
    np.testing.assert_allclose(SweepResult.load(tmp_path / "mlp_out-estimate").values, expected.values, atol=1e-5)
    exact = get_act_patch_mlp_out(tiny, tiny.to_tokens(CORRUPTED), cache, metric)
    np.testing.assert_allclose(SweepResult.load(tmp_path / "mlp_out-exact").values, exact, atol=1e-5)
    assert not (tmp_path / "mlp_out.json").exists(), "that name is graphlens patch's"
    (tmp_path / "mlp_out-estimate.json").rename(tmp_path / "elsewhere.json")
    for left, option in (("mlp_out-exact.json", "--compare"), ("mlp_out-estimate.json", "--raw")):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        again = run("attribute", *command(tiny_folder, tmp_path, *ANSWERS, "--sites", "mlp_out", option)[1:])
        assert again.exit_code == 1
        assert f"{tmp_path / left} exists" in str(again.exception)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        (tmp_path / left).rename(tmp_path / "mlp_out-estimate.json")
    refused = run("attribute", *command(tiny_folder, tmp_path, "--answer", " Mary", "--metric", "accuracy")[1:])
    assert refused.exit_code == 1
    assert "--metric 'accuracy'" in str(refused.exception)
