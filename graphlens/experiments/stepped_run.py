"""Several runs side by side in one thread of control: each goes on until it would pass a hook point that it may not yet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from graphlens.analysis.arrays import Array
from graphlens.errors import RunError

Result = TypeVar("Result")
# A hook point, and how often it has fired before in this run.
Firing = tuple[str, int]
# What is done with an activation there: it gives the activation to go on with.
At = Callable[[Firing, Array], Array]
Passing = Callable[[str, Array], Array]


class _Given(RunError):
    """Ends a run that nobody waits for any more."""


class SteppedRun(Generic[Result]):
    """A run in a thread of its own that only computes while ``advance`` is waiting for it.

    Two runs that take turns hold what is between two hook points each, and never all of their activations.

    Args:
        run: Makes the run. It is given a function to call at each hook point, in firing order.
        at: Is called there while the run goes on.
        waits: True where the run may not go on yet; it is asked again by each ``advance``.

    Attributes:
        result: What ``run`` gave, once it is done.
        done: True then.
    """

    def __init__(self, run: Callable[[Passing], Result], at: At, waits: Callable[[Firing], bool]) -> None:
        self._run, self._at, self._waits = run, at, waits
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = False
        self._fired: dict[str, int] = {}
        self.result: Result | None = None
        self.done = False

    def advance(self) -> None:
        """Lets the run go on until it waits or is done.

        Raises:
            Exception: Whatever the run raised.
        """
        if self.done:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="graphlens stepped run", daemon=True)
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Ends the run, wherever it is."""
        self._given_up = True
        if self._thread is not None and self._thread.is_alive():
            self._go.release()
            self._thread.join()
        self.done = True

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._given_up:
                self.result = self._run(self._passing)
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits for the run
            if not isinstance(error, _Given):
                self._error = error
        self.done = True
        self._back.release()

    def _passing(self, name: str, activation: Array) -> Array:
        """Called by the run at a hook point: waits there while it has to."""
        firing = name, self._fired.get(name, 0)
        while not self._given_up and self._waits(firing):
            self._back.release()
            self._go.acquire()
        if self._given_up:
            raise _Given("this run was given up.")
        self._fired[name] = firing[1] + 1
        return self._at(firing, activation)
