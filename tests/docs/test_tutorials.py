"""The tutorials run as the Python files that they are; ``python -m tools.site`` runs all of them as notebooks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docs/tutorials").glob("*.py"))
# These need packages of the extra docs, or Node and Chromium: the site's build has them, and runs them.
ONLY_IN_THE_SITE = {"4_node_and_browser", "5_from_transformerlens", "6_from_nnsight"}
RUN = [path for path in FILES if path.stem not in ONLY_IN_THE_SITE]


def test_there_are_tutorials() -> None:
    assert {path.stem for path in FILES} > ONLY_IN_THE_SITE
    assert len(RUN) >= 4


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_its_numbers_are_what_it_says(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRAPHLENS_CACHE": str(tmp_path / "cache")}
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, str(path)], cwd=work, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tutorial_asserts_what_it_tells(path: Path) -> None:
    """Every tutorial checks numbers, begins with a heading, and links on."""
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"^(?:assert|np\.testing\.assert|close\()", text, re.M)) >= 5
    assert re.search(r"^# %% \[markdown\]\n# # \S", text, re.M)
    assert re.search(r"^# .*\]\([\w./#-]+\.(?:md|py)(?:#[\w-]+)?\)", text, re.M)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tutorials_links_lead_somewhere(path: Path) -> None:
    words = "\n".join(re.findall(r"^# (.*)$", path.read_text(encoding="utf-8"), re.M))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", words) if "://" not in link]
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []
