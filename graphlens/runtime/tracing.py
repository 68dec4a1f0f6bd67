"""The tracer and the profiler of a thread, off while ONNX Runtime runs and on in hooks.

What this module alone knows: how to switch them off and on. Python calls them, where they are functions written in Python, on
the way into a hook, where what a signal handler raises in them would abort the process. A breakpoint in a hook still works.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from _typeshed import ProfileFunction, TraceFunction


class Tracing(NamedTuple):
    """What was switched off in a thread.

    Attributes:
        tracer: What ``sys.settrace`` set: a debugger, say.
        profiler: What ``sys.setprofile`` set.
    """

    tracer: TraceFunction | None
    profiler: ProfileFunction | None

    def on(self) -> None:
        """Switches them on."""
        if self.profiler is not None:
            sys.setprofile(self.profiler)
        if self.tracer is not None:
            sys.settrace(self.tracer)


def switched_off() -> Tracing | None:
    """Switches them off.

    Returns:
        What there was; None for nothing. A profiler in C (cProfile) stays on: it calls no Python.
    """
    tracer, profiler = sys.gettrace(), sys.getprofile()
    if tracer is None and profiler is None:
        return None
    found = Tracing(tracer if callable(tracer) else None, profiler if callable(profiler) else None)
    if found.tracer is not None:
        sys.settrace(None)
    if found.profiler is not None:
        sys.setprofile(None)
    return found
