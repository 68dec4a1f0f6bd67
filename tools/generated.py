"""Pages that programs here write, in whole or between two comments: written, or told to be stale with ``--check``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def with_part(page: Path, program: str, lines: Iterable[str]) -> str:
    """A page with other lines between the two comments that say who writes them.

    Args:
        page: The page.
        program: The program's path, as the comments have it: "tools/house.py".
        lines: The lines.

    Raises:
        ValueError: The page lacks one of the comments.
    """
    first, last = (f"<!-- written by {program}: {end} -->" for end in ("begin", "end"))
    before, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{page.name} lacks the lines {first!r} and {last!r}, between which {program} writes.")
    return "\n".join([before + begin, "", *lines, "", end + after])


def write_or_check(
    page: Path, wanted: Callable[[], str], command: str, does: str | None, arguments: Sequence[str] | None = None
) -> int:
    """Writes a page, or compares it where ``--check`` is asked for.

    Args:
        page: The page.
        wanted: Gives it as it has to be.
        command: What writes it: "python -m tools.house".
        does: The program's docstring.
        arguments: Those of the command line.

    Returns:
        The exit code: 1 for a stale page.
    """
    parser = argparse.ArgumentParser(description=(does or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    check, text = parser.parse_args(arguments).check, wanted()
    if not check:
        page.write_text(text, encoding="utf-8")
    elif page.read_text(encoding="utf-8") != text:
        print(f"{page.name} is stale: run {command}", file=sys.stderr)
        return 1
    return 0
