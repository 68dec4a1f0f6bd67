"""Whether a model's pieces compute what the model does: tried once for each model, on the first corrupted run."""

from __future__ import annotations

import numpy as np

from graphlens.engine.block_pieces import BlockPieces, Proof
from graphlens.errors import GraphlensError
from graphlens.experiments.corrupted_run import CorruptedRun
from graphlens.experiments.readout import columns
from graphlens.experiments.recompute import Kept, Recomputation
from graphlens.experiments.stages import Variant, needed
from graphlens.file.names import UNEMBEDDED, in_block

_PROVED = 1e-4  # of the largest value: beyond it the pieces are not the model
_ENTRY = in_block(0, "hook_resid_pre")


def needed_for_proof(proof: Proof, n_layers: int) -> list[str]:
    """The activations that the corrupted run must keep so that the pieces can be tried; none once they were.

    Args:
        proof: What is known of them.
        n_layers: The number of blocks.
    """
    return [] if proof.why is not None else needed([_ENTRY], n_layers)


def prove(run: CorruptedRun, pieces: BlockPieces, max_tokens: int) -> Proof:
    """Whether a model's pieces may be used; they are tried now if they never were.

    Args:
        run: The corrupted run, which keeps what ``needed_for_proof`` names.
        pieces: The model in pieces.
        max_tokens: How many tokens are computed at once.

    Returns:
        The engine's record, whose ``why`` is "" where they may be used.
    """
    proof = run.runner.engine.proof
    if proof.why is None:
        proof.why = _why_not(run, pieces, max_tokens)
        proof.unembedding = "" if proof.why else _unembedding(run, pieces)
    return proof


def _why_not(run: CorruptedRun, pieces: BlockPieces, max_tokens: int) -> str:
    """Why the blocks' pieces must not be used, found by sending the corrupted prompts through them; "" if they may."""
    start = run.length // 2
    kept = Kept(run.activations, run.tokens, {_ENTRY: run.activations[_ENTRY]})
    whole = Recomputation(pieces, kept, run.n_layers, None, max_tokens)
    same = Variant(0, _ENTRY, np.zeros((1, 1, 1), bool), start)
    try:
        ((_, _, found),) = whole.last_residuals([same])
    except GraphlensError as error:
        return f"this model does not come apart into blocks ({error})"
    wanted = run.activations[in_block(run.n_layers - 1, "hook_resid_post")][:, start:]
    apart = float(np.abs(found[0] - wanted).max())
    return "" if apart <= _PROVED * float(np.abs(wanted).max()) else f"the blocks are {apart:.1e} off the model"


def _unembedding(run: CorruptedRun, pieces: BlockPieces) -> str:
    """Gives "W_U" if the logits are unembed.hook_in times W_U plus b_U and nothing else, "" otherwise."""
    if not all(f"unembed.{name}" in run.runner.weights for name in ("W_U", "b_U")):
        return ""
    last = run.activations[in_block(run.n_layers - 1, "hook_resid_post")][:, -1]
    hidden = pieces.end(np.ascontiguousarray(last), UNEMBEDDED)[None, :, None]
    found = columns(run.runner, hidden, np.broadcast_to(run.probed, (run.batch, len(run.probed))))[0]
    apart = float(np.abs(found - run.probe).max())
    return "W_U" if apart <= _PROVED * max(float(np.abs(run.probe).max()), 1e-3) else ""
