"""A soak: threads that run everything at once, on one model and on several, against what one thread alone computes.

    python -m tests.soak --seconds 60

It prints one line, and exits with 0 if every value was right, 1 if one was wrong or an error came, 2 if a thread hangs.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import graphlens
from graphlens import HookedTransformer
from tests.soak.soak_jobs import Arrays, differs, jobs

_HANG = 120  # seconds that a thread may take for its last job


class Soak:
    """The threads and what they found.

    Args:
        folder: Copies of the embedded model go there.
        seconds: How long they run.
        threads: How many.
        seed: What they choose depends on it, and on who comes first.
    """

    def __init__(self, folder: Path, seconds: float, threads: int, seed: int) -> None:
        self._seconds, self._threads, self._seed = seconds, threads, seed
        self._folders = [graphlens.embedded_model()]
        for name in ("other", "third"):
            self._folders.append(Path(shutil.copytree(self._folders[0], folder / name)))
        alone = HookedTransformer.from_onnx(shutil.copytree(self._folders[0], folder / "alone"), "cpu")
        self._expected: dict[str, Arrays] = {name: job() for name, job in jobs(alone).items()}
        # One that all share, two more over the same file, whose sessions they share, and others. The last two keep so few
        # sessions that these come and go under the runs.
        places = [0, 0, 0, 1, 2]
        self._models = [HookedTransformer.from_onnx(self._folders[place], "cpu") for place in places]
        self._models[-1].runner.engine.max_sessions = 1
        self._models[-2].runner.engine.max_sessions = 2
        self._work = [jobs(model) for model in self._models]
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self) -> bool:
        """Runs the threads, this one among them. Returns False where one hangs; if it is this one, the process ends."""
        threads = [threading.Thread(target=self._loop, args=(index,), daemon=True) for index in range(1, self._threads)]
        self._end = time.monotonic() + self._seconds
        watch = threading.Timer(self._seconds + 2 * _HANG, _hangs)
        watch.daemon = True
        watch.start()
        for thread in threads:
            thread.start()
        self._loop(0)
        last = time.monotonic() + _HANG
        for thread in threads:
            thread.join(max(0.0, last - time.monotonic()))
        watch.cancel()
        return not any(thread.is_alive() for thread in threads)

    def _loop(self, index: int) -> None:
        """What one thread does. Half of the threads keep to the model that all share."""
        chance = random.Random(f"{self._seed} {index}")
        names = list(self._expected)
        while time.monotonic() < self._end and len(self.faults) < 20:
            name = chance.choice(names)
            try:
                wrong = differs(self._chosen(index, chance)[name](), self._expected[name])
            except Exception:  # noqa: BLE001 - whatever it is, it is a finding
                wrong = traceback.format_exc()
            if wrong:
                self.faults.append(f"{name}: {wrong}")
            self.done[name] += 1

    def _chosen(self, index: int, chance: random.Random) -> dict[str, Any]:
        """The jobs on the shared model, on another, or now and then on one opened for this job alone."""
        if index % 2 == 0:
            return self._work[0]
        if chance.random() < 0.05:
            return jobs(HookedTransformer.from_onnx(chance.choice(self._folders), "cpu"))
        return chance.choice(self._work)


def _hangs() -> None:
    """Ends the process with 2, and says where each thread is: they cannot be waited for."""
    faulthandler.dump_traceback(all_threads=True)
    sys.stdout.flush()
    os._exit(2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), asked.seconds, asked.threads, asked.seed)
        ended = soak.run()
        for fault in soak.faults:
            print(fault, file=sys.stderr)
        counts = ", ".join(f"{name} {count}" for name, count in sorted(soak.done.items()))
        print(
            f"soak: {asked.seconds:g} s, {asked.threads} threads, {soak.done.total()} jobs ({counts}), "
            f"{len(soak.faults)} wrong or failed{'' if ended else ', and a thread hangs'}"
        )
        if not ended:
            shutil.rmtree(folder, ignore_errors=True)
            _hangs()
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
