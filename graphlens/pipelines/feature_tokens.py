"""Which next tokens the features of an SAE write for: each one's decoder row, through the model's final norm and unembedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.file.io_names import LOGITS
from graphlens.file.names import in_block

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphlens.edits.record import Array
    from graphlens.edits.sae import Sae
    from graphlens.file.manifest import Json

COUNT = 3  # tokens that are named of each feature
_BUDGET = 1e12  # multiplications that it may take: half a minute
_AT_ONCE = 256  # features


def feature_tokens(model: ir.Model, folder: Path, saes: Mapping[str, Sae]) -> dict[str, Json]:
    """The tokens that each feature raises most by itself, the first the most.

    What the blocks after the SAE make of a feature is left out, as in a logit lens.

    Args:
        model: The hooked model, without the SAEs.
        folder: Where its weights lie.
        saes: The hook point that an SAE stands for -> the SAE.

    Returns:
        The hook point -> for each feature ids of tokens. Left out are SAEs that do not write into the residual stream, those that
        it would take too long for, and all of a model whose end reads more than the residual stream.
    """
    from graphlens.runtime.sessions import open_session
    from graphlens.surgery.cut import cut
    from graphlens.surgery.graph import read_manifest

    manifest = read_manifest(model)
    config, last = manifest.config, in_block(manifest.config.n_layers - 1, "hook_resid_post")
    cost = config.d_model * config.d_vocab_out
    chosen = {
        hook: sae
        for hook, sae in saes.items()
        if last in manifest.hooks
        and manifest.hooks[hook].axes == manifest.hooks[last].axes
        and cost * sae.cfg.d_sae <= _BUDGET
    }
    if not chosen:
        return {}
    import onnx_ir as ir

    piece, frontier = cut(model, [last], [LOGITS])
    if frontier:
        return {}
    session = open_session(ir.to_proto(piece).SerializeToString(), "cpu", folder, as_written=True)
    name = str(piece.graph.inputs[0].name)

    def logits(rows: Array) -> Array:
        (found,) = session.run([LOGITS], {name: np.ascontiguousarray(rows[None], np.float32)})
        made: Array = found[0]
        return made

    nothing = logits(np.zeros((1, config.d_model)))
    found: dict[str, Json] = {}
    for hook, sae in chosen.items():
        tokens: list[Json] = []
        for start in range(0, sae.cfg.d_sae, _AT_ONCE):
            raised = logits(sae.W_dec[start : start + _AT_ONCE]) - nothing
            tokens += np.argsort(-raised, axis=-1, kind="stable")[:, :COUNT].tolist()
        found[hook] = tokens
    return found
