"""What every case shares: interleaved rounds, timing, and the records that rows of figures are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tools.bench.children import ChildRun
from tools.bench.standin import Standin
from tools.bench.workers.protocol import Work

T = TypeVar("T")
_QUIET_WINDOW = 0.004  # seconds
_QUIET_LIMIT = 0.5  # seconds
_SIZES = ((1, 16), (8, 32), (1, 512))


@dataclass(frozen=True)
class Target:
    """A figure and the limit it is held against, for the reader: nothing fails when it is over."""

    value: float
    limit: float
    unit: str
    of: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is within the limit."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Row:
    """One figure: samples of ours and of its floor, in ``unit``, aligned by round (sample i of both ran together)."""

    label: str
    unit: str
    ours: Sequence[float]
    floor: Sequence[float] = ()
    target: Target | None = None

    @property
    def ratio(self) -> float | None:
        """Median of ours over median of the floor; None without a floor, or where it is not positive (a shrinkage)."""
        return statistics.median(self.ours) / statistics.median(self.floor) if self._comparable else None

    @property
    def paired_ratio(self) -> float | None:
        """Median of the rounds' own ratios: drift of the machine between rounds cancels."""
        if not self._comparable:
            return None
        return statistics.median(a / b for a, b in zip(self.ours, self.floor, strict=True))

    @property
    def _comparable(self) -> bool:
        return bool(self.floor) and min(self.floor) > 0


@dataclass(frozen=True)
class Findings:
    """What a case found: its rows, what the floor column holds, and remarks."""

    rows: Sequence[Row]
    floor: str = ""
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Setup:
    """What a case gets: the model's folders and the number of measured rounds."""

    model: Standin
    repeats: int

    @property
    def workdir(self) -> Path:
        """Where models and environments are kept."""
        return self.model.workdir.parent

    def sizes(self) -> list[tuple[int, int]]:
        """The (batch, sequence) sizes of the reference table, shortened to the model's context."""
        return sizes(self.model)


@dataclass(frozen=True)
class Figure:
    """One figure that a fresh process gave, and the row it belongs to."""

    label: str
    unit: str
    value: float


@dataclass(frozen=True)
class Case:
    """A benchmark: what to run, on which model and how many measured rounds unless the user says otherwise.

    A case that two commits can be compared on (``--against``) also says how one of them is measured alone, through
    graphlens's public names, since an older graphlens may do it:

    - ``works``: (the hooked folder) -> what is timed in a process that stays, by the row's label.
    - ``figures``: (what starts a function in a fresh process, as run_child does; the setup) -> the figures of one round.
    """

    run: Callable[[Setup], Findings]
    repeats: int
    model: str = "small"
    works: Callable[[str], Mapping[str, Work]] | None = None
    figures: Callable[[Callable[..., ChildRun], Setup], Sequence[Figure]] | None = None


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, 10th percentile, 90th percentile) of samples."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), tenths[0], tenths[-1]


def rounds(contenders: Mapping[str, Callable[[], T]], repeats: int, warmup: int = 1) -> dict[str, list[T]]:
    """Calls every contender once a round and keeps what each returned after the warm-up.

    Every second round is reversed and who goes first rotates, so that nobody always follows the same one.
    """
    names = list(contenders)
    kept: dict[str, list[T]] = {name: [] for name in names}
    for index in range(-warmup, repeats):
        shift = index // 2 % len(names)
        order = names[shift:] + names[:shift]
        for name in order if index % 2 == 0 else reversed(order):
            value = contenders[name]()
            if index >= 0:
                kept[name].append(value)
    return kept


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """``work`` as a contender: milliseconds of one call, measured once this process is quiet, result freed after."""

    def measure() -> float:
        wait_quiet()
        start = time.perf_counter()
        result = work()
        elapsed = (time.perf_counter() - start) * 1e3
        del result
        return elapsed

    return measure


def wait_quiet() -> None:
    """Waits until no thread of this process computes.

    A session's threads spin for tens of milliseconds after a run and would hold a core of the next contender.
    """
    end = time.perf_counter() + _QUIET_LIMIT
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_QUIET_WINDOW)
        if time.process_time() - before < _QUIET_WINDOW / 4:
            return


def against_floor(label: str, ours: Sequence[float], floor: Sequence[float], limit: float | None = None) -> Row:
    """A row of milliseconds judged by the larger of its two ratios to the floor."""
    row = Row(label, "ms", ours, floor)
    if limit is None or row.ratio is None or row.paired_ratio is None:
        return row
    return Row(label, "ms", ours, floor, Target(max(row.ratio, row.paired_ratio), limit, "x", "the floor"))


def floor_session(model: Standin) -> Any:
    """The floor: a plain onnxruntime.InferenceSession, defaults but for its warnings, on the stripped file."""
    return bare_session(model.stripped)


def bare_session(graph: Path) -> Any:
    """A plain onnxruntime.InferenceSession, defaults but for its warnings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class Shape(Protocol):
    """What prompts depend on: a Standin or an open model's ``cfg``."""

    @property
    def n_ctx(self) -> int:
        """The longest sequence, in tokens."""
        ...

    @property
    def d_vocab(self) -> int:
        """The number of token ids."""
        ...


def sizes(model: Shape) -> list[tuple[int, int]]:
    """The (batch, sequence) sizes of the reference table, shortened to the model's context."""
    return list(dict.fromkeys((batch, min(length, model.n_ctx)) for batch, length in _SIZES))


def prompts(model: Shape) -> dict[str, Any]:
    """Seeded token ids of each size of the reference table, by its label ("b8 s32")."""
    return {f"b{batch} s{length}": token_ids(model, batch, length) for batch, length in sizes(model)}


def token_ids(model: Shape, batch: int, length: int) -> Any:
    """Seeded token ids, int64 [batch, length]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, model.d_vocab, (batch, length))
