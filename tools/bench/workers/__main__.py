"""The loop of a worker: does its work once, says what came of it, then measures it again for every line it reads."""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib import metadata
from typing import Any

from tools.bench.harness import timed, wait_quiet
from tools.bench.workers.protocol import Job, peak_bytes

_PACKAGES = ("onnxruntime", "transformer-lens", "nnsight", "transformers", "torch", "numpy")


def _versions() -> dict[str, str]:
    """The versions of the packages that this process imported."""
    found = {}
    for name in _PACKAGES:
        if name.replace("-", "_") in sys.modules:
            found[name] = metadata.version(name)
    return found


def main() -> None:
    """Serves the program that the command line names."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    job = Job(**json.loads(sys.stdin.readline()))
    work = importlib.import_module(f"tools.bench.workers.{sys.argv[1]}").prepare(job)
    result = work.run()
    check, facts = dict(work.check(result)), dict(work.facts(result))
    del result
    answer({"versions": _versions(), "check": check, "facts": facts, "peak": peak_bytes()})
    measure = timed(work.run)
    for _ in sys.stdin:
        elapsed = measure()
        wait_quiet()  # threads spin a while after a run, and would hold a core of the next contender
        answer(elapsed)
    answer(peak_bytes())


if __name__ == "__main__":
    main()
