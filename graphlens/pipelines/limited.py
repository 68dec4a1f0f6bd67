"""A process of its own for what a stranger's file may do to the one that opens it: so much memory and time, and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# ``python -m`` would look for modules in the working folder first, and that may be the very folder of the file (-P).
_CHILD = (
    "import sys; root, name = sys.argv[1:3]; root in sys.path or sys.path.insert(0, root); "
    "from importlib import import_module; sys.exit(import_module(name).main(*sys.argv[3:]))"
)


def run_child(module: str, arguments: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Calls a module's ``main`` with some texts, in a new process.

    Args:
        module: The module's dotted name.
        arguments: What ``main`` gets. What it returns is the exit code.
        timeout: How many seconds the process may be there.

    Returns:
        How it ended, and what it printed.

    Raises:
        subprocess.TimeoutExpired: It did not end in time, and was ended.
    """
    return subprocess.run(
        [sys.executable, "-P", "-c", _CHILD, str(Path(__file__).parents[2]), module, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},  # it would leave a file among the temporary ones
        stdin=subprocess.DEVNULL,
    )


def ended_by(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended that crashed, in words: "signal 9".

    Args:
        done: The process.
    """
    return f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"


def limit(memory: int, seconds: float) -> bool:
    """Limits the memory and the processor time of this process.

    Args:
        memory: Bytes.
        seconds: Seconds on each processor.

    Returns:
        False where the system has no limit of memory that holds.
    """
    try:
        import resource
    except ImportError:  # Windows
        return False

    for kind, most in (
        (resource.RLIMIT_DATA, memory),  # not the address space: weights are mapped, and take no memory of their own
        (resource.RLIMIT_CPU, int(seconds * (os.cpu_count() or 1)) + 1),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, hard))
    return sys.platform == "linux"
