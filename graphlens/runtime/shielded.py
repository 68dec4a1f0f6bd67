"""Work during which no signal handler runs inside: it is done in another thread while the caller's waits.

Python runs signal handlers in the main thread, wherever that is in Python code, and what a handler raises comes out there.
An exception that leaves Python code called by ONNX Runtime aborts the process, and at the first step of such a call
nothing can catch it. So the main thread never makes such calls itself. A thread that waits can be interrupted anywhere.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, NoReturn, Protocol, TypeVar, cast

from graphlens.runtime.bell import Bell
from graphlens.runtime.thread_state import ThreadState

Result = TypeVar("Result")
# Seconds after which the waiting thread looks for signals that did not wake it: those sent to another thread, and on
# Windows all of them. An interrupted hook gets as long to end by itself.
LOOK = 0.05


class Interruptible(Protocol):
    """Work that can be ended early."""

    def interrupt(self, error: BaseException) -> None:
        """Ends the work at the next chance.

        Args:
            error: What a signal handler raised.
        """

    def insist(self, error: BaseException) -> None:
        """Is called again and again while the work has not ended in spite of ``interrupt``.

        Args:
            error: See ``interrupt``.
        """


class _Job(Generic[Result]):
    """Work on its way through another thread.

    Attributes:
        taken: True once a thread has begun with it.
        ended: True once that thread is done with it.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._state = ThreadState()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self.taken = self.ended = False

    def do(self) -> None:
        """Does the work. What it raises is kept."""
        try:
            self._result = self._state.run(self._work)
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for the end, in a way that signal handlers can interrupt. The main thread alone may call it.

        Args:
            seconds: How long at most.

        Returns:
            True if the work has ended.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while not self.ended:
            left = LOOK if until is None else until - time.monotonic()
            if left <= 0:
                break
            bell.wait(left)  # which may have rung for another job, one that was left
            if not self.taken and not _idle:  # the thread that was idle does something else, which was left to it
                _Worker().start()
        return self.ended

    def outcome(self) -> Result:
        """What the work gave, or raises what it raised. The caller's thread gets its state as the work left it."""
        self._state.take_back()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise_as_it_is(error)
            finally:
                del error  # its traceback leads here: a circle
        return cast(Result, self._result)


def raise_as_it_is(error: BaseException) -> NoReturn:
    """Raises an error again, and leaves what it says of its cause.

    Args:
        error: The error.
    """
    cause, context, suppressed = error.__cause__, error.__context__, error.__suppress_context__
    try:
        raise error
    finally:
        if context is not None:
            error.__cause__, error.__context__ = cause, context
            error.__suppress_context__ = suppressed
        del error, cause, context


class _Worker(threading.Thread):
    """A thread that does one job after another. It waits for the next when there is none."""

    def __init__(self) -> None:
        super().__init__(name="graphlens-hooks", daemon=True)

    def run(self) -> None:
        """Does what is put into ``_jobs``; a job that was put there twice is done once."""
        _idle.add(self)
        while True:
            job = _jobs.get()
            if not job.taken:
                job.taken = True
                _idle.discard(self)
                _under_way.add(job)
                job.do()
                _under_way.discard(job)
                _idle.add(self)
                job.ended = True
                del job
                bell.ring()
            else:
                del job


_jobs: queue.SimpleQueue[_Job[object]] = queue.SimpleQueue()
_idle: set[_Worker] = set()
_under_way: set[_Job[object]] = set()
bell = Bell()  # rings at the end of each job
_main_thread = threading.main_thread().ident


def _forget_all() -> None:
    """In a forked process there are no other threads."""
    global _jobs, bell, _main_thread
    _jobs, bell, _main_thread = queue.SimpleQueue(), Bell(), threading.main_thread().ident
    _idle.clear()
    _under_way.clear()


@atexit.register
def _wait_for_all() -> None:
    """Work that was left (see ``shielded``) ends before the interpreter does: a thread cannot be stopped inside ONNX
    Runtime."""
    for job in tuple(_under_way):
        job.wait()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def shielded(work: Callable[[], Result], ends: Interruptible) -> Result:
    """Does some work where what signal handlers raise cannot come out inside it.

    In the main thread the work is done by another thread, which sees this one's context variables and torch settings; in
    all other threads, where Python runs no handlers, at once. What a handler raises ends the work and is raised here as
    soon as it has ended. A second interruption, of work that does not end, is raised at once: the work is then left to end
    by itself, and has no effect on what follows.

    Args:
        work: The function to call.
        ends: Ends the work early.

    Returns:
        What the work gave.

    Raises:
        BaseException: Whatever the work raises, and what a signal handler raised while it was done.
    """
    if threading.get_ident() != _main_thread:
        return work()
    if not _idle:
        try:
            _Worker().start()
        except RuntimeError:  # at its very end the interpreter starts no more threads
            return work()
    job = _Job(work)
    told = cast("_Job[object]", job)
    try:
        _jobs.put(told)
        job.wait()
    except BaseException as error:
        ends.interrupt(error)
        _jobs.put(told)  # where the interruption came before the first time
        while not job.wait(LOOK):
            ends.insist(error)
        raise
    return job.outcome()


def raise_in(thread: int, kind: type[BaseException]) -> None:
    """Raises an exception in another thread, at its next step in Python.

    It cannot be taken back: Python 3.11 then goes on looking for it at every step, and for ever in a thread that is traced.

    Args:
        thread: The thread's ``threading.get_ident()``.
        kind: The exception's class.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
