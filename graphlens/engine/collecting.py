"""That Python's garbage collector has nothing to do while a model is opened, and would take a seventh of the time.

What this module alone knows: that opening imports and makes a hundred thousand objects, all of which stay, and that the
collector goes through all there are again and again as their number grows.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_lock = threading.Lock()
_paused = 0  # calls that go on now


def uncollected(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function during whose calls the collector rests, if it was on. Calls may overlap in several threads.

    Args:
        function: What is called.
    """

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        global _paused
        with _lock:
            pauses = _paused > 0 or gc.isenabled()  # not where the user has switched it off
            if pauses:
                _paused += 1
                gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if pauses:
                with _lock:
                    _paused -= 1
                    if not _paused:
                        gc.enable()

    return called
