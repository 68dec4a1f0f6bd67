"""graphlens.transformer_lens hands names on and does nothing else; what it hands on lies in other folders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import graphlens
from tools.house import LAYOUT

ROOT = Path(graphlens.__file__).resolve().parent / LAYOUT


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_of_the_layout_only_hands_names_on(path: Path) -> None:
    """Imports by full names, a second name for a module, and what refuses the names that are not there."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        handed_on = isinstance(node, ast.ImportFrom) and not node.level
        assert handed_on or (isinstance(node, ast.Assign) and not isinstance(node.value, ast.Lambda)), ast.unparse(node)
    assert "__getattr__ = refusing(__name__)" in path.read_text(encoding="utf-8")
