"""What a worker and the tool say to each other: a job in, then one line of JSON for each answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A piece of work, as plain data. Not every work reads every field.

    ``work``: one of peers.WORKS. ``checkpoint``: the folder with the weights. ``hooked``: graphlens's folder.
    ``files``: the folders of the files made for graphlens and the floor. ``tokens``: int [b, p].
    ``corrupted``: int [b, p], what a sweep runs on; ``tokens`` are then the clean ones. ``answers``: the two token ids
    of the logit difference. ``layer``: where a hook or an edit is. ``layers``: those a sweep patches, None for all.
    """

    work: str
    checkpoint: str
    hooked: str = ""
    files: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    corrupted: list[list[int]] = field(default_factory=list)
    answers: tuple[int, int] = (0, 1)
    layer: int = 0
    layers: list[int] | None = None
    new_tokens: int = 20


@dataclass(frozen=True)
class Work:
    """What is timed (``run``), and what its result says: ``check``, figures that every contender must find alike, by
    name; ``facts``, figures of this contender's own."""

    run: Callable[[], Any]
    check: Callable[[Any], Mapping[str, Any]]
    facts: Callable[[Any], Mapping[str, Any]] = lambda result: {}


def peak_bytes() -> int:
    """The peak resident memory of this process so far."""
    try:
        return _status_bytes("/proc/self/status", "VmHWM:")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def proportional_bytes() -> int:
    """What this process holds now, pages shared with others or mapped twice counted once. Linux only."""
    import gc

    gc.collect()
    return _status_bytes("/proc/self/smaps_rollup", "Pss:")


def _status_bytes(path: str, key: str) -> int:
    lines = Path(path).read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def by_size(
    calls: Mapping[str, Mapping[str, Callable[[], Any]]], check: Callable[[Any], Mapping[str, Any]]
) -> dict[str, Work]:
    """Calls by name, by size, as works by label: "b1 s16, one head ablated"."""
    return {f"{size}, {name}": Work(call, check) for size, named in calls.items() for name, call in named.items()}


def logits_check(logits: Any) -> dict[str, Any]:
    """The first logits of the first sequence's last position; logits: [b, p, V], an array or a tensor."""
    return {"logits": logits[0, -1, :8].tolist()}


def sae_check(result: Any) -> dict[str, Any]:
    """The first logits of the last position, and how active the features of the first SAE are there. ``result``: (logits
    [b, p, V], a cache of features alone)."""
    logits, cache = result
    first = cache[min(cache.keys())][0, -1]
    return {**logits_check(logits), "features": [float(first.sum()), float(first.max())]}


def opened_twice(open_one: Callable[[int], Any], run: Callable[[Any], Any]) -> Work:
    """The work "two_variants": ``open_one(head)`` opens the model with that head ablated, ``run`` gives its logits.

    Facts: bytes held before, after the first is open and has run, and after the second.
    """

    def work() -> Any:
        held, models, logits = [proportional_bytes()], [], []
        for head in range(2):
            models.append(open_one(head))
            logits.append(run(models[-1])[0, -1, :8].tolist())
            held.append(proportional_bytes())
        return held, logits

    def check(result: Any) -> dict[str, Any]:
        return {"first variant": result[1][0], "second variant": result[1][1]}

    return Work(work, check, lambda result: {"held": result[0]})
