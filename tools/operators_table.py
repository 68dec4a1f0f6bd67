"""Writes the tables of docs/operators.md: ``python -m tools.operators_table``, or ``--check`` to be told that they are stale.

They are made of the table of rules that write fused operators out, and of what is said of those that have none.
"""

from __future__ import annotations

import sys
from pathlib import Path

from graphlens.surgery.unfusing import expand, opsets, unknown
from tools.generated import with_part, write_or_check

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operators.md"


def page() -> str:
    """docs/operators.md with its tables as they have to be."""
    rows = ["| operator | what of it is written out | compared with |", "|---|---|---|"]
    rows += [f"| `{rule.operator}` | {rule.variants} | {rule.checked} |" for rule in expand.table()]
    kept = ["| operator | why it stays |", "|---|---|"]
    kept += [f"| `{name}` | {why} |" for name, why in sorted(unknown.KEPT.items())]
    raised = ", ".join(f"`{name}`" for name in opsets.rewritten())
    lines = [
        *rows,
        "",
        "Operators that stay as they are:",
        "",
        *kept,
        "",
        f"Operators of opsets 7 to 19 that are rewritten: {raised}.",
    ]
    return with_part(PAGE, "tools/operators_table.py", lines)


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with ``--check`` compares it. Returns the exit code: 1 for a stale page."""
    return write_or_check(PAGE, page, "python -m tools.operators_table", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
