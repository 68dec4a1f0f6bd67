"""Virtual environments that the tool makes for the libraries it compares with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

TORCH = "torch==2.13.0"  # the CPU's build where the index offers it; unpinned, it may bring gigabytes of CUDA


class NoEnvironment(Exception):
    """An environment could not be made: pip refused, or had no network."""


@dataclass(frozen=True)
class Environment:
    """Packages that live together: ``requirements`` as pip takes them, in a folder called ``name``.

    ``enough``: distributions, each with how its version begins ("" for any). An interpreter that runs this tool and has all of
    them is used as it is, and nothing is made.
    """

    name: str
    requirements: tuple[str, ...]
    enough: tuple[tuple[str, str], ...] = ()

    def python(self, workdir: Path) -> Path:
        """The interpreter, made below ``workdir`` where there is none yet. Raises NoEnvironment."""
        if self.enough and all(_installed(name, version) for name, version in self.enough):
            return Path(sys.executable)
        folder = workdir / self.name
        python, ready = folder / "bin" / "python", folder / "ready"
        wanted = "\n".join(self.requirements)
        if ready.is_file() and ready.read_text() == wanted:
            return python
        commands = [[str(python), "-m", "pip", "install", "-q", *self.requirements]]
        if not python.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            commands.insert(0, [sys.executable, "-m", "venv", str(folder)])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise NoEnvironment(f"{self.name}: {' '.join(command[1:4])} ended with {done.returncode}: {said}")
        ready.write_text(wanted)
        return python


def _installed(name: str, version: str) -> bool:
    try:
        return metadata.version(name).startswith(version)
    except metadata.PackageNotFoundError:
        return False


TRANSFORMERS = Environment("peers-transformers", ("transformers>=5.0", TORCH), (("transformers", "5."), ("torch", "")))
NINE = Environment(
    "peers-transformer-lens-3.9", ("transformer-lens==3.9.0", TORCH), (("transformer-lens", "3.9."), ("torch", ""))
)
SAELENS = Environment("peers-sae-lens-6.54", ("sae-lens==6.54.*", TORCH))
# nnsight and TransformerLens 4.3 resolve to the same torch and transformers. From transformers 5.24 on, GPT-2's blocks
# call the KV cache another name, which TransformerLens 4.3.0 passes over: it then generates as if without a prompt.
FOUR = Environment("peers-transformer-lens-4.3", ("transformer-lens==4.3.*", "nnsight", "transformers==5.23.*", TORCH))
