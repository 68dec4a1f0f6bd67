"""Scripts of TransformerLens's kind give the same numbers on graphlens, without an edit: tests/scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "run"))
def test_a_script_gives_the_same_numbers_on_both(script: str, tmp_path: Path) -> None:
    found = {}
    for library in ("theirs", "ours"):
        numbers = tmp_path / f"{library}.npz"
        command = [sys.executable, str(SCRIPTS / "run.py"), library, str(SCRIPTS / f"{script}.py"), str(numbers)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{library}: {done.stderr[-3000:]}"
        found[library] = dict(np.load(numbers))
    assert found["ours"].keys() == found["theirs"].keys()
    assert len(found["ours"]) > 10
    for name, theirs in found["theirs"].items():
        ours = found["ours"][name]
        assert ours.shape == theirs.shape, name
        if theirs.dtype.kind == "f":
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * max(1, np.abs(theirs).max()), err_msg=name)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
