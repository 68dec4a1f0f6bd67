"""The two commits that ``--against`` compares: copies of the package in temporary folders, each imported by its own processes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tools.bench.children import ChildRun, run_child
from tools.bench.machine import commit
from tools.bench.peers import ROOT, Peer, Worker
from tools.bench.workers.protocol import Job

_COPIED = ("graphlens", "models")


class WrongTree(Exception):
    """A process imported graphlens from elsewhere than the tree it was started for: its times are another commit's."""


@dataclass(frozen=True)
class Tree:
    """One of the two commits: its ``name`` in rows, the commit, the folder that holds its package, and a cache of its own."""

    name: str
    commit: str
    folder: Path
    cache: Path

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment of its processes: graphlens comes from its folder, this tool from the working tree.

        Python neither looks into the current folder first (it holds a graphlens too) nor does without compiled files.
        """
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join((str(self.folder), str(ROOT))),
            "PYTHONSAFEPATH": "1",
            "GRAPHLENS_CACHE": str(self.cache),
        }

    def child(self, function: Callable[..., Any], *arguments: Any) -> ChildRun:
        """Runs a function in a fresh process (see children.run_child) with this tree's graphlens."""
        return run_child(function, *arguments, variables=self.variables)

    def worker(self, case: str, hooked: Path, workdir: Path) -> Worker:
        """A process that stays and measures the case's works with this tree's graphlens."""
        peer = Peer(f"graphlens {self.commit}", None, "case", (case,))
        worker = Worker(peer, Job(case, "", str(hooked)), workdir, self.variables)
        try:
            self.require(worker.package)
        except WrongTree:
            worker.__exit__()
            raise
        return worker

    def require(self, package: str | None) -> None:
        """Raises WrongTree unless ``package``, the file of an imported graphlens, lies in this tree."""
        if package is None or not Path(package).is_relative_to(self.folder):
            raise WrongTree(f"{self.name} should import graphlens from {self.folder}, and imported it from {package}.")


@contextmanager
def both_trees(against: str, workdir: Path) -> Iterator[tuple[Tree, Tree]]:
    """(the given commit's tree, the working tree's), in temporary folders that are removed at the end.

    Raises SystemExit where git knows no such commit, WrongTree where a tree's processes import another graphlens.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workdir, prefix="against-") as home:
        make = partial(make_tree, Path(home).resolve())
        old, new = make("old", _short(against)), make("new", commit())
        _unpack(against, old.folder)
        copy_package(ROOT, new.folder)
        for tree in (old, new):
            tree.require(tree.child(_where).result)
        yield old, new


def make_tree(home: Path, name: str, commit: str) -> Tree:
    """A tree, still empty, and its cache below ``home``."""
    return Tree(name, commit, home / name, home / f"{name}-cache")


def copy_package(source: Path, folder: Path) -> None:
    """Copies the package and the embedded models out of a working tree."""
    for name in _COPIED:
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"git {arguments[0]} ended with {done.returncode}: {done.stderr.decode().strip()}")
    return done.stdout


def _short(against: str) -> str:
    return _git("rev-parse", "--short", "--verify", "--end-of-options", f"{against}^{{commit}}").decode().strip()


def _unpack(against: str, folder: Path) -> None:
    """Writes the commit's package and embedded models into a folder."""
    with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", against, *_COPIED))) as archive:
        archive.extractall(folder, filter="data")


# In a child


def _where() -> str:
    import graphlens

    return str(graphlens.__file__)
