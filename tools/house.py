"""Writes CONTRIBUTING.md's plan of the package: ``python -m tools.house``, or ``--check`` to be told that it is stale.

The plan is made of the first docstring line of each folder's ``__init__.py``, and of HOUSE: which folder may import which
others. ``tests/core/test_imports.py`` holds every import to the same HOUSE.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from tools.generated import with_part, write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"

# Folder -> the other folders that it may import. All may import the errors.
HOUSE: dict[str, tuple[str, ...]] = {
    "views": ("file",),  # pages are written as every other file is: whole or not at all
    "file": (),
    "runtime": (),
    "edits": ("file",),
    "export": ("file",),
    "surgery": ("file", "edits"),
    "analysis": ("file", "edits", "views"),
    "engine": ("file", "edits", "surgery", "runtime", "views"),
    "pipelines": ("views", "file", "edits", "export", "surgery", "runtime", "analysis", "engine"),
    "model": ("file", "edits", "engine", "runtime", "analysis", "pipelines", "views"),
    "experiments": ("file", "edits", "engine", "analysis", "model", "views"),
}
HOUSE["lens"] = tuple(HOUSE)  # objects of TransformerLens that are code: everything but the terminal
HOUSE["cli"] = tuple(HOUSE)  # the terminal uses everything
# A folder of re-exports: TransformerLens's module layout, over names of the folders and the doors.
LAYOUT = "transformer_lens"
# The modules beside the folders that define nothing: they hand on names of the folders. The errors are there too.
DOORS = (
    *("__init__", "__main__", "attribution", "deploy", "interventions", "metrics", "patching", "torch"),
    *("transformer_lens4", "utils"),
)


def floors() -> list[list[str]]:
    """The folders by floor, the lowest first: a folder lies one floor above the highest one that it may import."""
    heights: dict[str, int] = {}
    while len(heights) < len(HOUSE):
        ready = {
            folder: 1 + max((heights[other] for other in others), default=-1)
            for folder, others in HOUSE.items()
            if folder not in heights and heights.keys() >= set(others)
        }
        if not ready:
            raise ValueError(f"these folders import one another: {', '.join(HOUSE.keys() - heights.keys())}.")
        heights |= ready
    return [[folder for folder in HOUSE if heights[folder] == floor] for floor in range(max(heights.values()) + 1)]


def said_of(folder: str) -> str:
    """The first line of a folder's docstring."""
    tree = ast.parse((ROOT / "graphlens" / folder / "__init__.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def diagram() -> list[str]:
    """The floors as lines of text, the highest first."""
    doors = ", ".join([*(door for door in DOORS if not door.startswith("__")), f"{LAYOUT}/"])
    rows = [
        ("roof", f"the doors: graphlens itself, and in it {doors}"),
        *((str(number), "   ".join(folders)) for number, folders in reversed(list(enumerate(floors(), 1)))),
        ("ground", "errors"),
    ]
    return ["```text", *(f"{name:>6}  {shown}" for name, shown in rows), "```"]


def table() -> list[str]:
    """The folders as the lines of a Markdown table, the lowest floor first."""
    rows = ["| folder | what it holds | it may import |", "|---|---|---|"]
    for folder in (folder for floor in floors() for folder in floor):
        others = HOUSE[folder]
        allowed = "every other folder" if len(others) == len(HOUSE) - 1 else ", ".join(others) or "no other folder"
        rows.append(f"| `graphlens/{folder}/` | {said_of(folder)} | {allowed} |")
    return rows


def page() -> str:
    """CONTRIBUTING.md with the plan as it has to be."""
    return with_part(PAGE, "tools/house.py", [*diagram(), "", *table()])


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with ``--check`` compares it. Returns the exit code: 1 for a stale page."""
    return write_or_check(PAGE, page, "python -m tools.house", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
