"""What the tests of harvests share: a corpus of odd lengths, the harvest that is killed, and what lies in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import graphlens

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ["blocks.[13].hook_resid_post", "blocks.1.attn.hook_z"]
LAST = "blocks.3.hook_resid_post"
# Several shards and several runs in each; activations and statistics.
KILLED: dict[str, Any] = {
    "reduce": ["covariance", "top"],
    "keep": True,
    "dtype": "float16",
    "batch_tokens": 150,
    "shard_tokens": 260,
    "verbose": False,
}


def rows(count: int = 23, longest: int = 61, vocabulary: int = 800, seed: int = 0) -> list[list[int]]:
    """Documents of random ids and odd lengths. The fourth is empty."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    lengths[3:4] = 0
    return [random.integers(1, vocabulary, length).tolist() for length in lengths]


def content(folder: Path) -> dict[str, str]:
    """The digest of each file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def harvested(out: Path | str, resume: bool = False, **options: Any) -> graphlens.Harvest:
    """The harvest that is killed, made in this process."""
    model = graphlens.HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
    return graphlens.harvest(model, rows(), NAMES, out, resume=resume, **{**KILLED, **options})


def killed_at(event: int, out: Path) -> int:
    """Runs the harvest in a process that is killed right before an event of the file system in its folder.

    ``event``: Which; -1 for none. Returns how many events there were before the end.
    """
    code = f"from tests.scale.harvests import play; play({event}, {str(out)!r})"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.returncode == (0 if event < 0 else -signal.SIGKILL), (event, done.stderr)
    return int(json.loads(done.stdout)) if event < 0 else event


def play(event: int, out: str) -> None:
    """What ``killed_at`` runs in a process of its own."""
    seen = 0

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate") and str(arguments[0]).startswith(out):
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)
    harvested(Path(out))
    print(json.dumps(seen))


# Jobs for Ray's workers, which import them by name.


def dies(model: graphlens.HookedTransformer, item: int) -> None:
    """Takes its worker along, as one does that needs more memory than there is."""
    os._exit(3)


def divides(model: graphlens.HookedTransformer, item: int) -> float:
    """Raises what is no error of graphlens."""
    return 1 / item


class Unopenable:
    """Something whose copy cannot be opened in another process."""

    def __init__(self, model: graphlens.HookedTransformer) -> None:
        self.runner = model.runner

    def __reduce__(self) -> tuple[Any, ...]:
        return _unavailable, ()


def _unavailable() -> None:
    raise graphlens.RuntimeUnavailable("there is no such provider here")
