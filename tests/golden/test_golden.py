"""What every released version wrote opens, and gives the numbers that transformers gave when it was written."""

from __future__ import annotations

import json
import shutil
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from graphlens import HookedTransformer, interventions, surgery
from graphlens.analysis.result import SweepResult
from graphlens.errors import InputError, ModelFileError
from graphlens.experiments.act_patch import act_patch_sites
from graphlens.metrics import LogitDiff
from graphlens.patching import sweep
from tests import closeness
from tests.golden.make import formats

HERE = Path(__file__).parent
RELEASES = sorted(path.name for path in HERE.iterdir() if (path / "made.json").is_file())
close = partial(closeness.close, tolerance=2e-5)  # float32, by other sums in another order

release = pytest.mark.parametrize("name", RELEASES)


@cache
def opened(name: str) -> HookedTransformer:
    return HookedTransformer.from_onnx(HERE / name / "model", "cpu")


@cache
def expected(name: str) -> dict[str, np.ndarray]:
    return load_file(HERE / name / "expected.safetensors")


def made(name: str) -> dict[str, int | str]:
    found: dict[str, int | str] = json.loads((HERE / name / "made.json").read_text())
    return found


def test_the_formats_of_this_version_have_golden_files() -> None:
    assert formats() in RELEASES, "run python tests/golden/make.py, and commit what it wrote"


@release
def test_a_folder_opens_and_gives_the_numbers_of_transformers(name: str) -> None:
    right = expected(name)
    logits, cache = opened(name).run_with_cache(right["tokens"])
    close(logits, right["logits"])
    kept = [key for key in right if key.startswith("cache/")]
    assert len(kept) == 2 * opened(name).cfg.n_layers
    for key in kept:
        close(cache[key.removeprefix("cache/")], right[key])


@pytest.mark.parametrize("name", [name for name in RELEASES if int(name.partition("-")[0]) >= 5])
def test_the_sae_inside_has_the_features_that_torch_gave(name: str) -> None:
    right = expected(name)
    kept = [key for key in right if key.startswith("features/")]
    assert kept
    _, cache = opened(name).run_with_cache(right["tokens"])
    for key in kept:
        close(cache[key.removeprefix("features/")], right[key])


@release
def test_a_text_has_the_tokens_that_it_had(name: str) -> None:
    np.testing.assert_array_equal(opened(name).to_tokens(str(made(name)["prompt"])), expected(name)["prompt"])


@release
def test_a_folder_passes_every_check(name: str) -> None:
    adopted = surgery.read_manifest(surgery.load(HERE / name / "model")).adopted is not None
    weights = "adopted.safetensors" if adopted else "model.safetensors"
    saes = sorted(path.name for path in (HERE / name / "model").glob("sae-*.safetensors"))
    assert surgery.check(HERE / name / "model").external_files == (weights, *saes)


@release
def test_a_folder_that_is_written_again_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    surgery.save(surgery.load(HERE / name / "model"), tmp_path / "again")
    close(HookedTransformer.from_onnx(tmp_path / "again", "cpu")(expected(name)["tokens"]), expected(name)["logits"])


@release
def test_an_edits_file_loads_and_gives_what_torch_hooks_gave(name: str) -> None:
    edits = interventions.load(HERE / name / "edits.json")
    assert {edit.kind for edit in edits} >= {"ablate", "patch", "steer", "scale"}
    close(opened(name).run_with_interventions(expected(name)["tokens"], edits), expected(name)["edited"])


@release
def test_a_saved_sweep_loads_with_the_values_that_torch_gave(name: str) -> None:
    found, right, said = SweepResult.load(HERE / name / "sweep.json"), expected(name), made(name)
    assert found.axes == ("layer", "pos")
    close(found.values, right["swept"])
    assert found.baselines["corrupted"] == pytest.approx(right["baselines"][1], rel=1e-4)
    assert found.baselines["clean"] in (None, pytest.approx(right["baselines"][0], rel=1e-4))
    model = opened(name)
    _, cache = model.run_with_cache(right["clean"])
    sites, metric = act_patch_sites(model, right["corrupted"], "resid_pre"), LogitDiff(said["answer"], said["wrong"])
    again = sweep(model, right["corrupted"], sites, cache, metric, verbose=False)
    close(again.values, right["swept"])
    assert {axis: list(labels) for axis, labels in again.labels.items()} == {
        axis: list(labels) for axis, labels in found.labels.items()
    }


# Of newer versions


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """A copy of this version's golden files."""
    return Path(shutil.copytree(HERE / formats(), tmp_path / "golden"))


def test_a_newer_folder_is_refused_with_the_version_that_reads_it(newest: Path) -> None:
    path = newest / "model" / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    (entry,) = (entry for entry in proto.metadata_props if entry.key == "graphlens")
    manifest = json.loads(entry.value)
    newer = manifest["format_version"] + 1
    exporter = {**manifest["exporter"], "graphlens": "7.8.9"}
    # What else a newer manifest holds, and how, is not known here: the number is read before all of it.
    entry.value = json.dumps({"format_version": newer, "exporter": exporter, "config": 7})
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match=rf"format {newer}\b.*reads up to {newer - 1}\b") as caught:
        HookedTransformer.from_onnx(newest / "model", "cpu")
    assert "7.8.9" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("file", "load"), [("edits.json", interventions.load), ("sweep.json", SweepResult.load)])
def test_a_newer_edits_file_or_sweep_is_refused_with_what_is_read(file: str, load: object, newest: Path) -> None:
    path = newest / file
    record = json.loads(path.read_text())
    newer = record["version"] + 1
    path.write_text(json.dumps({"format": record["format"], "version": newer, "interventions": {"new": "shape"}}))
    with pytest.raises(InputError, match=rf"version {newer}\b.*reads up to {newer - 1}\b.*[Uu]pdate") as caught:
        load(path)  # type: ignore[operator]
    assert str(path) in str(caught.value)


@release
def test_what_is_saved_of_any_release_is_sealed_and_says_so(name: str, tmp_path: Path) -> None:
    surgery.save(surgery.load(HERE / name / "model"), tmp_path)
    assert "its seal fits" in HookedTransformer.from_onnx(tmp_path, "cpu").checked
    assert surgery.read_manifest(surgery.load(tmp_path)).format_version >= 2
