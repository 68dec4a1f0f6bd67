"""Writes the tables of docs/operators.md: ``python tools/operators_table.py``, or ``--check`` to be told that they are stale.

They are made of the table of rules that write fused operators out, and of what is said of those that have none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from graphlens.surgery.unfuse import expand, opsets, unknown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operators.md"
BEGIN, END = "<!-- written by tools/operators_table.py: begin -->", "<!-- written by tools/operators_table.py: end -->"


def page() -> str:
    """docs/operators.md with its tables as they have to be."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} lacks the lines {BEGIN!r} and {END!r} that the tables go between.")
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
    return before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + after


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or with ``--check`` compares it. Returns the exit code: 1 for a stale page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    wanted = page()
    if parser.parse_args(arguments).check:
        if PAGE.read_text(encoding="utf-8") != wanted:
            print(f"{PAGE.name} is stale: run python tools/operators_table.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
