"""Whether a model's pieces compute what the model does: tried once for each model, on the first corrupted run.

And whether a residual stream is the sum that patches of its summands are added to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.engine.block_layout import ATTN_OUT, RESID_POST, RESID_PRE, BlockLayout
from graphlens.engine.block_pieces import BlockPieces, Proof
from graphlens.errors import GraphlensError
from graphlens.experiments.columns import Columns
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.recompute import Recomputation
from graphlens.experiments.stages import ADDED, RESULT, Kept, Variant, needed
from graphlens.file.names import UNEMBEDDED, in_block, split_name

_PROVED = 1e-4  # of the largest value: beyond it the pieces are not the model
SUMS = {"float16": 2e-2, "float32": 1e-3, "float64": 1e-6}  # of the largest value: beyond it a sum is not one
_ENTRY = in_block(0, RESID_PRE)


def needed_for_proof(proof: Proof, layout: BlockLayout) -> list[str]:
    """The activations that the corrupted run must keep so that the pieces can be tried; none once they were.

    Args:
        proof: What is known of them.
        layout: How the model's blocks are laid out.
    """
    return [] if proof.why is not None else needed([_ENTRY], layout)


def why_not_apart(run: CorruptedRun) -> str:
    """Why tokens of this run cannot be computed apart from the others; "" if they can.

    Args:
        run: The corrupted run.
    """
    short = run.runner.config.rotary_short
    if short is None or run.length <= short:
        return ""
    return f"in prompts of more than {short} tokens every key's rotation depends on the prompt's length"


def why_not_added(run: CorruptedRun, hook: str, layout: BlockLayout) -> str:
    """Why the residual stream does not change by what a patch changes at a hook point; "" if it does, or need not.

    Args:
        run: The corrupted run, which keeps what ``needed`` names for the hook point.
        hook: The hook point.
        layout: How the model's blocks are laid out.
    """
    layer_or_none, rest = split_name(hook)
    layer = layer_or_none or 0
    if rest not in ADDED:
        return ""
    summands, total = layout.summands(layer, rest)
    if not summands:
        return "this model normalises its residual stream after each sublayer"
    if not _is_sum(run, [run.activations[name] for name in summands], run.activations[total]):
        return f"{split_name(total)[1]} is not the sum of {', '.join(split_name(name)[1] for name in summands)}"
    if rest == RESULT:
        name = in_block(layer, "attn.b_O")
        bias = [run.runner.weights[name]] if name in run.runner.weights else []
        parts = [run.activations[hook].sum(2), *bias]
        if not _is_sum(run, parts, run.activations[in_block(layer, ATTN_OUT)]):
            return f"{ATTN_OUT} is not the sum of {rest} over heads: a norm or a factor lies between"
    return ""


def _is_sum(run: CorruptedRun, parts: Sequence[Array], total: Array) -> bool:
    """Whether arrays that broadcast add up to another."""
    found = parts[0].astype(np.float64)
    for part in parts[1:]:
        found = found + part
    return float(np.abs(found - total).max()) <= SUMS.get(run.runner.config.dtype, 1e-3) * float(np.abs(total).max())


def prove(run: CorruptedRun, pieces: BlockPieces, max_tokens: int) -> Proof:
    """Whether a model's pieces may be used; they are tried now if they never were.

    Args:
        run: The corrupted run, which keeps what ``needed_for_proof`` names.
        pieces: The model in pieces.
        max_tokens: How many tokens are computed at once.

    Returns:
        The engine's record, whose ``why`` is "" where they may be used.
    """
    why = why_not_apart(run)
    if why:
        return Proof(why)
    proof = run.runner.engine.proof
    if proof.why is None:
        proof = _tried(run, pieces, max_tokens, _ENTRY, proof)
    return proof


def prove_from(run: CorruptedRun, pieces: BlockPieces, max_tokens: int, hook: str) -> Proof:
    """Whether a model's pieces may be used from a hook point on, where what is before it is not the plain model's.

    Args:
        run: The corrupted run, which keeps what ``needed`` names for the hook point.
        pieces: The model in pieces.
        max_tokens: How many tokens are computed at once.
        hook: The hook point.

    Returns:
        A record of this run alone, whose ``why`` is "" where they may be used.
    """
    why = why_not_apart(run)
    return Proof(why) if why else _tried(run, pieces, max_tokens, hook, Proof())


def _tried(run: CorruptedRun, pieces: BlockPieces, max_tokens: int, hook: str, proof: Proof) -> Proof:
    """The record, filled in by trying."""
    proof.why = _why_not(run, pieces, max_tokens, hook)
    proof.unembedding = "" if proof.why else _unembedding(run, pieces)
    return proof


def _why_not(run: CorruptedRun, pieces: BlockPieces, max_tokens: int, hook: str) -> str:
    """Why the blocks' pieces must not be used, found by sending the corrupted prompts through them; "" if they may."""
    if run.runner.config.normalises_residual:
        return "this model normalises its residual stream after each sublayer"
    if not run.runner.config.is_causal:
        return "its tokens attend to later ones too"
    if run.runner.config.positional_embedding_type == "shortformer":
        return "position embeddings are added inside its attention"
    start = run.length // 2
    kept = Kept(run.activations, run.tokens, {hook: run.activations[hook]})
    same = Variant(0, hook, np.zeros((1,) * run.activations[hook].ndim, bool), start)
    try:
        whole = Recomputation(pieces, kept, None, max_tokens, run.runner.config.window_size)
        ((_, _, found),) = whole.last_residuals([same])
    except GraphlensError as error:
        return f"this model does not come apart into blocks ({error})"
    wanted = run.activations[in_block(run.n_layers - 1, RESID_POST)][:, start:]
    apart = float(np.abs(found[0] - wanted).max())
    return "" if apart <= _PROVED * float(np.abs(wanted).max()) else f"the blocks are {apart:.1e} off the model"


def _unembedding(run: CorruptedRun, pieces: BlockPieces) -> str:
    """Gives "W_U" if the logits are unembed.hook_in times W_U plus b_U and nothing else, "" otherwise."""
    if "unembed.W_U" not in run.runner.weights.stored or "unembed.b_U" not in run.runner.weights:
        return ""
    last = run.activations[in_block(run.n_layers - 1, RESID_POST)][:, -1]
    hidden = pieces.end(np.ascontiguousarray(last), UNEMBEDDED)[None, :, None]
    found = Columns(run.runner, np.broadcast_to(run.probed, (run.batch, len(run.probed))), hidden.dtype).logits(hidden)[
        0
    ]
    apart = float(np.abs(found - run.probe).max())
    return "W_U" if apart <= _PROVED * max(float(np.abs(run.probe).max()), 1e-3) else ""
