"""Contenders side by side: each in a process of its own, measured one call at a time, results compared first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tools.bench.environments import FOUR, NINE, SAELENS, TRANSFORMERS, Environment, NoEnvironment
from tools.bench.harness import Row, Target, against_floor, rounds
from tools.bench.workers.protocol import Job

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3  # of the largest figure
_SINGLE = ("forward", "filtered_cache", "one_hook", "edit", "generation", "two_variants")

Agree = Callable[[Mapping[str, Mapping[str, Any]]], list[str]]


class Disagreement(Exception):
    """Two contenders found different figures: they do not do the same work, and comparing their times means nothing."""


@dataclass(frozen=True)
class Peer:
    """A contender: what rows call it, the environment it lives in (None: this interpreter's), its program in
    tools/bench/workers, and the works it can do; "sweep" stands for every kind of sweep."""

    name: str
    environment: Environment | None
    program: str
    works: tuple[str, ...]

    def can(self, work: str) -> bool:
        """Whether there is a program for this work."""
        return work.partition(":")[0] in self.works


OURS = Peer("graphlens", None, "ours", (*_SINGLE, "full_cache", "sweep", "harvest", "saes"))
FLOOR = Peer("plain ONNX Runtime", None, "bare", (*_SINGLE, "sweep"))
HUGGING = Peer("transformers", TRANSFORMERS, "hugging", _SINGLE)
LENS_9 = Peer("TransformerLens 3.9", NINE, "lens", (*_SINGLE, "full_cache", "sweep"))
LENS_4 = Peer("TransformerLens 4.3", FOUR, "lens", (*_SINGLE, "full_cache", "sweep", "harvest"))
NNSIGHT = Peer("nnsight", FOUR, "with_nnsight", ("forward", "filtered_cache", "one_hook", "edit", "generation"))
SAE_LENS = Peer("SAELens 6.54", SAELENS, "with_sae_lens", ("saes",))
PEERS = (FLOOR, HUGGING, LENS_9, LENS_4, NNSIGHT)


class Worker:
    """A contender's process, which has done its job once. Raises RuntimeError with its last words when it fails.

    ``variables``: its environment variables, None for this process's. ``package``: the file of the graphlens that it
    imported, None for none. ``labels``: those of its works. ``check``, ``facts``: what the results said (see
    workers/protocol.py). ``first_peak``: peak memory by then, in bytes.
    """

    def __init__(self, peer: Peer, job: Job, workdir: Path, variables: Mapping[str, str] | None = None) -> None:
        self.peer = peer
        python = Path(sys.executable) if peer.environment is None else peer.environment.python(workdir)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [str(python), "-m", "tools.bench.workers", peer.program]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self._ask(json.dumps(asdict(job)))
            said = self._read()
        except BaseException:
            self.__exit__()
            raise
        self.versions: Mapping[str, str] = said["versions"]
        self.package: str | None = said["package"]
        self.labels: list[str] = said["labels"]
        self.check: Mapping[str, Any] = said["check"]
        self.facts: Mapping[str, Any] = said["facts"]
        self.first_peak: int = said["peak"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._read()  # says why

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.peer.name} failed:\n{self._errors.read()[-3000:]}")
        return json.loads(line)

    def measure(self, label: str = "") -> float:
        """Milliseconds of one call, of the work with this label where the program has several."""
        self._ask(label)
        return float(self._read())

    def last_peak(self) -> int:
        """Ends the process: its peak memory in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = int(self._read())
        self._process.wait()
        return peak


@dataclass(frozen=True)
class Compared:
    """What came of it, by contender: milliseconds of each round, peak memory in bytes after the last and after the first
    call, what results said, and remarks: how far results agree, and who took part."""

    times: Mapping[str, Sequence[float]]
    peaks: Mapping[str, int]
    first_peaks: Mapping[str, int]
    checks: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Mapping[str, Any]]
    agreed: Sequence[str]
    notes: Sequence[str]


ALONE = "GRAPHLENS_BENCH_ALONE"  # set: no environments of others are made, for smoke runs


def compare(
    jobs: Mapping[Peer, Job], repeats: int, workdir: Path, warmup: int = 1, agree: Agree | None = None
) -> Compared:
    """Starts every contender with its job, has their results compared, and measures them in interleaved rounds.

    One that cannot do the work, or whose environment cannot be made, is left out and named in the notes. The first of
    ``jobs`` is what the others are compared with, by ``agree`` (``agreement`` if None), which gives a note or raises
    Disagreement. Raises RuntimeError for one that fails.
    """
    with ExitStack() as stack:
        workers, notes = start(jobs, workdir, stack)
        checks = {name: worker.check for name, worker in workers.items()}
        agreed = (agree or agreement)(checks)
        times = rounds({name: worker.measure for name, worker in workers.items()}, repeats, warmup)
        notes += version_notes(workers)
        return Compared(
            times,
            {name: worker.last_peak() for name, worker in workers.items()},
            {name: worker.first_peak for name, worker in workers.items()},
            checks,
            {name: worker.facts for name, worker in workers.items()},
            agreed,
            notes,
        )


def start(jobs: Mapping[Peer, Job], workdir: Path, stack: ExitStack) -> tuple[dict[str, Worker], list[str]]:
    """The workers by contender, which end with ``stack``, and why any were left out."""
    workers, notes = dict[str, Worker](), []
    for peer, job in jobs.items():
        if not peer.can(job.work):
            notes.append(f"{peer.name} NOT MEASURED: it has no {job.work}.")
            continue
        if os.environ.get(ALONE) and peer not in (OURS, FLOOR):
            notes.append(f"{peer.name} NOT MEASURED: {ALONE} is set.")
            continue
        try:
            workers[peer.name] = stack.enter_context(Worker(peer, job, workdir))
        except NoEnvironment as error:
            notes.append(f"{peer.name} NOT MEASURED: {error}")
    return workers, notes


def version_notes(workers: Mapping[str, Worker]) -> list[str]:
    """A note of each contender's packages."""
    versions = {name: worker.versions.items() for name, worker in workers.items()}
    return [f"{name}: {', '.join(' '.join(item) for item in items)}." for name, items in versions.items()]


def agreement(checks: Mapping[str, Mapping[str, Any]], tolerance: float = TOLERANCE) -> list[str]:
    """A note of how far the contenders' figures lie apart. Raises Disagreement where that is over ``tolerance``.

    ``checks``: figures by name, by contender, the first being what the others are held against. A difference counts
    relative to the largest of the first's figures of that name.
    """
    import numpy as np

    (first, reference), *others = checks.items()
    largest = 0.0
    for name, figures in others:
        if figures.keys() != reference.keys():
            raise Disagreement(f"{name} found {sorted(figures)}, {first} {sorted(reference)}.")
        for key, values in figures.items():
            one, two = np.asarray(reference[key], np.float64), np.asarray(values, np.float64)
            if one.shape != two.shape:
                raise Disagreement(f"{key}: {name} has the shape {two.shape}, {first} {one.shape}.")
            difference = float(np.abs(one - two).max() / max(np.abs(one).max(), 1e-30))
            if not difference <= tolerance:
                raise Disagreement(
                    f"{key}: {name} differs from {first} by {difference:.1e} of the largest, over {tolerance:.0e}. "
                    f"{name}: {two.ravel()[:8].tolist()}; {first}: {one.ravel()[:8].tolist()}."
                )
            largest = max(largest, difference)
    names = ", ".join(name for name, _ in others)
    return [f"Results differ from {first}'s by at most {largest:.0e} of the largest: {names}."] if others else []


def time_rows(label: str, found: Compared, limits: Mapping[str, float] | None = None) -> list[Row]:
    """A row for every peer, graphlens against it."""
    ours = found.times[OURS.name]
    limits = limits or {}
    return [
        against_floor(f"{label}, {name}", ours, times, limits.get(name))
        for name, times in found.times.items()
        if name != OURS.name
    ]


def memory_rows(label: str, peaks: Mapping[str, int], limits: Mapping[str, float] | None = None) -> list[Row]:
    """A row for every peer: graphlens's peak memory against its own; ``limits``: what ours may be of a peer's."""
    rows, mine = [], peaks[OURS.name]
    for name, theirs in peaks.items():
        if name != OURS.name:
            limit = (limits or {}).get(name)
            target = None if limit is None else Target(mine / theirs, limit, "x", name)
            rows.append(Row(f"{label}, peak memory of a process, {name}", "MB", [mine / 1e6], [theirs / 1e6], target))
    return rows
