"""Scripts written for TransformerLens give the same numbers with graphlens in its place, without an edit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_cache import embedded_model_as_gpt2

HERE = Path(__file__).parent
SCRIPTS = sorted((HERE / "played").glob("*.py"))
# Of the largest value in a result. Both compute in float32, in another order; what a script divides by is never small.
TOLERANCE = 2e-5
LIBRARIES = ("transformer_lens", "graphlens")

Played = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Played]:
    """What each script left in each library; both play at once."""
    room = tmp_path_factory.mktemp("scripts")
    embedded_model_as_gpt2(room / "hub")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(room / "hub"),
        "GRAPHLENS_CACHE": str(room / "cache"),
        "PYTHONPATH": str(HERE.parents[1]),
    }
    runs = {
        library: subprocess.Popen(
            [sys.executable, "-m", "tests.scripts.play", library, room / f"{library}.json", *SCRIPTS],
            cwd=room,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for library in LIBRARIES
    }
    for run in runs.values():
        _, said = run.communicate(timeout=900)
        assert run.returncode == 0, said[-3000:]
    return {library: json.loads((room / f"{library}.json").read_text()) for library in LIBRARIES}


def differences(ours: Any, theirs: Any, place: str) -> list[str]:
    """Where two results differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict) and "values" in theirs:
        if ours["shape"] != theirs["shape"] or ours["kind"] != theirs["kind"]:
            return [f"{place}: {ours['kind']}{ours['shape']}, there {theirs['kind']}{theirs['shape']}"]
        mine, other = np.array(ours["values"]), np.array(theirs["values"])
        if theirs["kind"] not in "fc":
            return [] if np.array_equal(mine, other) else [f"{place}: {mine}, there {other}"]
        finite = np.isfinite(other)
        if not np.array_equal(mine[~finite], other[~finite], equal_nan=True):
            return [f"{place}: other infinities"]
        off = np.abs(mine - other)[finite].max(initial=0) / max(1.0, np.abs(other[finite]).max(initial=0))
        return [] if off <= TOLERANCE else [f"{place}: {off:.1e} off"]
    if isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            return [f"{place}: {ours}, there {theirs}"]
        pairs = zip(ours, theirs, strict=True)
        return [
            said for index, (one, other) in enumerate(pairs) for said in differences(one, other, f"{place}[{index}]")
        ]
    if isinstance(theirs, float) and isinstance(ours, float):
        return [] if abs(ours - theirs) <= TOLERANCE * max(1.0, abs(theirs)) else [f"{place}: {ours}, there {theirs}"]
    return [] if ours == theirs and type(ours) is type(theirs) else [f"{place}: {ours!r}, there {theirs!r}"]


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_a_script_gives_the_same_numbers(script: str, played: dict[str, Played]) -> None:
    theirs, ours = played["transformer_lens"][script], played["graphlens"][script]
    assert "error" not in theirs, f"the script is wrong: {theirs['error']}"
    assert "error" not in ours, ours["error"]
    assert theirs["results"].keys() == ours["results"].keys()
    assert len(theirs["results"]) >= 9
    found = [
        said for name in theirs["results"] for said in differences(ours["results"][name], theirs["results"][name], name)
    ]
    assert not found, "\n".join(found)
