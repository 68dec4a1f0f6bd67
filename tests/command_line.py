"""Commands in this process, by the console script's own entry point: a process of its own takes seconds to import all."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from graphlens.cli.app import main


def graphlens(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What a command printed, and the code that it exited with."""
    command = ["graphlens", *map(str, arguments)]
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = command
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(command, int(ended.value.code or 0), out.getvalue(), err.getvalue())
