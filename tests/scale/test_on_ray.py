"""Harvests and sweeps on a local Ray: the bytes of a single process, whatever happens to workers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphlens import HookedTransformer, harvest
from graphlens.errors import InputError, ModelFileError, RuntimeUnavailable
from graphlens.experiments import on_ray
from graphlens.experiments.harvest_shard import shard_elsewhere


def facts_of(kind: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.scale.ray_facts", kind],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "RAY_DEDUP_LOGS": "0"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return {**facts_of("local"), **facts_of("ray")}


@pytest.mark.parametrize("which", ["1 workers", "2 workers", "after a kill", "resumed"])
def test_any_number_of_workers_gives_the_bytes_of_one_process(facts: dict[str, Any], which: str) -> None:
    assert facts[which] == facts["local"]


def test_a_worker_was_killed_and_shards_were_missing(facts: dict[str, Any]) -> None:
    assert len(facts["killed"]) == 1
    assert len(facts["without half"]) > 5
    assert all("shard-" in sentence for sentence in facts["without half"])


def test_a_sweep_over_pairs_gives_the_values_of_one_process(facts: dict[str, Any]) -> None:
    assert facts["sweep apart"] == 0
    assert facts["sweep scale"] > 0.1


def test_estimates_over_pairs_are_those_of_one_process(facts: dict[str, Any]) -> None:
    assert facts["estimates apart"] == 0
    assert facts["estimates scale"] > 0.1


def test_a_drift_over_prompts_has_the_figures_of_one_process(facts: dict[str, Any]) -> None:
    assert facts["drift equal"]
    assert facts["drift"] > 1e-4
    assert facts["drift hooked"].startswith("InputError: a Python hook is active")


def test_a_worker_without_the_model_names_its_node_and_the_path(facts: dict[str, Any]) -> None:
    assert facts["elsewhere"].startswith(f"ModelFileError: node {platform.node()} cannot open the model: ")
    assert "model-here" in facts["elsewhere"]
    assert "under which every machine must have the same files" in facts["elsewhere"]


def test_ray_data_has_the_tokens_of_the_harvest(facts: dict[str, Any]) -> None:
    assert facts["ray data"]
    assert facts["ray tokens"]
    assert facts["ray count"][0] == facts["ray count"][1] > 100
    assert facts["ray columns"] == ["blocks.1.attn.hook_z", "tokens"]


def test_a_node_without_the_harvests_folder_is_named(tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained("tiny-gpt2")
    with pytest.raises(ModelFileError, match=f"node {platform.node()} does not see the harvest: .*nowhere"):
        shard_elsewhere(model, (str(tmp_path / "nowhere"), 0, "0" * 64))
    out = tmp_path / "h"
    harvest(model, ["a text"], "*resid_post", out, verbose=False)
    with pytest.raises(ModelFileError, match=f"node {platform.node()} sees another harvest at "):
        shard_elsewhere(model, (str(out), 0, "0" * 64))


def test_another_machine_is_refused_unless_it_is_allowed(facts: dict[str, Any]) -> None:
    assert facts["other"].startswith("InputError: a worker's machine is not like")
    assert "onnxruntime" in facts["other"]
    assert "not 0.9" in facts["other"]
    assert facts["mixed"] == "no error"


def test_what_a_job_raises_comes_back_as_it_is(facts: dict[str, Any]) -> None:
    assert facts["too large"].startswith("InputError: blocks.0.hook_resid_pre holds")


def test_a_job_that_fails_in_a_worker_is_named_and_ends(facts: dict[str, Any]) -> None:
    assert facts["divides"] == "RunError: Ray could not finish: ZeroDivisionError: division by zero"
    assert facts["unopenable"] == "RuntimeUnavailable: there is no such provider here"
    assert "one piece of the work ended 2 workers" in facts["dies"]


def test_what_is_active_is_refused(facts: dict[str, Any]) -> None:
    assert facts["hooked"].startswith("InputError: a Python hook is active")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = HookedTransformer.from_pretrained("tiny-gpt2")
    monkeypatch.setattr(on_ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailable, match=r"graphlens-onnx\[ray\]"):
        harvest(model, ["a text"], "*resid_post", tmp_path / "out", engine="ray")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "spark"}, "engine='spark'"),
        ({"engine": "ray", "workers": 0}, "workers"),
        ({"engine": "ray", "threads": 0}, "threads"),
        ({"engine": "ray", "allow_mixed": 2}, "allow_mixed"),
    ],
)
def test_numbers_of_workers_are_checked(options: dict[str, Any], said: str, tmp_path: Any) -> None:
    model = HookedTransformer.from_pretrained("tiny-gpt2")
    with pytest.raises(InputError, match=said):
        harvest(model, ["a text"], "*resid_post", tmp_path / "out", **options)
