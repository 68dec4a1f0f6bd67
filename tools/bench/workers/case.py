"""A case's works by the graphlens that this process imports, perhaps another commit's: ``job.work`` is the case's name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from tools.bench.harness import Case
from tools.bench.workers.protocol import Job, Work


def prepare(job: Job) -> Mapping[str, Work]:
    """Every work of the case, on the hooked folder."""
    case: Case = importlib.import_module(f"tools.bench.cases.{job.work}").CASE
    assert case.works is not None, job.work
    return case.works(job.hooked)
