"""Ctrl-C while the main thread is inside ONNX Runtime, between two hooks: the run stops at once.

What this module alone knows: that a signal has come, before Python calls its handler. It does that in the main thread alone, as
soon as that is in Python again: in the next hook, or at the end of the run. But the wakeup descriptor (``signal.set_wakeup_fd``)
is written to at once. A thread reads it, and stops the run if the handler is Python's own, which will raise
KeyboardInterrupt for certain. No handler is replaced and no signal masked. On Windows, and where somebody else has set a
descriptor, an interruption comes at the next hook or at the end of the run, as in runs without hooks.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from typing import Protocol

_NONE = -1  # what ``set_wakeup_fd`` gives where none was set


class Interruptible(Protocol):
    """A run."""

    def interrupt(self) -> None:
        """Stops it. May be called from any thread, and after its end."""


class _Watcher:
    """A pipe that signals are written to, and the thread that reads it.

    Attributes:
        run: The run that Ctrl-C stops.
        settled: True if nothing is left in the pipe that was meant for an earlier run.
    """

    def __init__(self) -> None:
        self.run: Interruptible | None = None
        self.settled = True
        self._other = _NONE  # somebody else's descriptor
        self._out, self._in = os.pipe()
        os.set_blocking(self._out, False)
        os.set_blocking(self._in, False)
        self._pipe = _identity(self._in)
        # Of this kind because a signal's handler may make a run while the main thread holds it.
        self._reading = threading.RLock()
        threading.Thread(target=self._read, name="graphlens-ctrl-c", daemon=True).start()

    def is_open(self) -> bool:
        """False once somebody has closed all files: another file may have the number since."""
        return _identity(self._in) == self._pipe

    def set(self) -> bool:
        """Has signals written to the pipe, unless they are to be written elsewhere.

        Returns:
            True if they are.
        """
        before = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        if before in (_NONE, self._in):
            return True
        self._other = before  # what came since goes there
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        return False

    def unset(self) -> None:
        """Undoes ``set``. What somebody else has set meanwhile stays."""
        now = signal.set_wakeup_fd(_NONE)
        if now not in (_NONE, self._in):
            signal.set_wakeup_fd(now, warn_on_full_buffer=False)

    def settle(self) -> None:
        """Sees to it that what has been written until now stops no run that begins later."""
        with self._reading:  # and so behind the thread, if that is at it
            self._take()
        self.settled = True

    def close(self) -> None:
        """Closes the pipe. In a forked process only, where no thread reads it."""
        if self.is_open() and _identity(self._out) == self._pipe:
            os.close(self._out)
            os.close(self._in)

    def _take(self) -> bytes:
        """What has been written, which somebody else may be waiting for."""
        numbers = _read(self._out)
        if numbers and self._other != _NONE:
            other, self._other = self._other, _NONE
            with contextlib.suppress(OSError):
                os.write(other, numbers)
        return numbers

    def _read(self) -> None:
        there = _waiting_for(self._out)
        while True:
            there.poll()
            with self._reading:
                if not self.is_open() or _identity(self._out) != self._pipe:
                    return
                numbers = self._take()
                run = self.run
                if run is not None and signal.SIGINT in numbers and _will_raise():
                    run.interrupt()


_watcher: _Watcher | None = None


def _identity(descriptor: int) -> tuple[int, int] | None:
    """Which file a descriptor stands for."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _waiting_for(descriptor: int) -> select.poll:
    """What waits until a descriptor can be read."""
    found = select.poll()
    found.register(descriptor, select.POLLIN)
    return found


def _read(descriptor: int) -> bytes:
    """What there is to read."""
    try:
        return os.read(descriptor, 512)
    except BlockingIOError:  # nothing, or somebody else has read it
        return b""


def _will_raise() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def begin(run: Interruptible, around: Interruptible | None) -> bool:
    """Has Ctrl-C stop a run from now on.

    Args:
        run: The run.
        around: The run whose hook makes this one.

    Returns:
        True if it will, and ``end`` is to be called: in the main thread, which alone Ctrl-C interrupts.
    """
    global _watcher
    if threading.get_ident() != threading.main_thread().ident or sys.platform == "win32":
        return False
    if _watcher is None or not _watcher.is_open():
        try:
            _watcher = _Watcher()
        except (OSError, RuntimeError):  # too many open files; no new threads at the interpreter's end
            return False
    if around is None and not _watcher.settled:
        _watcher.settle()
    _watcher.settled = False
    _watcher.run = run
    return _watcher.set()


def end(around: Interruptible | None) -> None:
    """The run is over.

    Args:
        around: The run that goes on then.
    """
    if _watcher is not None:
        _watcher.run = around
        if around is None:
            _watcher.unset()
            _watcher.settle()


def _forget() -> None:
    """In a forked process no thread reads the pipe, and it is also the parent's."""
    global _watcher
    watcher, _watcher = _watcher, None
    if watcher is not None:
        watcher.unset()
        watcher.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
