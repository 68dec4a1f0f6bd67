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
    (told,) = json.loads(done.stdout)["results"].values()
    assert told["axes"] == ["layer", "pos"]
    assert told["baselines"]["values"] == pytest.approx(told["baselines"]["raw"])
    assert told["normalised"] is False
    logits, cache = tiny.run_with_cache(CLEAN)
    measure = Probability(" Mary") if metric == "probability" else KLDivergence(logits)
    expected = get_act_patch_mlp_out(tiny, tiny.to_tokens(CORRUPTED), cache, measure)
    np.testing.assert_allclose(SweepResult.load(tmp_path / "mlp_out").values, expected, atol=1e-6)
    assert "L3" in (tmp_path / "mlp_out.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", ["--normalise", "--raw"])
def test_json_has_values_baselines_and_the_largest_effects(
    tiny: HookedTransformer, tiny_folder: Path, tmp_path: Path, option: str
) -> None:
    sites = ("--sites", "resid_pre", "--sites", "attn_head_out_all_pos")
    done = run(*command(tiny_folder, tmp_path, *ANSWERS, *sites, option, "--json", "--csv"))
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["model"], told["tokens"]) == ("tiny-gpt2", 15)
    assert list(told["results"]) == ["resid_pre", "attn_head_out_all_pos"]
    metric = LogitDiff(tiny.to_single_token(" Mary"), tiny.to_single_token(" John"))
    clean, corrupted = (float(metric(tiny(tiny.to_tokens(text)))) for text in (CLEAN, CORRUPTED))
    _, cache = tiny.run_with_cache(CLEAN)
    exact = get_act_patch_resid_pre(tiny, tiny.to_tokens(CORRUPTED), cache, metric)
    found = told["results"]["resid_pre"]
    normalised = option == "--normalise"
    scaled = (exact - corrupted) / (clean - corrupted) if normalised else exact
    np.testing.assert_allclose(found["values"], scaled, atol=1e-4)
    assert found["baselines"]["raw"] == pytest.approx({"clean": clean, "corrupted": corrupted}, abs=1e-4)
    ends = {"clean": 1, "corrupted": 0} if normalised else {"clean": clean, "corrupted": corrupted}
    assert found["baselines"]["values"] == pytest.approx(ends, abs=1e-4)
    order = np.argsort(-np.abs(exact - corrupted), axis=None)[:20]
    assert [top["raw"] for top in found["top"]] == pytest.approx(list(exact.ravel()[order]), abs=2e-5)
    assert [top["value"] for top in found["top"]] == pytest.approx(list(scaled.ravel()[order]), abs=1e-4)
    first = found["top"][0]
    layer, pos = (found["labels"][axis].index(first["site"][axis]) for axis in found["axes"])
    assert found["values"][layer][pos] == first["value"]
    lines = (tmp_path / "resid_pre.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "layer,pos,value"
    assert [float(line.rpartition(",")[2]) for line in lines[1:]] == np.ravel(found["values"]).tolist()


def test_the_raw_baselines_are_printed_beside_the_normalised_ones(tiny_folder: Path, tmp_path: Path) -> None:
    done = run(*command(tiny_folder, tmp_path, *ANSWERS))
    assert "clean +1.000, corrupted +0.000 (raw: clean +10.11, corrupted -8.406)" in " ".join(done.stdout.split())
    raw = run(*command(tiny_folder, tmp_path / "raw", *ANSWERS, "--raw"))
    assert "clean +10.11" in raw.stdout
    assert "(raw:" not in raw.stdout


def test_a_folder_whose_name_looks_like_markup_is_named_as_it_is(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs[red]", "runs[/red]"):
        done = run(*command(tiny_folder, Path(name), *ANSWERS))
        assert done.exit_code == 0, done.output
        assert f"Kept in {name}/resid_pre.json" in done.stdout.replace("\n", "")
        assert (tmp_path / name / "resid_pre.json").is_file()


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
    told = run(
        "attribute", *command(tiny_folder, tmp_path / "json", *ANSWERS, "--sites", "mlp_out", "--compare", "--json")[1:]
    )
    results = json.loads(told.stdout)["results"]["mlp_out"]
    assert set(results) == {"estimate", "exact", "compared"}
    values = np.asarray([results[kind]["values"] for kind in ("estimate", "exact")]).reshape(2, -1)
    assert results["compared"]["correlation"] == pytest.approx(np.corrcoef(*values)[0, 1], abs=1e-6)
    refused = run("attribute", *command(tiny_folder, tmp_path, "--answer", " Mary", "--metric", "accuracy")[1:])
    assert refused.exit_code == 1
    assert "--metric 'accuracy'" in str(refused.exception)
