"""What the sweep cases share: the jobs, the comparison of values, and the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from tools.bench.harness import Findings, Row, Setup, Target, against_floor, rounds
from tools.bench.peers import FLOOR, LENS_4, LENS_9, OURS, TOLERANCE, Compared, Disagreement, Peer, Worker, compare
from tools.bench.side import MKL_NOTE
from tools.bench.sweeps import KINDS, LENGTH, Prompts, even_layers, random_prompts, write_gated
from tools.bench.workers import ours
from tools.bench.workers.protocol import Job, Work

DIFFERENCE_LIMIT = 10.0  # millionths of the metric's scale
MEMORY_LIMIT = 1.6  # times a full cache's peak
_PROMPTS = {
    False: "Of clean and corrupted tokens, only the first is the same.",
    True: "Clean and corrupted tokens differ at one position, two thirds through.",
}
_NOISE = 1e-5  # of the metric's scale: what single precision alone may make of it


@dataclass(frozen=True)
class SweepPlan:
    """A kind of sweep, its batch, how many times faster than each contender it should be, and how many layers the slow
    contenders sweep (None: all), whose times are scaled to all; ``slow`` are those contenders. ``one_token``: the prompts
    differ at one position alone."""

    kind: str
    batch: int
    faster: Mapping[Peer, float]
    layers: int | None = None
    slow: tuple[Peer, ...] = (LENS_4, LENS_9)
    one_token: bool = False


def run_sweeps(setup: Setup, *plans: SweepPlan) -> Findings:
    """Each sweep against one forward per patch in plain ONNX Runtime and TransformerLens's own function."""
    rows: list[Row] = []
    notes: list[str] = []
    for plan in plans:
        jobs = sweep_jobs(setup, plan)
        found = compare(jobs, setup.repeats, setup.workdir, warmup=0, agree=sweep_agreement)
        rows += _time_rows(plan, jobs, found)
        values, floor = (np.array(found.checks[peer.name]["values"]) for peer in (OURS, FLOOR))
        scale = float(np.abs(floor).max())
        millionths = float(np.abs(values - floor).max()) / scale * 1e6
        limit = Target(millionths, DIFFERENCE_LIMIT, "millionths", "of the largest value")
        rows.append(
            Row(f"{_title(plan)}, largest difference from the floor loop", "millionths", [millionths], (), limit)
        )
        rows.append(_memory_row(setup, plan, jobs[OURS]))
        effect = float(np.abs(floor - found.facts[FLOOR.name]["unpatched"]).max())
        notes += [f"{_title(plan)}: {note}" for note in found.agreed]
        notes.append(f"{_title(plan)}: values up to {scale:.2g}; a patch moves the metric by up to {effect:.2g}.")
        notes += [note for note in found.notes if note not in notes]
    floor_is = "plain ONNX Runtime, one forward per patch; or the contender that a row names, in a process of its own"
    differ = {plan.one_token: _PROMPTS[plan.one_token] for plan in plans}
    return Findings(rows, floor_is, (*notes, *differ.values(), MKL_NOTE))


def sweep_jobs(setup: Setup, plan: SweepPlan) -> dict[Peer, Job]:
    """What each contender sweeps."""
    model, kind = setup.model, KINDS[plan.kind]
    prompts = random_prompts(model.d_vocab, plan.batch, min(LENGTH, model.n_ctx), plan.one_token)
    gated = model.made(f"gated.{kind.hook}.patch", write_gated, f"blocks.*.{kind.hook}", "patch")
    job = _job(plan.kind, prompts, str(model.checkpoint), str(model.hooked), str(gated))
    part = replace(job, layers=even_layers(model.n_layers, plan.layers))
    # TransformerLens's programs open GPT-2's checkpoints alone.
    return {OURS: job, FLOOR: job, **dict.fromkeys(plan.slow if model.architecture == "gpt2" else (), part)}


def sweep_works(hooked: str, plan: SweepPlan) -> dict[str, Work]:
    """The sweep by this process's graphlens, on the hooked folder alone."""
    from graphlens import HookedTransformer

    config = HookedTransformer.from_onnx(hooked, "cpu").cfg
    prompts = random_prompts(config.d_vocab, plan.batch, min(LENGTH, config.n_ctx), plan.one_token)
    return {_title(plan): ours.prepare(_job(plan.kind, prompts, "", hooked))}


def _job(kind: str, prompts: Prompts, checkpoint: str, hooked: str, *files: str) -> Job:
    return Job(
        f"sweep:{kind}",
        checkpoint,
        hooked,
        list(files),
        prompts.clean.tolist(),
        prompts.corrupted.tolist(),
        prompts.answers,
    )


def sweep_agreement(checks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """As peers.agreement, for values, of which some contenders have those of some layers alone.

    A difference also counts relative to the largest spread of values, since patches that move the metric little would
    otherwise agree without being applied.
    """
    first, *others = checks
    reference = np.array(checks[first]["values"], np.float64)
    scale, spread = float(np.abs(reference).max()), float(np.ptp(reference))
    allowed = min(TOLERANCE * scale, TOLERANCE * spread + _NOISE * scale)
    largest = 0.0
    for name in others:
        values = np.array(checks[name]["values"], np.float64)
        chosen = even_layers(len(reference), len(values))
        expected = reference if chosen is None else reference[chosen]
        if values.shape != expected.shape:
            raise Disagreement(f"values: {name} has the shape {values.shape}, {first} {expected.shape}.")
        difference = float(np.abs(values - expected).max())
        if not difference <= allowed:
            raise Disagreement(
                f"values: {name} differs from {first} by {difference:.1e} where {allowed:.1e} is allowed. "
                f"{name}: {values.ravel()[:8].tolist()}; {first}: {expected.ravel()[:8].tolist()}."
            )
        largest = max(largest, difference)
    return [f"values of {', '.join(others)} differ from {first}'s by at most {largest:.0e}."]


def _title(plan: SweepPlan) -> str:
    return f"{plan.kind} b{plan.batch} s{LENGTH}"


def _time_rows(plan: SweepPlan, jobs: Mapping[Peer, Job], found: Compared) -> list[Row]:
    rows = []
    whole = np.array(found.checks[OURS.name]["values"]).shape
    for peer, job in jobs.items():
        if peer is OURS or peer.name not in found.times:
            continue
        label, times = f"{_title(plan)}, {peer.name}", found.times[peer.name]
        if job.layers is not None:
            label += f" (measured on {len(job.layers) * prod(whole[1:])} of {prod(whole)} patches)"
            times = [time * whole[0] / len(job.layers) for time in times]
        limit = 1 / plan.faster[peer] if peer in plan.faster else None
        rows.append(against_floor(label, found.times[OURS.name], times, limit))
    return rows


def _memory_row(setup: Setup, plan: SweepPlan, job: Job) -> Row:
    """Peak memory of a fresh process that sweeps, beside that of one that fetches one full cache of the same batch."""
    peaks = []
    for each in (job, Job("full_cache", job.checkpoint, job.hooked, tokens=job.tokens)):
        with Worker(OURS, each, setup.workdir) as worker:
            peaks.append(worker.first_peak)
    peak, single = peaks
    return Row(
        f"{_title(plan)}, peak memory of a process; floor: graphlens's with one full cache",
        "MB",
        [peak / 1e6],
        [single / 1e6],
        Target(peak / single, MEMORY_LIMIT, "x", "a full cache's"),
    )


def growth_rows(setup: Setup, layers: Mapping[int, Setup], lengths: tuple[int, ...]) -> list[Row]:
    """The resid_pre sweep's time, batch 1, for each number of layers and positions, and what is left of it after dividing
    by both squared."""
    rows = []
    for length in lengths:
        workers: dict[str, Worker] = {}
        try:
            for count, sized in layers.items():
                prompts = random_prompts(sized.model.d_vocab, 1, length)
                job = _job("resid_pre", prompts, str(sized.model.checkpoint), str(sized.model.hooked))
                workers[str(count)] = Worker(OURS, job, setup.workdir)
            found = rounds({name: worker.measure for name, worker in workers.items()}, setup.repeats, warmup=0)
        finally:
            for worker in workers.values():
                worker.__exit__()
        for name, times in found.items():
            label, squares = f"{name} layers, {length} positions", (int(name) * length) ** 2
            rows.append(Row(label, "ms", times))
            rows.append(Row(f"{label}, / (layers² positions²)", "µs", [time * 1e3 / squares for time in times]))
    return rows
