"""Drift over many prompts: batch after batch, here or in Ray's workers, and figures over all of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.drift_result import DriftResult
from graphlens.errors import checked_number
from graphlens.experiments.drift_comparison import Compared, Comparison
from graphlens.experiments.drift_run import OtherT, Side, ensure_one_shape, requests
from graphlens.experiments.on_ray import workers_of
from graphlens.experiments.prompt_batches import Prompts, alike, prompts_of
from graphlens.views.progress import steps

if TYPE_CHECKING:
    from graphlens.model.hooked_transformer import HookedTransformer

_Batch: TypeAlias = tuple[int, Array]  # its number, and its tokens [b, p]


def drift_prompts(
    reference: HookedTransformer[ArrayT],
    other: HookedTransformer[OtherT],
    prompts: Prompts,
    *,
    batch_size: int = 16,
    engine: str = "local",
    workers: int | None = None,
    threads: int = 1,
    allow_mixed: bool = False,
    prepend_bos: bool | None = None,
    verbose: bool = True,
) -> DriftResult:
    """How far a model's activations are from a reference's over many prompts, at each hook point that both have.

    The figures are those of ``drift`` over all tokens of all prompts: errors are summed, not averaged. Prompts of one length are
    run together, so that nothing is padded.

    Args:
        reference: The model that counts as right.
        other: The model that is compared with it.
        prompts: A list of texts, or of token ids, or tokens [n, p]; text is read by the reference's tokenizer.
        batch_size: How many prompts are run at once, at most.
        engine: "local", or "ray": in the workers of a Ray cluster (extra ``ray``). The figures are the same for any number of
            workers.
        workers: How many of Ray's workers; None for as many as its cores allow.
        threads: How many threads each of them computes with.
        allow_mixed: True lets machines take part that differ in processor, ONNX Runtime or packages.
        prepend_bos: Whether texts get a BOS token; None for the model's default.
        verbose: Whether a terminal shows a progress bar.

    Returns:
        The figures of each hook point, in firing order; ``shape`` is the number of prompts and the longest one's tokens.

    Raises:
        InputError: For two models of different shape, prompts that are neither text nor ids, and, on Ray, active hooks or
            interventions.
        RuntimeUnavailable: Without the package for Python hooks, or without Ray.
    """
    spread = workers_of(engine, workers, threads, allow_mixed)
    batch_size = checked_number(batch_size, "batch_size", least=1)
    ensure_one_shape(reference.runner, other.runner)
    rows = prompts_of(reference, prompts, prepend_bos)
    chosen = list(alike([len(row) for row in rows], batch_size))
    items = [(number, np.stack([rows[row] for row in batch])) for number, batch in enumerate(chosen)]
    models = (reference, other)
    if spread is None:
        parts = (_compared(models, item) for item in items)
    else:
        parts = (part for _, part in spread.spread(models, _compared, items))
    found: dict[int, Compared] = {}
    with steps("Comparing", len(rows)) if verbose else nullcontext() as progress:
        for number, part in parts:
            found[number] = part
            if progress is not None:
                progress.advance(len(chosen[number]))
    total = found[0]
    for number in range(1, len(items)):  # in one order, whichever came first: sums of floats depend on it
        total += found[number]
    return _comparison(models, items[0][1]).result(total, (len(rows), max(map(len, rows))))


def _compared(
    models: tuple[HookedTransformer[ArrayT], HookedTransformer[OtherT]], item: _Batch
) -> tuple[int, Compared]:
    """What the comparison of one batch found, and its number."""
    comparison = _comparison(models, item[1])
    comparison.run(_Silent())
    return item[0], comparison.compared()


def _comparison(
    models: tuple[HookedTransformer[ArrayT], HookedTransformer[OtherT]], tokens: Array
) -> Comparison[ArrayT, OtherT]:
    """The comparison over one batch, not run yet."""
    first, second = models[0].runner, models[1].runner
    right, wrong = requests(first, second, first.border.to_user(tokens), {})
    return Comparison(Side(first, right), Side(second, wrong), keep=False)


class _Silent:
    """A progress bar that is not shown."""

    def advance(self, count: int = 1) -> None:
        """Does nothing."""
