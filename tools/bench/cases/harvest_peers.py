"""A harvest beside the loop that people write: TransformerLens 4.3's run_with_cache with a names_filter, a file saved a run.

Both write float16. Each is judged by the batch size that is best for it. The loop stops before the block behind the last hook
point where that is asked for (stop_at_layer), as a harvest does by itself.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from functools import partial

from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds, token_ids
from tools.bench.harvest_loop import BATCHES, CONTEXT, ROWS, label_of, wanted
from tools.bench.peers import LENS_4, OURS, Worker, agreement, start, version_notes
from tools.bench.side import MKL_NOTE
from tools.bench.workers.protocol import Job

LEAST = 2.0  # times the tokens/s of the loop, each at the batch size of its choice
TOLERANCE = 2e-3  # of the largest figure: float16


def run(setup: Setup) -> Findings:
    """Tokens a second of each at each batch size, and of each at its best; ratios above 1 are faster than the loop."""
    model, context = setup.model, min(CONTEXT, setup.model.n_ctx)
    ids = token_ids(model, ROWS, context).tolist()
    rows: list[Row] = []
    with ExitStack() as stack:
        jobs = {
            peer: Job(
                "harvest",
                str(model.checkpoint),
                str(model.hooked),
                [str(model.workdir / f"harvest-{peer.program}")],
                tokens=ids,
            )
            for peer in (OURS, LENS_4)
        }
        workers, notes = start(jobs, setup.workdir, stack)
        agreed = agreement({name: worker.check for name, worker in workers.items()}, TOLERANCE)
        for label in wanted(model.n_layers):
            speeds: dict[str, dict[int, list[float]]] = {name: {} for name in workers}
            for batch in BATCHES:
                at = label_of(label, batch)
                contenders = {name: partial(_speed, worker, at, ROWS * context) for name, worker in workers.items()}
                for name, found in rounds(contenders, setup.repeats).items():
                    speeds[name][batch] = found
            ours, theirs = speeds[OURS.name], speeds.get(LENS_4.name, {})
            rows += [Row(label_of(label, batch), "tokens/s", ours[batch], theirs.get(batch, ())) for batch in BATCHES]
            if theirs:
                best = _best(ours), _best(theirs)
                row = Row(
                    f"{label}, each at its best ({best[0]} and {best[1]})", "tokens/s", ours[best[0]], theirs[best[1]]
                )
                ratio = min(row.ratio or 0, row.paired_ratio or 0)
                rows.append(
                    Row(row.label, row.unit, row.ours, row.floor, Target(-ratio, -LEAST, "x", "the loop, negative"))
                )
        notes += version_notes(workers)
        peaks = {name: worker.last_peak() for name, worker in workers.items()}
    if LENS_4.name in peaks:
        rows.append(Row("peak memory of a process", "MB", [peaks[OURS.name] / 1e6], [peaks[LENS_4.name] / 1e6]))
    said = f"Rows of {context} random ids, {ROWS} a round, written in float16."
    return Findings(
        rows, "run_with_cache of TransformerLens 4.3 in a loop, a file a run", (*notes, *agreed, said, MKL_NOTE)
    )


def _speed(worker: Worker, label: str, tokens: int) -> float:
    return tokens / (worker.measure(label) / 1e3)


def _best(speeds: dict[int, list[float]]) -> int:
    """The batch size with the highest median."""
    return max(speeds, key=lambda batch: statistics.median(speeds[batch]))


CASE = Case(run, repeats=5)
