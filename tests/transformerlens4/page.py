"""The table of docs/transformerlens4.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ALLOWED = 5e-5
BEGIN, END = "<!-- written by tests/transformerlens4: begin -->", "<!-- written by tests/transformerlens4: end -->"
# What is measured -> the head of its column.
COLUMNS = {
    "logits": "logits",
    "read": "read",
    "edited": "edited",
    "processed logits": "compat logits",
    "processed read": "compat read",
    "processed edited": "compat edited",
    "remote logits": "RemoteBridge logits",
    "remote read": "its captures",
    "remote edited": "its edits",
}
HEAD = f"| model | names | {' | '.join(COLUMNS.values())} |\n|---|---|{'---|' * len(COLUMNS)}"


def row(one: dict[str, Any]) -> str:
    """A line of the table."""
    if one.get("failed") is not None:
        return f"| {one['name']} | failed: {one['failed']} |"
    cells = [f"{one['worst'][what][0]:.1e}" if what in one["worst"] else "-" for what in COLUMNS]
    return f"| {one['name']} | {one['names']} | {' | '.join(cells)} |"


def page(text: str, found: Sequence[dict[str, Any]], versions: str) -> str:
    """A page with the table between its marks.

    Args:
        text: The page as it is.
        found: What was measured.
        versions: With what.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    notes = [f"- {one['name']}: {'; '.join(one['notes'])}." for one in found if one.get("notes")]
    if notes:
        notes = ["Where TransformerLens 4 has something else, which the figures leave out:", "", *notes, ""]
    lines = [BEGIN, "", f"Measured with {versions}.", "", HEAD, *map(row, found), "", *notes, END]
    return before + "\n".join(lines) + after
