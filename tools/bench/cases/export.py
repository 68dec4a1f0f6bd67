"""Exporting a checkpoint in a fresh process, with and without verification."""

from __future__ import annotations

import shutil
import statistics
import uuid
from functools import partial

from tools.bench.children import ChildRun, run_child
from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds

SECONDS_LIMIT = 60.0  # with verification


def _export(checkpoint: str, out: str, verify: bool) -> dict[str, float]:
    import graphlens

    report = graphlens.export_model(checkpoint, out, verify=verify, link=True)  # copying is the disk's
    found = {"copied": float(report.copied_bytes), "export": report.seconds, "export peak": float(report.peak_bytes)}
    if report.verification is not None:
        found |= {"verify": report.verification.seconds, "verify peak": float(report.verification.peak_bytes)}
    return found


def export_once(setup: Setup, verify: bool) -> ChildRun:
    """Exports into a new folder beside the model's other files (a hardlink suffices there), and deletes it."""
    setup.model.workdir.mkdir(parents=True, exist_ok=True)
    out = setup.model.workdir / f"export-{uuid.uuid4().hex[:8]}"
    try:
        return run_child(_export, str(setup.model.checkpoint), str(out), verify)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def describe(run: ChildRun) -> str:
    """What the export itself reported: seconds and peak MB of its steps, and MB copied."""
    found = run.result
    text = f"writing {found['export']:.1f} s, peak {found['export peak'] / 1e6:,.0f} MB"
    if "verify" in found:
        text += f"; verifying {found['verify']:.1f} s, peak {found['verify peak'] / 1e6:,.0f} MB"
    return f"{text}; {found['copied'] / 1e6:,.0f} MB of weights copied"


def run(setup: Setup) -> Findings:
    """Seconds from starting the process to the finished export, imports included, and peak resident memory."""
    exports = {"yes": partial(export_once, setup, True), "no": partial(export_once, setup, False)}
    found = rounds(exports, setup.repeats, warmup=0)
    seconds = {name: [child.seconds for child in children] for name, children in found.items()}
    memory = {name: [child.peak_bytes / 1e6 for child in children] for name, children in found.items()}
    target = Target(statistics.median(seconds["yes"]), SECONDS_LIMIT, "s")
    rows = (
        Row("verified, wall", "s", seconds["yes"], target=target),
        Row("verified, peak memory", "MB", memory["yes"]),
        Row("not verified, wall", "s", seconds["no"]),
        Row("not verified, peak memory", "MB", memory["no"]),
    )
    weights = f"Weights {setup.model.weights_bytes / 1e6:,.1f} MB."
    return Findings(rows, notes=(weights, f"The last verified one: {describe(found['yes'][-1])}."))


CASE = Case(run, repeats=3)
