"""The machine a benchmark ran on, as plain facts."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-extensions", "onnx-ir", "onnx", "numpy", "torch",
             "transformers", "transformer-lens", "nnsight")  # fmt: skip


def _field(path: str, key: str) -> str | None:
    """The value of the first ``key : value`` line of a /proc file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the working tree, with a + when it has changes."""
    folder = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


def describe_machine() -> dict[str, str]:
    """CPU, memory, system, versions, and the load average (1, 5, 15 minutes) now."""
    import graphlens

    memory = _field("/proc/meminfo", "MemTotal")
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        "CPU": f"{_field('/proc/cpuinfo', 'model name') or platform.processor()}, {os.cpu_count()} cores",
        "memory": f"{int(memory.split()[0]) / 1024**2:.1f} GiB" if memory else "unknown",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "graphlens": f"{graphlens.__version__} ({commit()})",
        **{name: version for name, version in packages.items() if version is not None},
        "load at start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
