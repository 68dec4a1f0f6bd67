"""Commands in this process, by the console script's own entry point: a process of its own takes seconds to import all."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from graphlens.cli.app import DEFECT, main


def graphlens(*arguments: str | Path, defect: bool = False) -> subprocess.CompletedProcess[str]:
    """What a command printed, and the code that it exited with. A defect of graphlens fails the test that met it."""
    command = ["graphlens", *map(str, arguments)]
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = command
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = argv
    code = int(ended.value.code or 0)
    assert (code == DEFECT) == defect, err.getvalue()
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def sentence(printed: str) -> str:
    """What a block on a terminal says, its frame and line breaks taken away."""
    return " ".join(printed.translate(str.maketrans("│╭╮╰╯─", "      ")).split())
