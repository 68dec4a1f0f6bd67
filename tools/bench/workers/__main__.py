"""The loop of a worker: does its works once, says what came of them, then measures one again for every line it reads."""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib import metadata
from typing import Any

from tools.bench.harness import timed, wait_quiet
from tools.bench.workers.protocol import Job, Work, peak_bytes

_PACKAGES = ("onnxruntime", "transformer-lens", "nnsight", "sae-lens", "transformers", "torch", "numpy")


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
    works = importlib.import_module(f"tools.bench.workers.{sys.argv[1]}").prepare(job)
    if isinstance(works, Work):
        works = {"": works}
    check: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for label, work in works.items():
        result = work.run()
        for said, found in ((check, work.check(result)), (facts, work.facts(result))):
            said |= {f"{label}: {name}" if label else name: value for name, value in found.items()}
        del result
    package = getattr(sys.modules.get("graphlens"), "__file__", None)
    answer(
        {
            "versions": _versions(),
            "package": package,
            "labels": list(works),
            "check": check,
            "facts": facts,
            "peak": peak_bytes(),
        }
    )
    measures = {label: timed(work.run) for label, work in works.items()}
    for line in sys.stdin:
        elapsed = measures[line.rstrip("\n")]()
        wait_quiet()  # threads spin a while after a run, and would hold a core of the next contender
        answer(elapsed)
    answer(peak_bytes())


if __name__ == "__main__":
    main()
