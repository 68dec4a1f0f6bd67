"""Peak memory of a step of this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Peak:
    """The highest resident memory during a step.

    Attributes:
        bytes: Bytes; 0 until the step has ended, and on systems that do not tell.
        whole_process: True if it is the highest since the process started: the system could not begin anew.
    """

    bytes: int = 0
    whole_process: bool = False


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures the memory of a ``with`` block. What it gives is filled in when the block ends."""
    peak = Peak()
    try:
        # Linux alone can begin anew.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        peak.whole_process = True
    try:
        yield peak
    finally:
        peak.bytes = _high_water_mark()


def _high_water_mark() -> int:
    """The highest resident memory that the system has recorded for this process, in bytes; 0 on Windows."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
