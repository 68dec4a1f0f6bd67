"""The documentation's examples run, and its command lines exist."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
from typer.main import get_command

from graphlens.analysis.sites import GRIDS
from graphlens.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_examples_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write folders
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w])")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/start.md"], ids=lambda page: page.name)
def test_what_is_printed_is_what_the_comment_beside_it_says(page: Path) -> None:
    """A comment after a print tells its numbers, up to a colon, as far as they are written out."""
    namespace: dict[str, object] = {}
    told = 0
    for block in blocks(page, "python"):
        lines, printed = block.splitlines(), io.StringIO()
        for statement in ast.parse(block).body:
            printed.seek(0)
            printed.truncate()
            with contextlib.redirect_stdout(printed):
                exec(compile(ast.Module([statement], []), str(page), "exec"), namespace)
            last = lines[(statement.end_lineno or 1) - 1]
            if not last.startswith("print(") or "  # " not in last:
                continue
            claimed = NUMBER.findall(last.partition("  # ")[2].partition(":")[0])
            found = NUMBER.findall(printed.getvalue())[: len(claimed)]
            assert [f"{float(a):.{len(b.partition('.')[2])}f}" for a, b in zip(found, claimed, strict=True)] == claimed
            told += len(claimed)
    assert told >= 4


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


def command_lines() -> list[str]:
    """The lines that begin with a command, of pages and of the tutorials' words, without their comments."""
    tutorials = (path.read_text("utf-8") for path in sorted((ROOT / "docs/tutorials").glob("*.py")))
    words = ["\n".join(re.findall(r"^# ?(.*)$", text, re.M)) for text in tutorials]
    texts = [*(page.read_text("utf-8") for page in PAGES), *words]
    lines = "\n".join(re.sub(r"\\\n\s*", " ", text).replace(" && ", "\n") for text in texts)
    found = re.findall(r"^\s*(?:\$ )?(?:\S*/bin/)?graphlens ([a-z-]+.*)$", lines, re.M)
    return [line.partition(" #")[0] for line in found]


def test_every_option_and_site_in_a_command_line_exists() -> None:
    known, sites = get_command(app).commands, set()  # type: ignore[attr-defined]
    for line in command_lines():
        parameters = known[line.split()[0]].params
        options = {name for each in parameters for name in (*each.opts, *each.secondary_opts)}
        asked = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", line))
        assert asked <= options, line
        sites |= set(re.findall(r"--sites (\w+)", line))
    assert sites
    assert sites <= set(GRIDS), sites - set(GRIDS)
