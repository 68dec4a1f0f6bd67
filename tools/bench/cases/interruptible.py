"""What it costs that Ctrl-C can end a run with Python hooks, over one in which it would abort the process."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from tools.bench.harness import Case, Findings, Row, Setup, Target, rounds, token_ids, wait_quiet

LIMIT = 50.0  # microseconds
RUNS = 60  # in a sample, whose median counts


def median_of(work: Callable[[], Any]) -> float:
    """Microseconds of one call: the median of some in a row."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


class Unprotected:
    """The least that makes a run with callbacks: nothing is caught, nothing stops it."""

    now: Unprotected

    def __init__(self, callbacks: Mapping[int, Callable[[Any], Any]]) -> None:
        self.callbacks, self.run_id = callbacks, np.asarray(0, np.int64)

    def on_start(self, options: object) -> None:
        pass

    def run(self, work: Callable[[], Any]) -> Any:
        Unprotected.now = self
        return work()


def operator(op: int, inputs: list[Any], attributes: Mapping[str, str]) -> tuple[Any, ...]:
    """What onnxruntime-extensions calls in an unprotected run."""
    activation, _ = inputs
    result = np.asarray(Unprotected.now.callbacks[int(attributes["index"])](activation), order="C")
    return op, result.shape, result


@contextmanager
def unprotected() -> Iterator[None]:
    """Runs with Python hooks protect nothing in here."""
    from graphlens.runtime.entry import Called

    package = sys.modules["onnxruntime_extensions._ocos"]
    package.PyCustomOpDef.install_hooker(operator)
    try:
        with mock.patch("graphlens.engine.feeding.PythonCalls", Unprotected):
            yield
    finally:
        package.PyCustomOpDef.install_hooker(Called)


def alone(count: int) -> Callable[[], Any]:
    """A run of so many calls made as onnxruntime-extensions makes them, without ONNX Runtime: so little time varies little."""
    from graphlens.engine import feeding
    from graphlens.runtime.entry import Called

    activation = np.ones((1, 16, 128), np.float32)

    def work() -> None:
        calls = feeding.PythonCalls({0: lambda given: given})
        call = operator if isinstance(calls, Unprotected) else Called
        run = calls.run_id

        def call_all() -> None:
            for _ in range(count):
                tuple(call(0, [activation, run], {"index": "0"}))

        calls.run(call_all)

    return work


def run(setup: Setup) -> Findings:
    """Microseconds that a run takes longer: the calls alone, and with the model around them, in the main thread and another."""
    from graphlens import HookedTransformer

    model = HookedTransformer.from_onnx(setup.model.hooked, "cpu")
    ids = token_ids(setup.model, 1, 16)

    def look(activation: Any, hook: Any) -> None:
        pass

    def of_model(hooks: list[Any]) -> Callable[[], Any]:
        return lambda: model.run_with_hooks(ids, fwd_hooks=hooks)

    z = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    works = {f"{count} hooks alone": alone(count) for count in (0, 1, len(z), len(model.hook_dict))}
    works |= {"one hook": of_model([(z[0], look)]), f"all {len(z)} hook_z": of_model([(name, look) for name in z])}
    for work in works.values():
        work()
    rows = []
    with ThreadPoolExecutor(1) as other:

        def more(work: Callable[[], Any], measure: Callable[..., float]) -> Callable[[], float]:
            def measured() -> float:
                wait_quiet()
                with unprotected():
                    bare = measure(work)
                wait_quiet()
                return measure(work) - bare

            return measured

        def there(work: Callable[[], Any]) -> float:
            return other.submit(median_of, work).result()

        for place, measure in (("", median_of), (", in another thread", there)):
            found = rounds({name: more(work, measure) for name, work in works.items()}, setup.repeats, warmup=1)
            for name, more_ in found.items():
                target = Target(statistics.median(more_), LIMIT, "us")
                rows.append(Row(f"{name}{place}", "us", more_, target=target))
    return Findings(rows)


CASE = Case(run, repeats=21)
