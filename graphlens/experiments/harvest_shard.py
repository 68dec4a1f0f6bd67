"""One shard of a harvest: the same plan, number and model give the same bytes, in whichever process and order."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.reductions import Statistics, reduction_of
from graphlens.errors import InputError, ModelFileError
from graphlens.experiments.harvest_planning import digest_of_directions
from graphlens.file.harvest_files import (
    DIRECTIONS,
    DOCUMENTS,
    POSITIONS,
    TOKENS,
    ShardWriter,
    corpus_digest,
    partial_file,
    read_corpus,
    read_plan,
    read_results,
    write_results,
    writing_shard,
)
from graphlens.file.harvest_folder import HarvestFolder, folder_of
from graphlens.file.harvest_layout import Batch
from graphlens.file.harvest_plan import HarvestPlan

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.runner import Runner

# What a machine needs besides the model, in words.
_SHARED = "Give an out that all machines share: a shared file system under one path, or a URL such as s3://bucket/acts."
_CAST = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def digest_of_plan(plan: HarvestPlan) -> str:
    """What tells a plan from any other.

    Args:
        plan: The plan.
    """
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def statistics(plan: HarvestPlan) -> Statistics:
    """What a harvest computes on the way, before its first token.

    Args:
        plan: Its plan.
    """
    return Statistics([reduction_of(spec) for spec in plan.reductions], {name: plan.width(name) for name in plan.names})


def write_shard(
    folder: HarvestFolder,
    plan: HarvestPlan,
    index: int,
    runner: Runner[ArrayT],
    done: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Writes one shard of a harvest: its file, what was computed of it on the way, and that it is done.

    Args:
        folder: The harvest's folder, which holds its plan and its corpus.
        plan: Its plan.
        index: Which shard.
        runner: The model of the plan. Nothing may be active on it.
        done: Called after each run with the number of tokens that were kept.

    Raises:
        InputError: A number does not fit float16.
        ExportError: The shard cannot be written; a full disk, say. Nothing of it is left then.
        ModelFileError: The corpus or the directions of the harvest are missing or damaged.
    """
    first, last, start, _ = plan.shards[index]
    shard = read_corpus(folder, plan.layout, corpus_digest(plan)).shard(first, last)
    directions = (read_results(folder, DIRECTIONS) or {}) if plan.projected else {}
    if digest_of_directions(directions) != plan.projected:
        raise ModelFileError(
            f"{folder.at(DIRECTIONS)}: missing or damaged. Resume the harvest: it is written again from project=."
        )
    found = statistics(plan)
    with writing_shard(folder, plan, index) as writer:
        for name, column in ((TOKENS, shard.tokens), (DOCUMENTS, shard.documents), (POSITIONS, shard.positions)):
            writer.put(name, 0, column)
        for batch in shard.batches:
            _run(plan, batch, runner, directions, found, start, writer)
            done(len(batch.source))
        if plan.reductions:
            write_results(folder, partial_file(index), found.arrays())


def shard_elsewhere(model: HookedTransformer[ArrayT], item: tuple[str, int, str]) -> int:
    """Writes one shard of a harvest, in whichever process this is called.

    Args:
        model: The model of the plan.
        item: (the harvest's folder, which shard, the digest of its plan).

    Returns:
        How many tokens were kept.

    Raises:
        ModelFileError: This machine does not see that folder, or another one under its path.
    """
    folder = folder_of(item[0])
    try:
        plan = read_plan(folder)
    except ModelFileError as error:
        raise ModelFileError(f"node {platform.node()} does not see the harvest: {error} {_SHARED}") from error
    if digest_of_plan(plan) != item[2]:
        raise ModelFileError(f"node {platform.node()} sees another harvest at {folder}. {_SHARED}")
    write_shard(folder, plan, item[1], model.runner)
    return plan.shards[item[1]][3]


def _run(
    plan: HarvestPlan,
    batch: Batch,
    runner: Runner[ArrayT],
    directions: Mapping[str, Array],
    found: Statistics,
    start: int,
    writer: ShardWriter,
) -> None:
    """Runs one batch, and writes and counts what is kept of it."""
    if not len(batch.source):
        return
    ids = runner.border.to_user(batch.tokens)
    values = runner.run(runner.request(ids, padding_side="right"), plan.names, output=False, only=True).values
    everything = len(batch.source) == batch.tokens.size
    stretches = _stretches(batch)
    for name in plan.names:
        flat = values.pop(name).reshape(batch.tokens.size, -1)
        if directions:
            flat = flat.astype(np.float32, copy=False) @ directions[name].T
        if plan.written:
            for source, target, length in stretches:
                writer.put(name, target, _narrowed(flat[source : source + length], plan.dtype, name))
        if plan.reductions:
            kept = flat if everything else flat[batch.source]
            found.add(name, kept.astype(np.float32, copy=False), start + batch.target)


def _stretches(batch: Batch) -> list[tuple[int, int, int]]:
    """Where kept positions lie side by side both in a run and in the shard: (first in the run, first in the shard, count)."""
    breaks = np.flatnonzero((np.diff(batch.source) != 1) | (np.diff(batch.target) != 1)) + 1
    firsts = np.concatenate([[0], breaks])
    lengths = np.diff(np.concatenate([firsts, [len(batch.source)]]))
    return list(zip(batch.source[firsts].tolist(), batch.target[firsts].tolist(), lengths.tolist(), strict=True))


def _narrowed(values: Array, dtype: str, name: str) -> Array:
    """Activations in the dtype that they are written in."""
    try:
        with np.errstate(over="raise", under="ignore"):
            return values.astype(_CAST[dtype], copy=False)
    except FloatingPointError as error:
        raise InputError(
            f"{name} holds {np.abs(values).max():.4g}, and {dtype} holds no more than 65504. Harvest in bfloat16 or float32."
        ) from error
