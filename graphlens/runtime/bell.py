"""A bell that one thread waits for and others ring, made so that the waiting thread wakes soon.

``threading.Lock.release`` is called with Python's own lock held, which the thread that it wakes needs at once: that one is
put to sleep again and woken a second time. CPython's locks underneath can be used without it.
"""

from __future__ import annotations

import ctypes

_TAKEN, _MAY_BE_INTERRUPTED = 0, 1
# The same functions as in ``ctypes.pythonapi``, called without Python's own lock.
_functions = ctypes.CDLL(None, handle=ctypes.pythonapi._handle)
_allocate = _functions.PyThread_allocate_lock
_allocate.argtypes, _allocate.restype = (), ctypes.c_void_p
_acquire = _functions.PyThread_acquire_lock_timed
_acquire.argtypes, _acquire.restype = (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int), ctypes.c_int
_release = _functions.PyThread_release_lock
_release.argtypes, _release.restype = (ctypes.c_void_p,), None


class Bell:
    """One for the whole life of a process: its memory is never given back, since a thread may still be ringing it.

    Raises:
        MemoryError: There is not enough memory.
    """

    def __init__(self) -> None:
        self._lock = _allocate()
        if self._lock is None:
            raise MemoryError("a lock")
        _acquire(self._lock, _TAKEN, 0)

    def ring(self) -> None:
        """Wakes the thread that waits, or else the next that will."""
        _release(self._lock)

    def wait(self, seconds: float) -> None:
        """Waits until it rings, or has rung before. Any signal ends the wait too, and its handler is then called.

        Args:
            seconds: How long at most.
        """
        _acquire(self._lock, int(seconds * 1e6), _MAY_BE_INTERRUPTED)
