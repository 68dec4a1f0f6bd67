"""Whether a model's weights can be processed: whether its graph computes what TransformerLens's names say, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphlens.errors import ExportError
from graphlens.file.io_names import LOGITS
from graphlens.file.manifest import Manifest, ModelConfig
from graphlens.file.names import EMBEDDINGS, in_block
from graphlens.file.processing import ensure_decoder
from graphlens.surgery.structure import Structure
from graphlens.surgery.sublayers import Sublayer, norm_weights, sublayers, sums

_MOVE_VALUE_BIASES = {"fold_value_biases", "refactor_factored_attn_matrices"}


def ensure_processable(source: Path, model: ir.Model, manifest: Manifest, steps: Sequence[str]) -> None:
    """Refuses a model whose weights cannot be processed so that its predictions stay.

    Args:
        source: The graph file, for errors.
        model: The hooked model.
        manifest: Its manifest.
        steps: The steps that are going to be done.

    Raises:
        ExportError: See process_weights.
    """
    _check(source, manifest)
    _check_structure(source, Structure(model, manifest), manifest, steps)


def _check(source: Path, manifest: Manifest) -> None:
    config = manifest.config
    ensure_decoder(config)
    if manifest.processing:
        raise ExportError(f"{source}: its weights are processed already ({', '.join(manifest.processing)}).")
    if config.dtype != "float32":
        raise ExportError(f"{source}: holds {config.dtype} weights. Process the float32 model, then convert it.")
    if config.num_experts and any(
        f"{in_block(layer, 'ln2')}.b" in manifest.weights for layer in range(config.n_layers)
    ):
        raise ExportError(f"{source}: a norm's bias cannot be folded into an MLP of several experts, which has none.")
    # Without its place in the files a weight would silently stay as it is.
    every = [part for layer in range(config.n_layers) for part in sublayers(config, layer)]
    parts = [part for layer in range(config.n_layers) for part in plain_sublayers(config, layer)]
    norms = [part.norm for part in every if part.norm is not None]
    inner = [part.inner_norm for part in every if part.inner_norm is not None]
    final = [] if config.normalization_type is None else ["ln_final"]
    positions = ["pos_embed.W_pos"] if config.positional_embedding_type == "standard" else []
    needed = ["embed.W_E", *positions, "unembed.W_U"]
    needed += [matrix for part in parts for matrix, _ in (*part.readers.values(), part.out)]
    needed += [name for layer in range(config.n_layers) for name in _read_by_experts(config, layer)]
    # What one norm has every norm has: an architecture's norms have weights and biases, or none.
    for leaf, alike in (("w", [*norms, *final]), ("b", norms if config.final_rms else [*norms, *final])):
        needed += [f"{norm}.{leaf}" for same in (alike, inner) for norm in same if _any_has(manifest, same, leaf)]
    missing = [name for name in needed if name not in manifest.weights]
    if missing:
        raise ExportError(f"{source}: does not say where its weight {missing[0]!r} lies, so it cannot be processed.")


def _any_has(manifest: Manifest, norms: Sequence[str], leaf: str) -> bool:
    """True if one of the norms has a weight (``"w"``) or a bias (``"b"``)."""
    return any(f"{norm}.{leaf}" in manifest.weights for norm in norms)


def plain_sublayers(config: ModelConfig, layer: int) -> list[Sublayer]:
    """The sublayers of a block but for an MLP of several experts, which has no hook points between its matrices."""
    return sublayers(config, layer)[: 1 if config.num_experts else None]


def _read_by_experts(config: ModelConfig, layer: int) -> list[str]:
    """The names of the matrices that read the norm of an MLP of several experts: the router's, and two of each expert."""
    experts = range(config.num_experts or 0)
    found = [f"mlp.experts.{expert}.{name}.weight" for expert in experts for name in ("W_gate", "W_in")]
    return [in_block(layer, name) for name in ("mlp.W_gate.weight", *found)] if found else []


def has_value_bias(manifest: Manifest, steps: Sequence[str], layer: int) -> bool:
    """True if a bias of values is moved into attention's output bias: one that is there, or that a norm's becomes."""
    folded = "fold_ln" in steps and in_block(layer, "ln1.b") in manifest.weights
    return bool(_MOVE_VALUE_BIASES & set(steps)) and (folded or in_block(layer, "attn.b_V") in manifest.weights)


def _check_structure(source: Path, structure: Structure, manifest: Manifest, steps: Sequence[str]) -> None:
    """Refuses a model that computes something else than the architecture whose weights are processed.

    A norm after attention, a matrix that reads a norm besides those that it is folded into, a bias without a name: what was
    processed would then predict something else, without a word.
    """
    layers, config = range(manifest.config.n_layers), manifest.config

    def ensure(is_so: bool, start: str, end: str) -> None:
        if not is_so:
            raise ExportError(
                f"{source}: cannot be processed: between {start!r} and {end!r} this model computes something else than a norm "
                "and the weights that TransformerLens names (a norm of its own there, an edit that was baked in, a second "
                "matrix, or a weight or bias without a name), so its predictions would change."
            )

    embedded = [name for name in EMBEDDINGS if name in manifest.hooks]
    if config.positional_embedding_type == "shortformer":
        embedded.remove("hook_pos_embed")
    residual = in_block(0, "hook_resid_pre")
    ensure(structure.is_sum(residual, embedded), embedded[0], residual)
    for layer in layers:
        experts = _read_by_experts(config, layer)
        for part in sublayers(config, layer):
            if part.norm is not None:
                ensure(structure.is_norm(part.residual, part.norm), part.residual, part.start)
            if part not in plain_sublayers(config, layer):
                weights = [] if part.norm is None else norm_weights(part.norm)
                ensure(structure.is_read_by(part.start, weights, experts), part.start, part.written)
                continue
            for end in part.readers:
                ensure(structure.reads(part, end, late=True), part.start, end)
            if part.norm is not None:
                alone = structure.nothing_leaves(part.start, list(part.readers), part.late.values())
                ensure(alone, part.start, next(iter(part.readers)))
            ensure(structure.writes(part), part.inner, part.written)
            if part.inner_norm is not None:
                middle, normal = in_block(layer, "mlp.hook_mid"), f"{part.inner_norm}.hook_normalized"
                ensure(structure.is_norm(middle, part.inner_norm), middle, normal)
                ensure(structure.is_linear(normal, part.inner, norm_weights(part.inner_norm)), normal, part.inner)
                alone = structure.nothing_leaves(normal, [part.inner]) and structure.only_known_read(part.inner)
                ensure(alone, normal, part.written)
        if has_value_bias(manifest, steps, layer):
            values, z, pattern = (in_block(layer, f"attn.hook_{name}") for name in ("v", "z", "pattern"))
            ensure(structure.is_mixed(values, z, pattern), values, z)
        for total, terms in sums(config, layer).items():
            ensure(structure.is_sum(total, terms), terms[-1], total)
    last = in_block(layers[-1], "hook_resid_post")
    normal, end = last if config.normalization_type is None else "ln_final.hook_normalized", "unembed.hook_out"
    if normal != last:
        ensure(structure.is_norm(last, "ln_final"), last, normal)
    weights = [*norm_weights("ln_final"), "unembed.W_U", "unembed.b_U"]
    ensure(structure.is_linear(normal, end, weights), normal, LOGITS)
    ensure(structure.nothing_leaves(normal, [end]), normal, LOGITS)
    for layer in layers:
        for name in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"):
            hook = in_block(layer, name)
            ensure(hook not in manifest.hooks or structure.only_known_read(hook), hook, LOGITS)
