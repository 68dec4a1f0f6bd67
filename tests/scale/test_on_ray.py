"""Harvests and sweeps on a local Ray: the bytes of a single process, whatever happens to workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from graphlens import HookedTransformer, harvest
from graphlens.errors import InputError, RuntimeUnavailable
from graphlens.experiments import on_ray


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


def test_another_machine_is_refused_unless_it_is_allowed(facts: dict[str, Any]) -> None:
    assert facts["other"].startswith("InputError: a worker's machine is not like")
    assert "onnxruntime" in facts["other"]
    assert "not 0.9" in facts["other"]
    assert facts["mixed"] == "no error"


def test_what_a_job_raises_comes_back_as_it_is(facts: dict[str, Any]) -> None:
    assert facts["too large"].startswith("InputError: blocks.0.hook_resid_pre holds")


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
