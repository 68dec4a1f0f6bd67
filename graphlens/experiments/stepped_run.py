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


_LOOK = 0.5  # seconds after which a run that waits looks whether it is wanted at all


class Company:
    """Runs that end together.

    Attributes:
        over: Set to True it ends all of them, wherever they are. To set it takes a single step, in which no Ctrl-C can come.
    """

    over = False


class SteppedRun(Generic[Result]):
    """A run in a thread of its own that only computes while ``advance`` is waiting for it.

    Two runs that take turns hold what is between two hook points each, and never all of their activations.

    Args:
        run: Makes the run. It is given a function to call at each hook point, in firing order.
        at: Is called there while the run goes on.
        waits: True where the run may not go on yet; it is asked again by each ``advance``.
        company: The runs that it ends with.

    Attributes:
        result: What ``run`` gave, once it is done.
        done: True then.
    """

    def __init__(
        self, run: Callable[[Passing], Result], at: At, waits: Callable[[Firing], bool], company: Company
    ) -> None:
        self._run, self._at, self._waits, self._company = run, at, waits, company
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
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
        """Ends the run and its company, wherever they are, and waits for this one's end."""
        self._company.over = True
        if self._thread is not None and self._thread.is_alive():
            self._go.release()
            self._thread.join()
        self.done = True

    def _work(self) -> None:
        self._wait()
        try:
            if not self._company.over:
                self.result = self._run(self._passing)
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits for the run
            if not isinstance(error, _Given):
                self._error = error
        self.done = True
        self._back.release()

    def _wait(self) -> None:
        """Waits for ``advance`` or the end. Who ends the run may be interrupted before it says so here."""
        while not self._go.acquire(timeout=_LOOK) and not self._company.over:
            pass

    def _passing(self, name: str, activation: Array) -> Array:
        """Called by the run at a hook point: waits there while it has to."""
        firing = name, self._fired.get(name, 0)
        while not self._company.over and self._waits(firing):
            self._back.release()
            self._wait()
        if self._company.over:
            raise _Given("this run was given up.")
        self._fired[name] = firing[1] + 1
        return self._at(firing, activation)
