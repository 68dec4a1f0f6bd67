"""A full cache (every hook point) against TransformerLens 3.9 and 4.3 on the same weights.

3.9 comes with the dev extra. 4.3 lives in an environment of its own, which this case makes when it is absent.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Row, Setup, token_ids
from tools.bench.peers import LENS_4, LENS_9, OURS, compare, memory_rows, time_rows
from tools.bench.side import MKL_NOTE
from tools.bench.workers.protocol import Job

LIMITS = {LENS_9.name: 1 / 4, LENS_4.name: 1 / 2.5}


def run(setup: Setup) -> Findings:
    """Milliseconds a call, and peak memory of a process that does one."""
    memory: list[Row] = []
    times: list[Row] = []
    notes: list[str] = []
    agreed: list[str] = []
    sizes = setup.sizes()[:2]
    for size in sizes:
        batch, length = size
        ids = token_ids(setup.model, batch, length).tolist()
        job = Job("full_cache", str(setup.model.checkpoint), str(setup.model.hooked), tokens=ids)
        found = compare(dict.fromkeys((OURS, LENS_9, LENS_4), job), setup.repeats, setup.workdir, warmup=2)
        label = f"b{batch} s{length}"
        memory += memory_rows(label, found.first_peaks, {LENS_4.name: 1.0})
        times += time_rows(label, found, LIMITS if size == sizes[0] else None)
        notes += [note for note in found.notes if note not in notes]
        agreed += [f"{label}: {note}" for note in found.agreed]
    cached = ", ".join(f"{name} {facts['cached']}" for name, facts in found.facts.items())
    return Findings(
        (*memory, *times),
        "run_with_cache of TransformerLens on the same weights, in a process of its own",
        (*notes, *agreed, f"Names in a full cache: {cached}.", MKL_NOTE),
    )


CASE = Case(run, repeats=9)
