"""A few of the hostile cases. All of CI's: ``python -m tests.hostile``; all there are: ``python -m tests.hostile --all``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and watches are Linux's")


def hostile(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Plays in a process of its own, which forks: one with pytest's threads and sessions must not."""
    command = [sys.executable, "-m", "tests.hostile", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_kind_of_fault_is_noticed() -> None:
    ran = hostile("--itself")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_few_hostile_files_and_specs_come_to_no_fault(tmp_path: Path) -> None:
    ran = hostile("--few", "60", "--keep", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
