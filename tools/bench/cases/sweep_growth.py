"""How the residual stream's sweep grows with layers and positions, batch 1: its time over both squared.

Models of 6, 12 and 24 layers with random weights are made on the spot, of the given model's other sizes.
"""

from __future__ import annotations

from tools.bench.harness import Case, Findings, Setup
from tools.bench.standin import resized
from tools.bench.sweep_rows import growth_rows

LAYERS = (6, 12, 24)
LENGTHS = (8, 16, 32, 64)


def run(setup: Setup) -> Findings:
    """Milliseconds a sweep, and microseconds of it for each layer² position²."""
    sized = {layers: Setup(resized(setup.model, layers), setup.repeats) for layers in LAYERS}
    note = "One forward per patch takes time in proportion to layers² positions² too, where a forward's goes with both."
    return Findings(growth_rows(setup, sized, LENGTHS), "", (note,))


CASE = Case(run, repeats=3)
