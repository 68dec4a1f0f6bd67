"""The documentation's examples run, and its command lines exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from graphlens.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_examples_of_a_page_run_in_order(page: Path) -> None:
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_the_readme_shows_something_that_runs() -> None:
    assert len(blocks(ROOT / "README.md", "python")) >= 2
    assert len(blocks(ROOT / "README.md", "bash")) == 2


def test_every_command_line_in_the_pages_is_a_command() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = {
        word for page in PAGES for word in re.findall(r"(?:^|`)graphlens ([a-z-]+)", page.read_text("utf-8"), re.M)
    }
    assert named
    assert named <= known, named - known
