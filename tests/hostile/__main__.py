"""Plays hostile files and specs against the library: ``python -m tests.hostile`` (CI's size), ``--all``, ``--case ID``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# Before NumPy: a process that forks has no threads that its children would miss.
os.environ |= {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    """Plays what the arguments ask for; 1 if anything came to a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--all", action="store_true", help="all files on all routes, and many more specs")
    parser.add_argument("--few", type=int, metavar="N", help="every N-th case of CI's, for a first look")
    parser.add_argument("--case", metavar="ID", help="one case, again; what it left is kept")
    parser.add_argument("--group", metavar="TEXT", help="only cases whose names hold this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where what failed is kept; default: a new folder")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write docs/hostile.md, or another file")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and play none")
    parser.add_argument(
        "--itself", action="store_true", help="see that each kind of fault is noticed, and play no case"
    )
    asked = parser.parse_args()

    from tests.hostile import table
    from tests.hostile.children import play_all
    from tests.hostile.warm import chosen_cases, warmed

    if asked.itself:
        from tests.hostile.itself import check

        return check(asked.jobs)
    keep = asked.keep or Path(tempfile.mkdtemp(prefix="graphlens-hostile-"))
    keep.mkdir(parents=True, exist_ok=True)
    cases = chosen_cases(bool(asked.all), asked.case, asked.group, asked.few or 1)
    if asked.list:
        print(*(case.id for case in cases), sep="\n")
        return 0
    if not cases:
        print(f"no case is called {asked.case or asked.group!r}; --list names them all (with --all, those of --all)")
        return 2
    started = time.monotonic()
    print(f"{len(cases):,} cases; seeds are in their names; what fails is kept in {keep}", flush=True)
    found = table.Table()
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        warmed()
        for case, verdict in play_all(cases, warmed().base, Path(scratch), asked.jobs, keep):
            found.add(case, verdict)
            if not verdict.good or asked.case:
                print(f"{verdict.outcome}: {case.id}\n    {table.one_line(verdict.detail)}", flush=True)
    seconds = time.monotonic() - started
    print(found.text(seconds))
    if asked.table:
        asked.table.write_text(found.page(seconds, bool(asked.all)))
    if found.faults:
        print(f"{found.faults} faults. One again: python -m tests.hostile --case {found.first}; its files: {keep}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
