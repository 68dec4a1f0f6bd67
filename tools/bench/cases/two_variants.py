"""What a second edited variant of an open model adds to a process's memory, side by side with every peer.

Each variant has one head of the middle layer ablated. graphlens opens the hooked file twice and edits each by an
intervention; a row of its own, and plain ONNX Runtime, have two files whose edit is baked in. transformers and
TransformerLens load the checkpoint twice and zero the head's rows of the weights.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import replace

from tools.bench.harness import Case, Findings, Row, Setup, Target, token_ids
from tools.bench.peers import FLOOR, HUGGING, LENS_4, LENS_9, OURS, agreement, start, version_notes
from tools.bench.side import middle_layer
from tools.bench.workers.protocol import Job

BAKED = replace(OURS, name="graphlens on two baked files")
LIMIT = 10.0  # per cent of the weights' bytes
_SIZE = (1, 16)


def _bake_head(hooked: str, folder: str, layer: int, head: int, keep_hooks: bool) -> None:
    from graphlens import Ablate, bake_model

    bake_model(hooked, Ablate(f"blocks.{layer}.attn.hook_z", heads=head), folder, keep_hooks=keep_hooks)


def run(setup: Setup) -> Findings:
    """MB held (proportional set size) by the first variant, and added by the second. Linux only."""
    model, layer = setup.model, middle_layer(setup.model)
    jobs = {}
    for peer in (OURS, BAKED, FLOOR, HUGGING, LENS_9, LENS_4):
        files = [
            str(model.made(f"variant{head}-{peer.program}", _bake_head, layer, head, peer is BAKED))
            for head in range(2)
            if peer in (BAKED, FLOOR)
        ]
        ids = token_ids(model, *_SIZE).tolist()
        jobs[peer] = Job("two_variants", str(model.checkpoint), str(model.hooked), files, ids, layer=layer)
    first: dict[str, list[float]] = {peer.name: [] for peer in jobs}
    second: dict[str, list[float]] = {peer.name: [] for peer in jobs}
    notes: list[str] = []
    for index in range(-1, setup.repeats):  # the first round leaves packed weights in the cache, and is dropped
        checks = {}
        for peer, job in jobs.items():
            with ExitStack() as stack:
                workers, missing = start({peer: job}, setup.workdir, stack)
                notes += [note for note in (*missing, *version_notes(workers)) if note not in notes]
                for name, worker in workers.items():
                    checks[name] = worker.check
                    before, one, two = worker.facts["held"]
                    if index >= 0:
                        first[name].append((one - before) / 1e6)
                        second[name].append((two - one) / 1e6)
        notes += [note for note in agreement(checks) if note not in notes]
    share = statistics.median(second[OURS.name]) / (model.weights_bytes / 1e6) * 100
    target = Target(share, LIMIT, "%", "of the weights")
    rows = []
    for label, held in (("the first variant holds", first), ("the second adds", second)):
        for name, samples in held.items():
            if name != OURS.name and samples:
                rows.append(Row(f"{label}, {name}", "MB", held[OURS.name], samples))
    rows.append(Row("the second adds, of the weights", "MB", second[OURS.name], (), target))
    weights = f"Weights {model.weights_bytes / 1e6:,.1f} MB; both variants stay open. Pages of one file count once: "
    weights += "transformers maps the checkpoint's file, so that its models share all that no edit wrote to."
    return Findings(rows, "the contender at the end of each row's name, in a process of its own", (*notes, weights))


CASE = Case(run, repeats=3)
