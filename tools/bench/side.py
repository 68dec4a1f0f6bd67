"""What the peers_ cases share: the files each contender opens, the jobs, and the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.bench.harness import Findings, Row, Setup, token_ids
from tools.bench.peers import OURS, PEERS, compare, memory_rows, time_rows
from tools.bench.standin import Standin
from tools.bench.sweeps import write_gated
from tools.bench.workers.protocol import Job

FLOOR_NOTE = "the contender at the end of each row's name, on the same weights and tokens, in a process of its own"
MKL_NOTE = "torch's matrix library (MKL) is slow on AMD processors, which favours us there."


def middle_layer(model: Standin) -> int:
    """The layer whose attention is hooked or edited."""
    return model.n_layers // 2


def floor_file(model: Standin, work: str) -> Path:
    """The folder of the file on which plain ONNX Runtime does a work."""
    if work in ("one_hook", "edit"):
        layer = middle_layer(model)
        return model.made(f"gated.z{layer}.scale", write_gated, f"blocks.{layer}.attn.hook_z", "scale")
    if work == "filtered_cache":
        return model.made("resid-pre", _expose_resid_pre)
    if work == "generation":
        return model.made("with-past", _bake_with_past)
    return model.stripped.parent


def run_work(
    setup: Setup,
    work: str,
    sizes: Sequence[tuple[int, int]],
    limits: Mapping[str, float] | None = None,
    memory_limits: Mapping[str, float] | None = None,
) -> Findings:
    """A work at each size (batch, length): milliseconds against every peer, and peak memory at the last size.

    ``limits``: what our time may be of a peer's, at the first size. ``memory_limits``: what our peak may be of a peer's.
    """
    rows: list[Row] = []
    notes: list[str] = []
    agreed: list[str] = []
    model = setup.model
    for size in sizes:
        batch, length = size
        job = Job(
            work,
            str(model.checkpoint),
            str(model.hooked),
            [str(floor_file(model, work))],
            token_ids(model, batch, length).tolist(),
            layer=middle_layer(model),
        )
        found = compare(dict.fromkeys((OURS, *PEERS), job), setup.repeats, setup.workdir)
        label = f"b{batch} s{length}"
        rows += time_rows(label, found, limits if size == sizes[0] else None)
        if size == sizes[-1]:
            rows += memory_rows(label, found.peaks, memory_limits)
        notes += [note for note in found.notes if note not in notes]
        agreed += [f"{label}: {note}" for note in found.agreed]
    peak = "Peak memory is that of the whole process: libraries, weights, the first call and every measured one."
    return Findings(rows, FLOOR_NOTE, (*notes, *agreed, peak, MKL_NOTE))


# In a child


def _expose_resid_pre(hooked: str, folder: str) -> None:
    from graphlens import surgery

    graph = surgery.load(hooked)
    layers = surgery.read_manifest(graph).config.n_layers
    surgery.save(surgery.expose(graph, [f"blocks.{layer}.hook_resid_pre" for layer in range(layers)]), folder)


def _bake_with_past(hooked: str, folder: str) -> None:
    from graphlens import bake_model

    bake_model(hooked, [], folder, with_past=True)
