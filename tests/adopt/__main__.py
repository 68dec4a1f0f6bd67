"""The matrix of foreign files: ``python -m tests.adopt --all --table docs/adopted-files.md``.

Without ``--all`` only the cells that are named (``llama.optimum-past.int8``). ``--work`` keeps files and cells from run to run.
optimum-onnx is run by the Python that GRAPHLENS_OPTIMUM_PYTHON names; without one its cells say so.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tests.adopt.adopt_files import ROUTES, Files
from tests.adopt.cells import Cell, measure, save_cell, saved_cells


def _cells(asked: list[str], everything: bool) -> Iterator[tuple[str, str]]:
    """(family, kind of file) of what was asked for, family by family."""
    if everything:
        families = dict.fromkeys(family for route in ROUTES.values() for family in route.families)
        yield from ((family, name) for family in families for name, route in ROUTES.items() if family in route.families)
    for each in asked:
        family, _, route = each.partition(".")
        yield family, route


def line(cell: Cell, seconds: float) -> str:
    """What a cell found, for a reader who waits."""
    if cell.absent:
        return f"{cell.family}.{cell.route}: no file: {cell.absent[:150]}"
    found = f"{cell.hooks}/{cell.wanted} hook points, {cell.identities} identities {cell.identity:.0e}, {cell.weights} weights"
    found += f", worst {cell.worst:.0e} at {cell.where}" if cell.where else ""
    found += f", {cell.edits} edits {cell.edit:.0e}" if cell.edits else ""
    failed = "".join(f"\n    {failure}" for failure in cell.failures[:6])
    more = f"\n    ... {len(cell.failures) - 6} more" if len(cell.failures) > 6 else ""
    return f"{cell.family}.{cell.route}: {found} ({cell.seconds:.1f} s of {seconds:.0f}){failed}{more}"


def published(work: Path) -> str:
    """What was found in files that others published, as the end of the page."""
    from tests.adopt.real import report

    try:
        lines = report(work)
    except subprocess.CalledProcessError as error:
        lines = [f"Not run: the package registry gave no {error.cmd[-1]}."]
    return "\n".join(["", "## Files that others published", "", *lines, ""])


def others(work: Path) -> str:
    """What was found in files of families that are not in the matrix, as another part of the page."""
    from tests.adopt.other_families import section

    with tempfile.TemporaryDirectory(dir=work) as made:
        return "\n".join(["", "## Other families", "", *section(Path(made)), ""])


def _rest(work: Path) -> str:
    return others(work) + published(work) + how_to(work)


def how_to(work: Path) -> str:
    """What came of docs/adopting.md with optimum itself, as another part of the page."""
    from tests.adopt.how_to_by_optimum import NoOptimum, play_all

    try:
        with tempfile.TemporaryDirectory(dir=work) as made:
            said = f"Every line of [adopting.md](adopting.md) was run: {play_all(Path(made))}."
    except NoOptimum as error:
        said = f"Not run: {error}."
    return "\n".join(["", "## The how-to, with optimum", "", said, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.adopt", description=__doc__)
    parser.add_argument("cells", nargs="*", metavar="FAMILY.KIND")
    parser.add_argument("--all", action="store_true", help="every kind of file of every family")
    parser.add_argument("--every-edit", action="store_true", help="edit every hook point, not those of a block alone")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="write the page of all cells that the work folder has"
    )
    parser.add_argument("--work", type=Path, help="a folder to keep files and cells in, and take them from")
    parser.add_argument("--again", action="store_true", help="measure also what the work folder has a right cell of")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    failures = 0
    with tempfile.TemporaryDirectory() as made:
        files = Files((asked.work or Path(made)).resolve())
        kept = files.root / "cells"
        right = {(cell.family, cell.route) for cell in saved_cells(kept) if cell.right and not cell.absent}
        for family, route in _cells(asked.cells, asked.all):
            if asked.all and not asked.again and (family, route) in right:
                continue
            began = time.perf_counter()
            cell = measure(files, family, route, asked.every_edit)
            save_cell(cell, kept)
            failures += not cell.right
            print(line(cell, time.perf_counter() - began), flush=True)
        if asked.table:
            from tests.adopt.adopt_page import page

            # The page names files, not where they lay on the machine that made it.
            written = page(saved_cells(kept)) + (_rest(files.root) if asked.all else "")
            asked.table.write_text(written.replace(f"{files.root}/files/", ""), "utf-8")
    print(f"{failures} cells failed." if failures else "No failure.")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
