"""Faults for everything that writes: the warmed process, a folder for each case, and what must hold after it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.jobs import NEW, OLD

REPOSITORY = Path(__file__).resolve().parents[2]


class Faults:
    """The warmed process and its templates.

    Args:
        root: A folder for all cases. Other users can look into it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        os.chmod(root, 0o755)
        environment = {
            **os.environ,
            **{"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
            **{"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GRAPHLENS_CACHE": str(root / "cache")},
        }
        environment.pop("GRAPHLENS_PACKED_LIMIT", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warmed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        self.cpu = Counter[tuple[str, str]]()  # seconds
        self.templates = root / "templates"
        self.templates.mkdir()
        self.ask({"do": "templates", "folder": str(self.templates)})
        self.befores: dict[str, str] = {}
        self._wholes: dict[str, tuple[list[str], set[str]]] = {}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def ask_all(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers of forks that run at the same time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(list(requests)), file=self._process.stdin, flush=True)
        answers: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        for request, answer in zip(requests, answers, strict=True):
            self.cpu[request["do"], request.get("job", "")] += answer.get("cpu", 0.0)
            assert "traceback" not in answer, answer["traceback"]
        return answers

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of one fork."""
        (answer,) = self.ask_all([request])
        return answer

    def prepared(self, job: str, folder: Path | None = None) -> Path:
        """A folder with what a job needs."""
        made = folder or Path(tempfile.mkdtemp(dir=self.root))
        os.chmod(made, 0o755)
        self.ask({"do": "prepare", "job": job, "folder": str(made), "templates": str(self.templates)})
        return made

    def run(self, job: str, folder: Path, **more: Any) -> dict[str, Any]:
        """Does a job in its folder."""
        return self.ask({"do": "run", "job": job, "folder": str(folder), **more})

    def found(self, job: str, folder: Path, **more: Any) -> str:
        """What is in a job's folder: absent, old or new. Whatever else is there fails the test."""
        answer = self.ask({"do": "found", "job": job, "folder": str(folder), **more})
        assert "found" in answer, answer
        found: str = answer["found"]
        return found

    def whole(self, job: str) -> tuple[list[str], set[str]]:
        """The events of a job that nothing disturbs, and the names that it leaves."""
        if job not in self._wholes:
            folder = self.prepared(job)
            self.befores[job] = self.found(job, folder)
            answer = self.run(job, folder)
            assert answer.get("done"), answer
            assert self.found(job, folder) == NEW
            self._wholes[job] = answer["events"], names(folder)
            shutil.rmtree(folder)
        return self._wholes[job]

    def ends_well(self, job: str, folder: Path, allowed: Sequence[str], **more: Any) -> str:
        """What a fault left; a second run then succeeds and leaves what an undisturbed one does."""
        _, left = self.whole(job)
        state = self.found(job, folder, **more)
        assert state in allowed, (state, sorted(names(folder)))
        answer = self.run(job, folder, **more)
        # What is complete may be there already, and then nothing is to be done.
        assert (
            answer.get("done")
            or (state == NEW and "Choose another f" in answer["refused"])
            or (state == NEW and "holds an export already" in answer["refused"])
        ), answer
        assert self.found(job, folder, **more) == NEW
        assert names(folder) == left, names(folder) ^ left
        return state

    def killed(self, job: str, at: int) -> str:
        """Kills a job before one of its events, and makes sure of all that must hold then."""
        events, _ = self.whole(job)
        folder = self.prepared(job)
        answer = self.run(job, folder, at=at)
        assert answer.get("killed") == signal.SIGKILL, (events[at], answer)
        state = self.ends_well(job, folder, self.allowed(job))
        shutil.rmtree(folder)
        return state

    def allowed(self, job: str) -> list[str]:
        """What may be there after a fault: what was there before, or what the job makes, and never anything else."""
        self.whole(job)
        before = self.befores[job]
        # A sweep is saved in between, and a command has several results.
        return [before, NEW, *([OLD] if job in ("sweep", "patch", "attribute") else [])]


def room() -> Path:
    """A folder for all cases: in memory where there is room, since every file is written through to the disk."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="graphlens-faults-", dir=memory if os.access(memory, os.W_OK) else None))


def names(folder: Path) -> set[str]:
    """Everything that lies in a folder, but for the digests that the cache remembers of files: they come and go."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    kept = {name for name in found if not name.startswith("cache/digests") or name.endswith(".partial")}
    return kept if any(name.startswith("cache/") for name in kept) else kept - {"cache"}


def sample(events: Sequence[str], count: int) -> list[int]:
    """Some of a job's events: those around a rename first, where old becomes new, then others evenly."""
    renames = [at for at, event in enumerate(events) if event.startswith(("os.rename", "ctypes"))]
    first = [at for rename in reversed(renames) for at in (rename + 1, rename) if at < len(events)]
    evenly = [round(index * (len(events) - 1) / max(count - 1, 1)) for index in range(count)]
    chosen = list(dict.fromkeys(at for pair in zip(first + evenly, evenly + first, strict=True) for at in pair))
    return sorted(chosen[:count])
