"""``python -m tests.faults --all``: every job killed before every event, a line of the table for each."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import Counter

from tests.faults.harness import Faults, room, sample
from tests.faults.jobs import ABSENT, JOBS, NEW, OLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every event, and not four of each job")
    parser.add_argument("jobs", nargs="*", help="names of jobs; default: all")
    asked = parser.parse_args()
    root = room()
    faults = Faults(root)
    failures: list[str] = []
    print(f"| job | events | killed | {ABSENT} | {OLD} | {NEW} | seconds |")
    print("|---|---|---|---|---|---|---|")
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
        print(f"| {job} | {len(events)} | {len(chosen)} | {counts} | {time.monotonic() - started:.0f} |", flush=True)
    print("\n".join(failures) or "No failure.")
    faults.close()
    shutil.rmtree(root)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
