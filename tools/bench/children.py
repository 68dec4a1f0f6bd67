"""Fresh processes: a self-contained function run in one, with its wall time and peak memory."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_PROGRAM = """\
from __future__ import annotations
import time
started = time.monotonic()
{source}
result = {name}(*{arguments!r})
finished = time.monotonic()
import json
print()
print(json.dumps([started, finished, result]))
"""


@dataclass(frozen=True)
class ChildRun:
    """What a child did: what its function returned, seconds from spawning it to that return (``boot_seconds`` of them
    before its first line of Python), and the peak resident memory of its whole life in bytes."""

    result: Any
    seconds: float
    boot_seconds: float
    peak_bytes: int


def run_child(
    function: Callable[..., Any],
    *arguments: Any,
    python: str = sys.executable,
    variables: Mapping[str, str] | None = None,
) -> ChildRun:
    """Runs a function in a fresh interpreter (``python``: perhaps another environment's) and returns what it returned.

    ``variables``: the child's environment variables, None for this process's.

    The function's source is what travels: it must import all it uses, and take and return plain data. Raises
    RuntimeError with the child's last words when it fails. Linux and macOS (os.wait4).
    """
    source = textwrap.dedent(inspect.getsource(function))
    program = _PROGRAM.format(source=source, name=function.__name__, arguments=arguments)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        spawned = time.monotonic()  # one clock for all processes of a machine
        process = subprocess.Popen(
            [python, "-c", program], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=variables
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{function.__name__} failed ({process.returncode}):\n{err.read()[-4000:]}")
        started, finished, result = json.loads(out.read().splitlines()[-1])
    # Linux counts KiB, macOS bytes. A child's figure is never below its parent's: keep the measuring process small.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return ChildRun(result, finished - spawned, started - spawned, peak)
