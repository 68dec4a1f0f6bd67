"""Harvests: the activations of a corpus at some hook points, or statistics of them, in a folder that a killed run resumes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.harvest import Harvest
from graphlens.analysis.reductions import reductions
from graphlens.errors import ExportError, GraphlensError, InputError, ModelFileError, checked_number, is_one_of
from graphlens.experiments.harvest_corpus import Options, digest_of_corpus, take_in
from graphlens.experiments.harvest_planning import (
    Directions,
    Names,
    chosen,
    digest_of_directions,
    directions_of,
    ensure_plain,
    ensure_room,
    said_of_machine,
    said_of_model,
)
from graphlens.experiments.harvest_shard import digest_of_plan, shard_elsewhere, statistics, write_shard
from graphlens.experiments.on_ray import Workers, workers_of
from graphlens.file.corpora import Corpus
from graphlens.file.folder import writing
from graphlens.file.harvest_files import (
    CORPUS,
    DIRECTIONS,
    PLAN,
    REDUCED,
    corpus_is_sound,
    damaged,
    finish,
    partial_file,
    read_plan,
    read_results,
    recorded,
    write_results,
)
from graphlens.file.harvest_folder import HarvestFolder, folder_of
from graphlens.file.harvest_layout import Layout, TooLong
from graphlens.file.harvest_plan import DTYPES, SIZES, HarvestPlan
from graphlens.views.progress import steps

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.runner import Runner

SHARD_BYTES = 256_000_000  # of activations, at most
_LEAST, _MOST = 1024, 65_536  # tokens of a shard, unless told otherwise
_FOLDED = "folded"  # in the file of statistics: how many shards are in it


def harvest(
    model: HookedTransformer[ArrayT],
    corpus: Corpus | None,
    names: Names,
    out: str | os.PathLike[str],
    *,
    engine: str = "local",
    workers: int | None = None,
    threads: int = 1,
    allow_mixed: bool = False,
    resume: bool = False,
    dtype: str = "float32",
    reduce: Iterable[object] | object = (),
    keep: bool | None = None,
    project: Directions | None = None,
    column: str | None = None,
    context: int | None = None,
    pack: bool = False,
    too_long: TooLong = "split",
    prepend_bos: bool | None = None,
    keep_bos: bool = True,
    keep_pad: bool = False,
    positions: Literal["all", "last"] = "all",
    batch_tokens: int = 2048,
    shard_tokens: int | None = None,
    verbose: bool = True,
) -> Harvest:
    """The activations of a corpus at some hook points, written to a folder; or statistics of them, without the activations.

    The graph that runs ends with the last hook point asked for. What is run together, and where a shard ends, is written down
    before the first run, so a harvest that was stopped (Ctrl-C, a full disk, a killed process) and resumed ends in the same bytes
    as one that was not, on that machine.

    Args:
        model: The model, without active hooks or interventions. Flags that are set and weights that were set count.
        corpus: The path or URL of a file (.txt, a document a line; .jsonl; .parquet; .npy), the path of a saved dataset, a list
            of texts, token ids [n, p] or rows of them, or a dataset: see docs/harvest.md. None, with ``resume``, trusts that it
            is the same.
        names: A hook name, a shell pattern ("*.hook_resid_post"), a list of these, a function name -> bool, or None for all hook
            points that have floats for each token.
        out: The folder to write: absent or empty, unless ``resume``. Or a URL (extra ``remote``): "s3://bucket/acts".
        engine: "local": in this process; "ray": in the workers of a Ray cluster (extra ``ray``), which must see ``out`` and the
            model under the same paths. See docs/scale.md.
        workers: How many of Ray's workers; None for as many as its cores allow. The bytes are the same for any number.
        threads: How many threads each of them computes with.
        allow_mixed: True lets machines take part that differ in processor, ONNX Runtime or packages, whose last bits may differ.
        resume: True goes on with the harvest in ``out``; shards that are not what was written are made again. Begins one where
            there is none.
        dtype: What is written: "float32", "float16" or "bfloat16".
        reduce: What to compute on the way: "mean", "variance", "covariance", "quantiles", "top", or objects of
            graphlens.analysis.reductions (``Quantiles(q)``, ``Top(k)``). See ``Harvest.reduced``.
        keep: Whether activations are written; None writes them where ``reduce`` is empty.
        project: Directions [k, *shape], for all hook points or by hook name: activations become their k products with them.
        column: The column of texts or ids in a corpus with columns; by default text, input_ids or tokens.
        context: The most tokens of a row; by default the model's ``n_ctx``.
        pack: True fills each row with document after document, which see the ones before them. Otherwise a document is run alone,
            its row padded.
        too_long: What happens to a document that does not fit a row: "split" runs its parts as rows of their own, "cut" drops
            what goes beyond, "refuse" raises.
        prepend_bos: Whether each document, and each row that begins inside one, gets a BOS token; None does so for text where the
            model does, and not for ids.
        keep_bos: False drops the positions of BOS tokens.
        keep_pad: True keeps padding too: each row then gives ``context`` tokens.
        positions: "last" keeps the last token of each document alone.
        batch_tokens: The most tokens of a run, padding included.
        shard_tokens: The most tokens that are run for a shard; by default what makes 256 MB, and at most 65,536.
        verbose: Whether a terminal shows a progress bar, with tokens a second and the time left.

    Returns:
        The harvest, opened.

    Raises:
        UnknownHookPoint: ``names`` match nothing.
        InputError: For options that do not fit, a corpus that cannot be read or holds no token, or an active hook or
            intervention; with ``resume``, for another corpus, model, machine or option than before, which it names.
        ExportError: ``out`` is not empty, the disk has no room, or it cannot be written to.
    """
    spread = workers_of(engine, workers, threads, allow_mixed)
    if not is_one_of(dtype, DTYPES):
        raise InputError(f"dtype={dtype!r}: a harvest is written in {', '.join(DTYPES)}.")
    if not is_one_of(too_long, ("split", "cut", "refuse")):
        raise InputError(f"too_long={too_long!r}: it is 'split', 'cut' or 'refuse'.")
    if not is_one_of(positions, ("all", "last")):
        raise InputError(f"positions={positions!r}: it is 'all' or 'last'.")
    if keep_pad and positions == "last":
        raise InputError("keep_pad keeps positions that positions='last' drops: choose one of the two.")
    runner = model.runner
    ensure_plain(runner)
    shapes = chosen(runner, names)
    directions = {} if project is None else directions_of(project, shapes)
    kinds = reductions(reduce)
    written = not kinds if keep is None else keep
    if not written and not kinds:
        raise InputError("keep=False without reduce leaves nothing to harvest. Name statistics with reduce=.")
    n_ctx = runner.config.n_ctx
    options = Options(None if context is None else checked_number(context, "context", least=1, most=n_ctx), prepend_bos)
    shapes = {name: (len(directions[name]),) if directions else shape for name, shape in shapes.items()}
    layout = Layout(
        context=n_ctx,
        pack=checked_number(pack, "pack", bool),
        too_long=too_long,
        keep_bos=checked_number(keep_bos, "keep_bos", bool),
        keep_pad=checked_number(keep_pad, "keep_pad", bool),
        last_only=positions == "last",
        batch_tokens=checked_number(batch_tokens, "batch_tokens", least=1),
    )
    plan = HarvestPlan(
        model=said_of_model(runner),
        names=tuple(shapes),
        shapes=shapes,
        dtype=dtype,
        written=written,
        reductions=tuple(kind.spec() for kind in kinds),
        projected=digest_of_directions(directions),
        layout=layout,
        corpus={},
        environment=said_of_machine(runner) | ({} if spread is None else {"cores": spread.threads}),
        shards=(),
    )
    count = _shard_tokens(plan) if shard_tokens is None else checked_number(shard_tokens, "shard_tokens", least=1)
    plan = replace(plan, layout=replace(layout, shard_tokens=count))
    folder = folder_of(out)
    begun = folder.has(PLAN)
    if begun and not resume:
        raise ExportError(
            f"{folder}: a harvest is there already. Pass resume=True to go on with it, or choose another folder."
        )
    if begun:
        plan = _resumed(folder, plan, runner, corpus, column, options)
        if directions and read_results(folder, DIRECTIONS) is None:
            write_results(folder, DIRECTIONS, directions)
    else:
        if not resume:
            folder.refuse_occupied()
        plan = _begun(folder, plan, runner, corpus, column, options, directions)
    _run_all(folder, plan, model, verbose, spread)
    return Harvest(folder.place)


def _shard_tokens(plan: HarvestPlan) -> int:
    """How many tokens a shard has: what makes SHARD_BYTES, within limits."""
    each = sum(map(plan.width, plan.names)) * SIZES[plan.dtype] if plan.written else 0
    return _MOST if not each else min(max(SHARD_BYTES // each, _LEAST), _MOST)


def _begun(
    folder: HarvestFolder,
    plan: HarvestPlan,
    runner: Runner[ArrayT],
    corpus: Corpus | None,
    column: str | None,
    options: Options,
    directions: dict[str, Array],
) -> HarvestPlan:
    """A new harvest's plan, written to its folder after its corpus."""
    if corpus is None:
        raise InputError("corpus=None: name a corpus. Only a harvest that is resumed has one already.")
    folder.make()
    folder.tidy()
    there = [name for name in folder.names() if name not in (DIRECTIONS, CORPUS)]
    if there:  # those two are of a harvest that was stopped before it had a plan
        raise ExportError(f"{folder}: exists and is not empty. Choose another folder.")
    try:
        laid, said = take_in(folder, corpus, column, runner, plan.layout, options)
        shards = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in laid.shards())
        plan = replace(plan, layout=laid.layout, corpus=said, shards=shards)
        if not plan.tokens:
            raise InputError("no position of this corpus is kept: keep_bos=False drops all there are.")
        ensure_room(folder, plan, range(len(shards)))
        if directions:
            write_results(folder, DIRECTIONS, directions)
        with writing(folder.at(PLAN)):
            folder.write(PLAN, plan.to_json().encode())
    except GraphlensError:
        for name in (CORPUS, DIRECTIONS):
            with suppress(OSError):  # of a place that cannot be written
                folder.remove(name)
        raise
    return plan


def _resumed(
    folder: HarvestFolder,
    asked: HarvestPlan,
    runner: Runner[ArrayT],
    corpus: Corpus | None,
    column: str | None,
    options: Options,
) -> HarvestPlan:
    """The plan of a harvest that is there, if it is the one that is asked for."""
    folder.tidy()
    plan = read_plan(folder)
    said, kind = dict(plan.corpus), plan.corpus.get("kind")
    if corpus is not None:
        said["digest"], said["documents"], kind = digest_of_corpus(corpus, column)
        said["kind"] = kind
    layout = options.layout(asked.layout, runner, "ids" if kind == "ids" else "text")
    apart = plan.differences(replace(asked, layout=layout, corpus=said, shards=plan.shards))
    if apart:
        raise InputError(
            f"{folder}: this harvest was begun otherwise: {'; '.join(apart)}. Resume it so, or choose another folder."
        )
    return plan


def _run_all(
    folder: HarvestFolder, plan: HarvestPlan, model: HookedTransformer[ArrayT], verbose: bool, spread: Workers | None
) -> None:
    """Writes every shard that is missing or damaged, and ends the harvest. Statistics are put together in the shards' order."""
    wrong = {index for index, _ in damaged(folder, plan, recorded(folder, plan))}
    if wrong and not corpus_is_sound(folder, plan):
        raise ModelFileError(
            f"{folder.at(CORPUS)}: missing, or other bytes than were written, and shards are to be made of it. Harvest into "
            "another folder."
        )
    state, folded = statistics(plan), 0
    if plan.reductions:
        stored = read_results(folder, REDUCED)
        if stored is not None:
            folded = int(stored.pop(_FOLDED)[0])
            state.restore(stored)
        wrong |= {
            index for index in range(folded, len(plan.shards)) if read_results(folder, partial_file(index)) is None
        }
    ensure_room(folder, plan, sorted(wrong))
    total = sum(plan.shards[index][3] for index in wrong)
    with steps("Harvesting", total, "tokens") if verbose else nullcontext() as progress:
        done: Callable[[int], None] = (lambda count: None) if progress is None else progress.advance
        if spread is not None and wrong:
            digest = digest_of_plan(plan)
            items = [(folder.everywhere, index, digest) for index in sorted(wrong)]
            for _, count in spread.spread(model, shard_elsewhere, items):
                done(count)
            folder.tidy()  # of a worker that was killed
            wrong = set()
        for index in range(len(plan.shards)):
            if index in wrong:
                write_shard(folder, plan, index, model.runner, done=done)
            if plan.reductions and index >= folded:
                found = read_results(folder, partial_file(index))
                if found is None:
                    raise ModelFileError(
                        f"{folder.at(partial_file(index))}: damaged since it was written. Resume the harvest."
                    )
                state.merge(found)
                write_results(folder, REDUCED, {**state.arrays(), _FOLDED: np.asarray([index + 1], np.int64)})
            if plan.reductions:
                folder.remove(partial_file(index))
    finish(folder, plan)
