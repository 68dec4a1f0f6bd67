"""Resuming a harvest that is whole, which reads and checks every byte of it, beside making it."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds

CONTEXT, ROWS, BATCH = 128, 64, 16  # tokens of a row; rows; rows of a run
MOST = 0.02  # of the time of making it


def run(setup: Setup) -> Findings:
    """Seconds; all resid_post in float16, written."""
    import numpy as np

    from graphlens import HookedTransformer, harvest

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    context = min(CONTEXT, model.cfg.n_ctx)
    ids = np.random.default_rng(0).integers(0, model.cfg.d_vocab, (ROWS, context))
    with tempfile.TemporaryDirectory(dir=setup.workdir) as name:
        out = Path(name) / "h"

        def work(resume: bool) -> float:
            if not resume:
                shutil.rmtree(out, ignore_errors=True)
            start = time.perf_counter()
            harvest(
                model,
                ids,
                "*.hook_resid_post",
                out,
                dtype="float16",
                batch_tokens=BATCH * context,
                context=context,
                shard_tokens=2 * BATCH * context,
                resume=resume,
                verbose=False,
            )
            return time.perf_counter() - start

        work(False)
        found = rounds({"made": lambda: work(False), "resumed": lambda: work(True)}, setup.repeats, warmup=1)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    row = Row("resuming it when all is written", "s", found["resumed"], found["made"])
    ratio = max(row.ratio or 0, row.paired_ratio or 0)
    return Findings(
        [Row(row.label, row.unit, row.ours, row.floor, Target(ratio, MOST, "x", "making it"))],
        "making it",
        (f"{ROWS} rows of {context} random ids, {size / 1e6:.0f} MB.",),
    )


CASE = Case(run, repeats=3)
