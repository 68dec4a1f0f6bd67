"""What harvests and sweeps on a local Ray give, printed as JSON: run by test_on_ray.py in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import graphlens
from graphlens import HookedTransformer
from graphlens.engine.machine import limit_threads
from graphlens.errors import GraphlensError
from graphlens.experiments.on_ray import Workers
from graphlens.metrics import LogitDiff
from graphlens.patching import grid

CORPUS = [
    f"When {one} and {other} went to the store on day {day}, {one} gave a drink to" + " Mary" * (day % 5)
    for day in range(60)
    for one, other in (("John", "Mary"), ("Tom", "Anna"))
]
NAMES = ["*.hook_resid_post", "blocks.1.attn.hook_z"]
OPTIONS: dict[str, Any] = {"shard_tokens": 100, "batch_tokens": 64, "verbose": False}


def digest(folder: Path) -> str:
    """Of every file's name and bytes."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def said(work: Any) -> str:
    """The error that a call ends in."""
    try:
        work()
    except GraphlensError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def workers_there() -> list[int]:
    """The processes of Ray's workers that do jobs."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = place.read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::MapWorker"):
            found.append(int(place.parent.name))
    return found


def kill_one(out: Path, killed: list[int]) -> None:
    """Kills a worker once some shards are there."""
    while len(list(out.glob("shard-*.safetensors"))) < 3:
        time.sleep(0.005)
    pid = workers_there()[0]
    os.kill(pid, signal.SIGKILL)
    killed.append(pid)


def local(folder: Path) -> dict[str, Any]:
    """A harvest in one process with one thread."""
    limit_threads(1)
    model = HookedTransformer.from_pretrained("tiny-gpt2")
    graphlens.harvest(model, CORPUS, NAMES, folder / "local", reduce=["mean", "covariance"], keep=True, **OPTIONS)
    return {"local": digest(folder / "local")}


def on_ray(folder: Path) -> dict[str, Any]:
    """All that is done on Ray."""
    model = HookedTransformer.from_pretrained("tiny-gpt2")
    ray: dict[str, Any] = {"engine": "ray", "reduce": ["mean", "covariance"], "keep": True, **OPTIONS}
    facts: dict[str, Any] = {}
    for count in (1, 2):
        graphlens.harvest(model, CORPUS, NAMES, folder / f"{count}", workers=count, **ray)
        facts[f"{count} workers"] = digest(folder / f"{count}")
    killed: list[int] = []
    out = folder / "killed"
    threading.Thread(target=kill_one, args=(out, killed), daemon=True).start()
    graphlens.harvest(model, CORPUS, NAMES, out, workers=2, **ray)
    facts |= {"killed": killed, "after a kill": digest(out)}
    # Half of the shards are made in a first run, which ends; the rest by others.
    resumed = folder / "resumed"
    graphlens.harvest(model, CORPUS, NAMES, resumed, workers=2, **ray)
    for shard in sorted(resumed.glob("shard-*.safetensors"))[::2]:
        shard.unlink()
    facts["without half"] = graphlens.Harvest(resumed).verify()
    graphlens.harvest(model, CORPUS, NAMES, resumed, workers=1, resume=True, **ray)
    facts["resumed"] = digest(resumed)

    names = ("John", "Mary", "Tom")
    clean = [f"{a} and {b} went home and {a} saw" for a in names for b in names if a != b]
    corrupted = [f"{a} and {b} went home and {b} saw" for a in names for b in names if a != b]
    metric = LogitDiff(
        [f" {b}" for a in names for b in names if a != b], [f" {a}" for a in names for b in names if a != b]
    )
    sites = grid("z", ("layer", "head"), {"layer": range(2), "head": range(model.cfg.n_heads)})
    options: dict[str, Any] = {"batch_size": 2, "per_example": True, "verbose": False}
    there = graphlens.sweep_pairs(model, clean, corrupted, sites, metric, engine="ray", workers=2, **options)
    limit_threads(1)
    fresh = HookedTransformer.from_onnx(model.runner.engine.path)
    here = graphlens.sweep_pairs(fresh, clean, corrupted, sites, metric, **options)
    limit_threads(0)
    assert here.examples is not None
    assert there.examples is not None
    facts["sweep apart"] = float(np.abs(here.examples.values - there.examples.values).max())
    facts["sweep scale"] = float(np.abs(here.examples.values).max())

    real = Workers.said_of_each
    Workers.said_of_each = lambda self: {**real(self), "onnxruntime": "0.9"}  # type: ignore[method-assign]
    facts["other"] = said(lambda: graphlens.harvest(model, CORPUS[:9], NAMES, folder / "other", workers=1, **ray))
    mixed = lambda: graphlens.harvest(model, CORPUS[:9], NAMES, folder / "mix", workers=1, allow_mixed=True, **ray)  # noqa: E731
    facts["mixed"] = said(mixed)
    Workers.said_of_each = real  # type: ignore[method-assign]
    large = HookedTransformer.from_pretrained("tiny-gpt2")
    large.set_weights({"embed.W_E": np.asarray(large.W_E) * 1e7})
    half = {**ray, "dtype": "float16", "reduce": ()}
    facts["too large"] = said(
        lambda: graphlens.harvest(large, CORPUS[:9], "blocks.0.hook_resid_pre", folder / "half", workers=1, **half)
    )
    model.add_hook("blocks.0.hook_resid_pre", lambda value, hook: None)
    facts["hooked"] = said(
        lambda: graphlens.sweep_pairs(model, clean, corrupted, sites, metric, engine="ray", verbose=False)
    )
    return facts


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps({"local": local, "ray": on_ray}[sys.argv[1]](Path(root))))
