"""What harvests and sweeps on a local Ray give, printed as JSON: run by test_on_ray.py in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
from graphlens.experiments import on_ray as runner
from graphlens.experiments.on_ray import Workers
from graphlens.metrics import LogitDiff
from graphlens.patching import grid
from tests.scale.harvests import Unopenable, dies, divides

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


def fresh(model: HookedTransformer) -> HookedTransformer:
    """The model as a worker has it: opened with one thread."""
    limit_threads(1)
    try:
        return HookedTransformer.from_onnx(model.runner.engine.path)
    finally:
        limit_threads(0)


def estimates(model: HookedTransformer, given: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """How far estimates on Ray are from those of one process."""
    there = graphlens.attribution_pairs(model, *given, engine="ray", workers=2, **options)
    here = graphlens.attribution_pairs(fresh(model), *given, **options)
    assert here.examples is not None
    assert there.examples is not None
    return {
        "estimates apart": float(np.abs(here.examples.values - there.examples.values).max()),
        "estimates scale": float(np.abs(here.examples.values).max()),
    }


def drifts(model: HookedTransformer, prompts: list[str]) -> dict[str, Any]:
    """Whether a drift on Ray has the figures of one process, all bits of them."""
    others = []
    for each in (model, fresh(model)):
        other = HookedTransformer.from_onnx(model.runner.engine.path) if each is model else fresh(model)
        other.set_weights({"blocks.1.attn.W_O": np.asarray(model.W_O[1]) * 1.01})
        others.append((each, other))
    prompts = [*prompts, "Anna", "Tom and Anna and Mary"]
    options: dict[str, Any] = {"batch_size": 2, "verbose": False}
    there = graphlens.drift_prompts(*others[0], prompts, engine="ray", workers=2, **options)
    here = graphlens.drift_prompts(*others[1], prompts, **options)
    figures = [[(s.hook, s.relative, s.fresh, s.heads, s.fresh_heads) for s in each.sites] for each in (here, there)]
    others[0][1].add_hook("blocks.0.hook_resid_pre", lambda value, hook: None)
    hooked = said(lambda: graphlens.drift_prompts(*others[0], prompts, engine="ray", **options))
    return {
        "drift equal": figures[0] == figures[1] and here.logits == there.logits,
        "drift": here.logits,
        "drift hooked": hooked,
    }


def without_the_model(folder: Path) -> str:
    """What is said where a worker finds no model under the path that this process opened it by."""
    source = HookedTransformer.from_pretrained("tiny-gpt2").runner.engine.path.parent
    here = folder / "model-here"
    shutil.copytree(source, here)
    model = HookedTransformer.from_onnx(here)
    here.rename(folder / "model-there")
    return said(lambda: graphlens.drift_prompts(model, model, ["a text"], engine="ray", workers=1, verbose=False))


def failures(model: HookedTransformer) -> dict[str, Any]:
    """What is said of jobs and models that fail in a worker."""
    runner.RETRIES = 1
    cases = {"dies": (model, dies), "divides": (model, divides), "unopenable": (Unopenable(model), divides)}
    return {
        name: said(lambda opened=opened, job=job: list(Workers(1).spread(opened, job, [0])))
        for name, (opened, job) in cases.items()
    }


def as_ray_data(made: graphlens.Harvest) -> dict[str, Any]:
    """What Ray Data gives of a harvest."""
    names = ["blocks.1.attn.hook_z", "tokens"]
    data = made.to_ray(names)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in data.iter_batches(batch_size=37, batch_format="numpy"):
        for name in names:
            columns[name].append(batch[name])
    read = {name: np.concatenate(parts) for name, parts in columns.items()}
    order = np.lexsort((read["blocks.1.attn.hook_z"][:, 0, 0], read["tokens"]))  # blocks come in any order
    z, tokens = made["blocks.1.attn.hook_z"][:], made.tokens[:]
    wanted = np.lexsort((z[:, 0, 0], tokens))
    return {
        "ray data": bool(np.array_equal(read["blocks.1.attn.hook_z"][order], z[wanted])),
        "ray tokens": bool(np.array_equal(read["tokens"][order], tokens[wanted])),
        "ray count": [int(data.count()), len(made)],
        "ray columns": list(data.schema().names),
    }


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
    here = graphlens.sweep_pairs(fresh(model), clean, corrupted, sites, metric, **options)
    assert here.examples is not None
    assert there.examples is not None
    facts["sweep apart"] = float(np.abs(here.examples.values - there.examples.values).max())
    facts["sweep scale"] = float(np.abs(here.examples.values).max())
    facts |= estimates(model, (clean, corrupted, sites, metric), options) | drifts(model, clean)
    facts["elsewhere"] = without_the_model(folder)
    facts |= failures(model)
    made = graphlens.Harvest(folder / "1")
    facts |= as_ray_data(made)

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
