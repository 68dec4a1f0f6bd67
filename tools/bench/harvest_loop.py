"""What a harvest and the loop that people write in its place both do: hook points, rows, batch sizes, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONTEXT, ROWS = 128, 32  # tokens of a row; rows of a round
BATCHES = (1, 8, 32)  # rows of a run: each contender is judged by the size that is best for it


def wanted(layers: int) -> dict[str, tuple[list[str], int | None]]:
    """Hook points by what they are called, with the block before which a loop may stop (None: it runs the whole model)."""
    middle = layers // 2
    return {
        "all resid_post": ([f"blocks.{layer}.hook_resid_post" for layer in range(layers)], None),
        f"resid_post of layer {middle - 1}": ([f"blocks.{middle - 1}.hook_resid_post"], middle),
    }


def works(
    layers: int,
    folder: str,
    run: Callable[[list[str], int | None, int, Path], Any],
    read: Callable[[Any], Mapping[str, Any]],
) -> dict[str, Any]:
    """The works of a contender by label: "all resid_post, 8 rows a run".

    ``run``: (hook points, where to stop, rows of a run, a folder that is not there) -> where the activations lie.
    ``read``: that -> the last token's first activations of each hook point, by name.
    """
    import shutil

    from tools.bench.workers.protocol import Work

    place = Path(folder)

    def one(names: list[str], stop: int | None, batch: int) -> Callable[[], Any]:
        def work() -> Any:
            shutil.rmtree(place, ignore_errors=True)
            return run(names, stop, batch, place)

        return work

    return {
        label_of(label, batch): Work(one(names, stop, batch), read)
        for label, (names, stop) in wanted(layers).items()
        for batch in BATCHES
    }


def label_of(label: str, batch: int) -> str:
    """A work's label."""
    return f"{label}, {batch} row{'s' if batch > 1 else ''} a run"
