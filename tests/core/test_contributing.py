"""The pages name files and functions that exist, and CONTRIBUTING's plan of the package is the one there is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import house

ROOT = house.ROOT
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TOP = ("docs/", "tests/", "tools/", "models/", "graphlens/", ".ci/")
WORD = re.compile(r"[\w.*/:-]+")
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")


def paths(text: str) -> Iterator[str]:
    """The paths that a text names, from the repository's root: what ends in .py, and what begins with a top folder.

    A path may hold ``*``. What follows ``::`` is a name in the file.
    """
    for word in WORD.findall(text):
        path = word.partition("::")[0].rstrip(".:")
        if "://" not in word and (path.endswith(".py") or path.startswith(TOP)):
            yield path


def places(text: str) -> set[tuple[str, str]]:
    """The (file, name) pairs that a text names as ``file.py::name``."""
    return set(re.findall(r"([\w./-]+\.py)::([\w.]+\w)", text))


def names_in(path: Path) -> set[str]:
    """Every function, class and assigned name of a module, and its classes' as ``Class.name``."""

    def of(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from of(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(of(ast.parse(path.read_text(encoding="utf-8")).body))


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links to them."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.*)$", outside, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> list[str]:
    """The links of a page to a file, or to a heading of a page, that is not there."""
    dead = []
    for link in (target for target in LINK.findall(text) if "://" not in target):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        there = target.exists() and (not heading or heading in anchors(target.read_text(encoding="utf-8")))
        dead += [] if there else [link]
    return dead


def test_the_plan_of_the_package_is_not_stale() -> None:
    assert house.main(["--check"]) == 0, "run python -m tools.house"


def test_a_stale_plan_is_told_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = house.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "CONTRIBUTING.md"
    page.write_text(good.replace("| `graphlens/model/` |", "| `graphlens/models/` |"), encoding="utf-8")
    monkeypatch.setattr(house, "PAGE", page)
    assert house.main(["--check"]) == 1
    assert "python -m tools.house" in capsys.readouterr().err
    assert house.main([]) == 0
    assert page.read_text(encoding="utf-8") == good
    page.write_text("# A page without the two lines", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the lines"):
        house.page()


def test_a_folder_lies_above_all_that_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    height = {folder: number for number, floor in enumerate(house.floors()) for folder in floor}
    assert height.keys() == house.HOUSE.keys()
    assert all(height[other] < height[folder] for folder, others in house.HOUSE.items() for other in others)
    monkeypatch.setitem(house.HOUSE, "file", ("cli",))
    with pytest.raises(ValueError, match="import one another"):
        house.floors()


def test_every_folder_says_in_one_line_what_it_holds() -> None:
    for folder in house.HOUSE:
        assert re.fullmatch(r"[A-Z].{20,}\.", house.said_of(folder)), folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_and_link_of_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    written = LINK.sub("]", text)  # links are relative to the page, and the next line's
    assert [path for path in paths(written) if not any(ROOT.glob(path.rstrip("/")))] == []
    assert dead_links(page, text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_place_that_a_page_names_exists(page: Path) -> None:
    found = places(page.read_text(encoding="utf-8"))
    assert [f"{file}::{name}" for file, name in sorted(found) if name not in names_in(ROOT / file)] == []


def test_a_dead_link_is_found() -> None:
    text = "[a](README.md), [b](README.md#two-commands), [c](https://example.org/x#y), [d](#rules), ![e](gone.png)"
    text += ", [f](README.md#three-commands), [g](docs/adr/0001.md), [h](#ruless)"
    assert dead_links(house.PAGE, text) == ["gone.png", "README.md#three-commands", "docs/adr/0001.md", "#ruless"]


def test_contributing_names_the_places_of_a_run() -> None:
    found = {name for _, name in places(house.PAGE.read_text(encoding="utf-8"))}
    run = {"HookedTransformer.run_with_cache", "run_forward", "Runner.request", "Runner.run", "Engine.run"}
    assert run | {"name_hook_points", "Plan", "Family", "Intervention", "rule", "Border"} <= found


def test_paths_and_places_are_found_however_they_are_written() -> None:
    text = "See `docs/adr/`, (tests/core/test_docs.py), graphlens/engine/plan.py::Plan.result. And `tools/*.py`: x.py, y/z.py."
    assert list(paths(text)) == [
        "docs/adr/", "tests/core/test_docs.py", "graphlens/engine/plan.py", "tools/*.py", "x.py", "y/z.py",
    ]  # fmt: skip
    assert places(text) == {("graphlens/engine/plan.py", "Plan.result")}
    assert list(paths("https://example.org/docs/a.py and graphlens.surgery, engine.run")) == []
    assert {"ROOT", "places", "WORD"} <= names_in(Path(__file__))
    assert {"Plan", "Plan.result", "Plan.flags"} <= names_in(ROOT / "graphlens/engine/plan.py")
