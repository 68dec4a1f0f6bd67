"""Python inside a running graph: an operator that hands an activation to Python and goes on with what it returns.

An exception that leaves such an operator aborts the whole process, so nothing may: it is kept, the run is stopped, and
it is raised after the run. What a signal handler raises is no exception to that: see ``runtime/entry.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from sys import getprofile, gettrace
from types import SimpleNamespace
from typing import NoReturn, TypeVar

import numpy as np

from graphlens.errors import GraphlensError, RunError
from graphlens.runtime import ctrl_c, entry
from graphlens.runtime.entry import Stoppable, here
from graphlens.runtime.tracing import Tracing, switched_off
from graphlens.runtime.types import Array, Callback

Result = TypeVar("Result")
_run_ids = itertools.count(1)
_ROOM = 16  # more than the calls, in Python and in C, that lead from a run to where a callback's errors are caught


class Enough(RunError):
    """Raised by a callback that ends its run: nothing more of it is wanted, so nothing more is computed or copied."""


def _raise_as_it_is(error: BaseException) -> NoReturn:
    """Raises an error again, and leaves what it says of its cause."""
    cause, context, suppressed = error.__cause__, error.__context__, error.__suppress_context__
    try:
        raise error
    finally:
        if context is not None:
            error.__cause__, error.__context__ = cause, context
            error.__suppress_context__ = suppressed
        del error, cause, context


def _ensure_room(levels: int) -> None:
    """Raises RecursionError if so many calls cannot follow. In a call from C++ it could not be raised."""
    if levels:
        _ensure_room(levels - 1)


class PythonCalls:
    """The callbacks of one run.

    Args:
        callbacks: Functions by the place of their hook point in the graph's hook map.

    Attributes:
        error: What a callback raised.
        options: Stops the run.
    """

    def __init__(self, callbacks: Mapping[int, Callback]) -> None:
        self._callbacks = {str(place): callback for place, callback in callbacks.items()}  # as calls name them
        self._id = next(_run_ids)
        self._tracing: Tracing | None = None
        self._interrupted = False
        self.error: BaseException | None = None
        self.options: Stoppable = SimpleNamespace(terminate=False)  # before the run has begun

    @property
    def run_id(self) -> Array:
        """The int64 scalar to feed. The graph's calls hand it on."""
        return np.asarray(self._id, np.int64)

    def on_start(self, options: Stoppable) -> None:
        """Takes what stops the run early. ``Session.run_on_device`` calls this when the run begins.

        Args:
            options: The run's options.
        """
        self.options = options
        if self.error is not None or self._interrupted:
            options.terminate = True

    def run(self, work: Callable[[], Result]) -> Result:
        """Makes the run, in this thread.

        Args:
            work: Runs the session, feeding it ``run_id``.

        Returns:
            What ``work`` gave.

        Raises:
            BaseException: What a callback or a signal handler raised, else what ``work`` raises.
        """
        if entry.reinstall is not None:
            entry.reinstall()
        _ensure_room(_ROOM)
        turn, before, watched = entry.Turn(self), here.turn, False
        answers = entry.answers(self, turn)
        next(answers)
        turn.throw = answers.throw
        here.turn = turn
        try:
            self._tracing = switched_off()
            watched = ctrl_c.begin(self, before.calls)
            result = work()
        except GraphlensError:
            if self.error is None and not self._interrupted:
                raise
        except BaseException as error:  # a signal handler's, after ONNX Runtime said that the run was stopped
            if self.error is not None or self._interrupted:
                error.__context__ = self.error
            raise
        else:
            if self.error is None:
                return result
        finally:
            here.turn = before
            if watched:
                ctrl_c.end(before.calls)
            if self._tracing is not None:
                self._tracing.on()
        if self.error is None:
            raise KeyboardInterrupt  # a hook has caught the one that Python raised in it
        kept, self.error = self.error, None
        try:
            _raise_as_it_is(kept)
        finally:
            del kept

    def call(self, activation: Array, run: Array, attributes: Mapping[str, str]) -> Array:
        """Calls one callback, where it may raise.

        Args:
            activation: What the callback is given.
            run: The number of the run that called.
            attributes: "index" is the place of the callback's hook point in the graph's hook map.

        Returns:
            The activation to go on with: the one given once a callback has raised; none of it where the callback ended the run,
            so that nothing is copied.

        Raises:
            BaseException: What the callback raises.
        """
        if self.error is not None:
            return activation
        if run.item() != self._id:
            raise RunError(
                "a run with Python hooks was called back in the middle of another of the same thread (in greenlets, say): make "
                "one after the other, or each in a thread of its own."
            )
        if self._tracing is not None:
            self._tracing.on()
        try:
            return np.asarray(self._callbacks[attributes["index"]](activation), order="C")
        except Enough as error:
            self.error = error
            self.options.terminate = True
            return activation[:0]
        finally:
            self._tracing = switched_off() if gettrace() is not None or getprofile() is not None else None

    def interrupt(self) -> None:
        """Stops the run: Python is about to raise KeyboardInterrupt. May be called from any thread."""
        self._interrupted = True
        self.options.terminate = True
