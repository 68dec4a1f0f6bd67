"""Which steps of weight processing there are, and which of them a model goes through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from graphlens.errors import ExportError
from graphlens.file.manifest import Manifest, ModelConfig
from graphlens.file.names import split_name

if TYPE_CHECKING:
    from graphlens.file.manifest import Json

STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
HOW_OPENED = "model_from_pretrained_kwargs"  # SAELens's name for how the model was opened that an SAE was trained on
# The same for those who train on transformers' own model.
UNPROCESSED: Mapping[str, Json] = {
    HOW_OPENED: dict.fromkeys(("fold_ln", "center_writing_weights", "fold_value_biases"), False)
}
# The norms that what follows them can take in. Those after a sublayer, of the embeddings, of queries and keys are none.
FOLDED_NORMS = ("ln1", "ln2", "mlp.ln", "ln_final")


def ensure_own(manifest: Manifest, where: object, what: str) -> None:
    """Refuses a rewrite of all weights for a graph that another program exported, which may read a weight in many ways.

    Args:
        manifest: The model's manifest.
        where: The model's file, for the error.
        what: What is not done, as the beginning of a sentence.

    Raises:
        ExportError: The model was adopted.
    """
    if manifest.adopted is not None:
        raise ExportError(
            f"{where}: it was adopted from {manifest.adopted.file}, which another program exported. {what}: graphlens export "
            "does that to the checkpoint. from_onnx and from_pretrained_no_processing open the file as it is."
        )


def steps_for(manifest: Manifest, asked: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    """The steps that a model goes through, of those that are asked for: TransformerLens leaves out the same.

    Args:
        manifest: The model's manifest; for a processed one these are the steps that it went through if it was asked for them.
        asked: Some of STEPS.

    Returns:
        (the steps that are left, in order; why some that the user would expect are left out, a sentence each). That weights
        are not centred where the norms do not centre is expected.

    Raises:
        ExportError: A step can be done for no model of this architecture, and TransformerLens fails at it too.
    """
    config, wanted = manifest.config, set(asked)
    if wanted:
        ensure_decoder(config)
    if "refactor_factored_attn_matrices" in wanted:
        _ensure_refactorable(config)
    without: dict[str, str] = {}
    if config.residual_norms or "embed.W_project" in manifest.weights:
        why = (
            "the norms of this architecture normalise the residual stream itself"
            if config.residual_norms
            else "the embeddings of this model are projected into the residual stream by a matrix of their own"
        )
        without |= dict.fromkeys(STEPS, why)
    elif config.post_norm_only:
        why = "the norms of this architecture come after the sublayers, so no weights read them"
        without |= {"fold_ln": why, "center_writing_weights": why}
    elif config.positional_embedding_type == "shortformer":
        without["fold_ln"] = (
            "position embeddings are added after the norms, so what they would be folded into reads more"
        )
    elif config.late_mlp_bias and config.normalization_type == "LN":
        without["fold_ln"] = "no bias of the gated MLP is where the norm's would have to go"
    elif "fold_ln" not in manifest.processing and not any(_is_folded(name) for name in manifest.weights):
        none = "this model has no norms" if config.normalization_type is None else None
        without["fold_ln"] = none or "the norms of this architecture have no weights"
    if config.output_logits_soft_cap > 0:
        without["center_unembed"] = (
            "the logits are squeezed by tanh, so a constant added to all of them would change more"
        )
    notes = [f"{step} is left out: {without[step]}." for step in STEPS if step in wanted & set(without)]
    if not config.centres or config.final_rms:
        wanted.discard("center_writing_weights")
    return tuple(step for step in STEPS if step in wanted and step not in without), notes


def ensure_decoder(config: ModelConfig) -> None:
    """Refuses to process the weights of an encoder.

    Args:
        config: The model's architecture.

    Raises:
        ExportError: It is one.
    """
    if config.is_encoder:
        raise ExportError(
            f"{config.model_name} is an encoder, whose norms normalise the residual stream itself: its weights are not "
            "processed, as in TransformerLens. Open it with graphlens.HookedEncoder."
        )


def _is_folded(name: str) -> bool:
    """True for the factors of a norm that fold_ln moves into what reads it."""
    norm, _, leaf = split_name(name)[1].rpartition(".")
    return leaf == "w" and norm in FOLDED_NORMS


def _ensure_refactorable(config: ModelConfig) -> None:
    """Refuses to rewrite W_Q W_K^T where it is not all that scores are made of."""
    why = None
    if config.positional_embedding_type == "rotary":
        why = "queries and keys are rotated by their positions, so no single matrix W_Q W_K^T makes the scores"
    elif config.use_qk_norm:
        why = "queries and keys are normalised, so W_Q W_K^T does not make the scores"
    elif config.n_key_value_heads != config.n_heads:
        why = "several heads share a key and a value, so their matrices cannot be rewritten one by one"
    if why is not None:
        raise ExportError(f"refactor_factored_attn_matrices cannot be done for this model: {why}.")
