"""``graphlens drift``: what it prints and keeps is what the API gives, and wrong input is a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import graphlens as package
from graphlens import HookedTransformer
from graphlens.metrics import LogitDiff
from graphlens.patching import DriftResult
from tests.command_line import graphlens, sentence

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-gpt2 with one matrix off."""
    model = HookedTransformer.from_onnx(package.embedded_model(), "cpu")
    weight = np.array(model.weights["blocks.1.attn.W_O"])
    noise = np.random.default_rng(0).normal(0, 0.2 * weight.std(), weight.shape).astype(weight.dtype)
    model.set_weights({"blocks.1.attn.W_O": weight + noise})
    folder = tmp_path_factory.mktemp("drift") / "damaged"
    model.bake([], folder, keep_hooks=True)
    return folder


def test_it_prints_the_worst_sites_and_what_they_cost(tiny_folder: Path, damaged: Path, tmp_path: Path) -> None:
    kept, picture = tmp_path / "kept.json", tmp_path / "heat.txt"
    done = graphlens(
        *("drift", tiny_folder, damaged, PROMPT, "The cat", "--patch", "--answer", " Mary", "--wrong", " John"),
        *("-o", kept, "--picture", picture, "--provider", "cpu"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first = next(line for line in done.stdout.splitlines() if "blocks." in line)
    assert first.split()[:3] == ["blocks.1.hook_attn_out", "100.0", "%"]
    assert "damaged against tiny-gpt2, 2 x 15 tokens: the logits are off by" in done.stdout
    assert "relative error after each block: 0 0.0" in done.stdout
    assert "logit difference" in done.stdout
    assert "attn_out" in picture.read_text()
    models = [HookedTransformer.from_onnx(folder, "cpu") for folder in (tiny_folder, damaged)]
    metric = LogitDiff(" Mary", " John")
    found = package.drift(*models, [PROMPT, "The cat"], patch=True, metric=metric, verbose=False)
    again = DriftResult.load(kept)
    assert [site.hook for site in again.sites] == [site.hook for site in found.sites]
    np.testing.assert_allclose(
        [site.relative for site in again.sites], [site.relative for site in found.sites], rtol=1e-4
    )
    assert again.metric is not None
    assert found.metric is not None
    assert again.metric[1:] == pytest.approx(found.metric[1:], rel=1e-4)


def test_it_prints_json(tiny_folder: Path, damaged: Path) -> None:
    done = graphlens("drift", tiny_folder, damaged, PROMPT, "--json", "--provider", "cpu")
    record = json.loads(done.stdout)
    assert done.stderr == ""
    worst = max(record["sites"], key=lambda site: site["fresh"])
    assert worst["hook"] == "blocks.1.hook_attn_out"
    assert record["sites"][0]["snr"] == "inf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ids.json", "[[5, 6, 7, 8], [9, 10]]"),
        ("ids.txt", "5 6 7 8\n\n9, 10\n"),
        ("one.json", "[5, 6, 7, 8]"),
    ],
)
def test_tokens_come_from_a_file(tiny_folder: Path, damaged: Path, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    done = graphlens("drift", tiny_folder, damaged, "--tokens", tmp_path / name, "--json", "--provider", "cpu")
    record = json.loads(done.stdout)
    rows = 1 if name == "one.json" else 2
    assert record["shape"] == [rows, 4]
    models = [HookedTransformer.from_onnx(folder, "cpu") for folder in (tiny_folder, damaged)]
    tokens, mask = np.asarray([[5, 6, 7, 8], [0, 0, 9, 10]])[:rows], np.asarray([[1, 1, 1, 1], [0, 0, 1, 1]])[:rows]
    found = package.drift(*models, tokens, attention_mask=mask, verbose=False)
    assert record["logits"] == pytest.approx(found.logits, rel=1e-5)


def test_tokens_come_from_a_numpy_file(tiny_folder: Path, damaged: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.asarray([[5, 6, 7], [9, 10, 11]], np.int32))
    done = graphlens("drift", tiny_folder, damaged, "--tokens", tmp_path / "ids.npy", "--json", "--provider", "cpu")
    assert json.loads(done.stdout)["shape"] == [2, 3]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[[1, 2], []]", "a list for each prompt"),
        ('{"a": 1}', "a list for each prompt"),
        ("[[1, 2.5]]", "a list for each prompt"),
        ("[[1, 2", "cannot be read as token ids"),
    ],
)
def test_files_of_something_else_are_refused(
    tiny_folder: Path, damaged: Path, tmp_path: Path, content: str, what: str
) -> None:
    path = tmp_path / "ids.json"
    path.write_text(content)
    done = graphlens("drift", tiny_folder, damaged, "--tokens", path)
    assert done.returncode == 1
    assert what in sentence(done.stderr)


def test_other_files_of_something_else_are_refused(tiny_folder: Path, damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("5 6\nhello\n")
    np.save(tmp_path / "ids.npy", np.zeros((2, 3)))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    for name, what in (
        ("ids.txt", "'hello' is no line of token ids"),
        ("ids.npy", "holds float64 [2, 3]"),
        ("bad.npy", "cannot be read as token ids"),
        ("missing.txt", "no such file"),
    ):
        done = graphlens("drift", tiny_folder, damaged, "--tokens", tmp_path / name)
        assert done.returncode == 1
        assert what in sentence(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((), "give the texts to run, or --tokens"),
        ((PROMPT, "--tokens", "x.txt"), "one of both"),
        ((PROMPT, "--answer", " Mary"), "add --patch"),
        ((PROMPT, "--patch", "--wrong", " Mary"), "--wrong needs --answer"),
        ((PROMPT, "--patch", "--answer", " Mary John"), "token"),
        ((PROMPT, "--picture", "x.bmp"), "bmp"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tiny_folder: Path, damaged: Path, arguments: tuple[str, ...], what: str
) -> None:
    done = graphlens("drift", tiny_folder, damaged, *arguments, "--provider", "cpu")
    assert done.returncode == 1
    assert what in sentence(done.stderr)


def test_two_models_of_different_shape_are_refused(tiny_folder: Path) -> None:
    done = graphlens("drift", tiny_folder, package.embedded_model("tiny-llama"), "hi", "--provider", "cpu")
    assert done.returncode == 1
    assert "drift compares two versions of one model" in sentence(done.stderr)


def test_what_only_one_model_has_is_said(tiny_folder: Path, damaged: Path, tmp_path: Path) -> None:
    from graphlens import surgery

    model = surgery.load(damaged)
    manifest = surgery.read_manifest(model)
    fewer = {name: entry for name, entry in manifest.hooks.items() if not name.endswith("ln2.hook_scale")}
    from graphlens.surgery.graph import finish

    other = surgery.save(finish(model, manifest.with_hooks(fewer)), tmp_path / "fewer")
    done = graphlens("drift", tiny_folder, other, PROMPT, "--provider", "cpu")
    assert done.returncode == 0, done.stderr
    assert "FLOAT alone has blocks.0.ln2.hook_scale, blocks.1.ln2.hook_scale" in sentence(done.stderr)
    assert "blocks.1.hook_attn_out" in done.stdout
