"""``python -m tests.faults --all``: every job killed before every event, a line of the table for each."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from tests.faults.harness import Faults, room, sample
from tests.faults.jobs import ABSENT, JOBS, NEW, OLD

PAGE = """# Killed at every event of the file system

Each job is killed with SIGKILL right before an event of the file system (what `sys.addaudithook` tells: opens, renames,
removals and their like), each time another one, and then looked at, run again and looked at again. What it makes must be
absent, what was there before, or whole and right; the second run must end well, and leave nothing of the first.
*{absent}*, *{old}* and *{new}* count what was found after the kill.

`{command}` wrote this page, with Python {python} on {system}: {killed:,} kills, {failures} failures, {seconds:.0f} s.

![What was found after a kill, job by job: nothing, what was there before, or what was to be there](pictures/faults.svg)

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every event, and not four of each job")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write docs/faults.md, or another file")
    parser.add_argument("jobs", nargs="*", help="names of jobs; default: all")
    asked = parser.parse_args()
    root = room()
    faults = Faults(root)
    failures: list[str] = []
    rows = [f"| job | events | killed | {ABSENT} | {OLD} | {NEW} | seconds |", "|---|---:|---:|---:|---:|---:|---:|"]
    print("\n".join(rows))
    began, killed = time.monotonic(), 0
    for job in asked.jobs or JOBS:
        started, found = time.monotonic(), Counter[str]()
        events, _ = faults.whole(job)
        chosen = list(range(len(events))) if asked.all else sample(events, 4)
        for at in chosen:
            try:
                found[faults.killed(job, at)] += 1
            except AssertionError as error:
                failures.append(f"{job}, before {at}, {events[at]}: {error}")
        counts = " | ".join(str(found[state]) for state in (ABSENT, OLD, NEW))
        rows.append(f"| {job} | {len(events)} | {len(chosen)} | {counts} | {time.monotonic() - started:.0f} |")
        print(rows[-1], flush=True)
        killed += len(chosen)
    print("\n".join(failures) or "No failure.")
    if asked.table:
        head = PAGE.format(
            absent=ABSENT,
            old=OLD,
            new=NEW,
            command=f"python -m tests.faults{' --all' if asked.all else ''} --table docs/faults.md",
            python=platform.python_version(),
            system=platform.system(),
            killed=killed,
            failures=len(failures),
            seconds=time.monotonic() - began,
        )
        asked.table.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    faults.close()
    shutil.rmtree(root)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
