"""Jobs of an experiment in the workers of a Ray cluster: how many, what each may use, and which machines may take part.

What this module alone knows: Ray. A job is a function of a model and an item, given the same wherever it runs.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from graphlens.analysis.arrays import Array
from graphlens.engine.machine import computing, limit_threads
from graphlens.errors import (
    GraphlensError,
    InputError,
    ModelFileError,
    RunError,
    RuntimeUnavailable,
    checked_number,
    is_one_of,
)

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer

# What a worker opens: a model, or a tuple of several.
Opened = TypeVar("Opened")
Item = TypeVar("Item")
Result = TypeVar("Result")
Rows: TypeAlias = Mapping[str, Sequence[bytes]]
Said: TypeAlias = "Mapping[str, str | int]"
RETRIES = 5  # how often a piece is begun again whose worker died: one that takes all memory would be for ever
_ERROR = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:: .*)?")  # how a traceback names an error
_CORES = 0.5  # of Ray's, asked for each worker: its threads are more often waiting for one another than at work


@dataclass(frozen=True)
class Workers:
    """The workers of a job.

    Args:
        count: How many; None for as many as the cluster's cores allow.
        threads: How many threads each computes with.
        allow_mixed: True takes part of the work to machines with another processor, ONNX Runtime or package version, whose
            results may differ in their last bits.

    Raises:
        InputError: For numbers out of range.
        RuntimeUnavailable: Without Ray.
    """

    count: int | None = None
    threads: int = 1
    allow_mixed: bool = False

    def __post_init__(self) -> None:
        if self.count is not None:
            checked_number(self.count, "workers", least=1)
        checked_number(self.threads, "threads", least=1)
        checked_number(self.allow_mixed, "allow_mixed", bool)
        if importlib.util.find_spec("ray") is None:
            raise RuntimeUnavailable("engine='ray' needs Ray: pip install 'graphlens-onnx[ray]'.")

    def said_of_each(self) -> dict[str, str | int]:
        """What ``computing()`` says in each worker, if its machine is like this one."""
        return {**computing(), "cores": self.threads}

    def spread(
        self, opened: Opened, job: Callable[[Opened, Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Does a job for each item, in workers that open the model once each.

        A worker that dies is replaced, and what it had begun is done again, up to five times.

        Args:
            opened: The model, or a tuple of models. Each is opened by its path, which every machine must have.
            job: A function of a module: (model or models, item) -> result. Both are pickled.
            items: What to do it for.

        Yields:
            (item, its result), as they are done.

        Raises:
            InputError: A machine is not like this one, which names what differs.
            ModelFileError: A machine does not have the model, or has another one, under its path.
            GraphlensError: What the job raises.
            RunError: Ray could not do it.
        """
        for each in opened if isinstance(opened, tuple) else (opened,):
            _ensure_plain(each)
        import ray
        import ray.data

        if not ray.is_initialized():
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        _quiet(ray.data)
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        most = min(len(items), self.count or max(1, cores // self.threads))
        given = (pickle.dumps(opened), pickle.dumps(job), self.threads, self.said_of_each(), self.allow_mixed)
        rows = [{"item": pickle.dumps(item)} for item in items]
        work = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=given,
            batch_size=1,
            num_cpus=_CORES,
            compute=ray.data.ActorPoolStrategy(size=most),
            max_task_retries=RETRIES,
        )
        try:
            for row in work.iter_rows():
                result, error = cast("tuple[Result, GraphlensError | None]", pickle.loads(row["result"]))
                if error is not None:
                    raise error
                yield cast("Item", pickle.loads(row["item"])), result
        except ray.exceptions.RayError as error:
            cause = _cause(str(error))
            if cause is None and isinstance(error, ray.exceptions.RayActorError):
                raise RunError(
                    f"Ray could not finish: one piece of the work ended {RETRIES + 1} workers, one after the other, as it does "
                    "where memory is short. Take fewer workers, or smaller batches (batch_size, batch_tokens)."
                ) from error
            raise RunError(f"Ray could not finish: {cause or str(error).strip():.300}") from error


def workers_of(engine: str, workers: int | None, threads: int, allow_mixed: bool) -> Workers | None:
    """The workers of an experiment as a user asks for them.

    Args:
        engine: "local" or "ray".
        workers: See ``Workers``.
        threads: See there.
        allow_mixed: See there.

    Returns:
        The workers; None for "local".

    Raises:
        InputError: For another engine, and numbers out of range.
        RuntimeUnavailable: Without Ray.
    """
    if not is_one_of(engine, ("local", "ray")):
        raise InputError(f"engine={engine!r}: there are 'local' and 'ray'.")
    return Workers(workers, threads, allow_mixed) if engine == "ray" else None


def _ensure_plain(opened: object) -> None:
    """Raises InputError where something is active that a worker would not have."""
    active = cast("HookedTransformer[Array]", opened).runner.active()
    if active.hooks or active.interventions:
        what = "a Python hook" if active.hooks else "an intervention"
        raise InputError(
            f"{what} is active, and Ray's workers open the model without: take it off, or bake it into a model of its own "
            "(graphlens.bake_model with keep_hooks)."
        )


class _Worker:
    """A worker: its model, opened for the threads that it has."""

    def __init__(self, opened: bytes, job: bytes, threads: int, wanted: Said, allow_mixed: bool) -> None:
        limit_threads(threads)
        self._opened: object = None
        self._refused: GraphlensError | None = None  # raised here, Ray would begin the worker again and again
        apart = [] if allow_mixed else _differences(wanted, computing())
        if apart:
            self._refused = InputError(
                f"a worker's machine is not like the one that asks ({'; '.join(apart)}), so that its results may differ in "
                "their last bits. Keep it out, or pass allow_mixed=True."
            )
        else:
            try:
                self._opened = pickle.loads(opened)
            except ModelFileError as error:
                self._refused = ModelFileError(
                    f"node {platform.node()} cannot open the model: {error} Ray's workers open it by its path, under which "
                    "every machine must have the same files."
                )
            except GraphlensError as error:  # a provider that only this machine lacks, say
                self._refused = error
        self._job = pickle.loads(job)

    def __call__(self, batch: Rows) -> Rows:
        results = []
        for item in batch["item"]:
            try:
                if self._refused is not None:
                    raise self._refused
                results.append(pickle.dumps((self._job(self._opened, pickle.loads(item)), None)))
            except GraphlensError as error:  # Ray would try it again, and show a traceback
                results.append(pickle.dumps((None, error)))
        return {"item": batch["item"], "result": results}


def _cause(said: str) -> str | None:
    """The line of Ray's traceback that names the error of a worker; None where there is none. Ray's advice stands behind it."""
    lines = [line for line in said.splitlines() if _ERROR.fullmatch(line) and not line.startswith("ray.")]
    return lines[-1] if lines else None


def _differences(wanted: Said, found: Said) -> list[str]:
    """What two machines do not have in common."""
    names = dict.fromkeys([*wanted, *found])
    return [
        f"{name} {found.get(name)}, not {wanted.get(name)}" for name in names if wanted.get(name) != found.get(name)
    ]


def _quiet(data: ModuleType) -> None:
    """No bars and reports of Ray's: graphlens shows its own."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
