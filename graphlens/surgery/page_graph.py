"""The graph that a live page runs: which hook points are gates and outputs there, and the logit lens beside them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphlens.edits.parts import PARTS
from graphlens.errors import InputError
from graphlens.file.io_names import LOGITS
from graphlens.file.names import in_block
from graphlens.file.sae_names import ACTS
from graphlens.surgery.adopted.past import without_past
from graphlens.surgery.gates import with_gates
from graphlens.surgery.graph import drop_unused, read_manifest, set_outputs, values_by_name
from graphlens.surgery.lens import PROBABILITIES, TOKENS, lens_rows, with_lens

# What can be edited in each block, where a model has it: in firing order.
EDITABLE = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)
LENS_COUNT = 5  # tokens that a row of the lens names


@dataclass(frozen=True)
class PageGraph:
    """A graph for a live page, and what is called what in it.

    Attributes:
        model: The graph, its manifest included. Its outputs are ``logits`` and those named below.
        gates: The hook points that have gates, in firing order, and after them those of ``features``.
        patterns: The hook point of each block's attention patterns; None where a block has none.
        outputs: Hook point -> the output with its activation, for gates and patterns.
        lens: The hook points that the rows of the lens read; None for a model that has no lens.
        no_lens: Why it has none, as a sentence; "" where it has one.
        features: The hook points with the features of the SAEs in the model, which are gates too.
    """

    model: ir.Model
    gates: tuple[str, ...]
    patterns: tuple[str | None, ...]
    outputs: dict[str, str]
    lens: tuple[str, ...] | None
    no_lens: str = ""
    features: tuple[str, ...] = ()


def page_graph(model: ir.Model) -> PageGraph:
    """The graph that a live page runs.

    Args:
        model: A hooked decoder whose activations are float32.

    Returns:
        The graph: a copy with required gates at the hook points of EDITABLE and at SAEs' features, and with a logit lens.

    Raises:
        InputError: The model is no decoder, or computes in another dtype.
    """
    manifest = read_manifest(model)
    config = manifest.config
    if config.is_vision or config.is_encoder:
        kind = "a vision model" if config.is_vision else "an encoder"
        raise InputError(
            f"{config.model_name} is {kind}: a page shows the next token, which decoders predict. graphlens drivable makes a "
            "file of it that JavaScript can edit."
        )
    blocks = [[in_block(layer, name) for name in EDITABLE] for layer in range(config.n_layers)]
    features = tuple(name for name in manifest.hooks if name.rpartition(".")[2] == ACTS)
    gates = (*(name for block in blocks for name in block if name in manifest.hooks), *features)
    patterns = tuple(
        name if name in manifest.hooks else None
        for name in (in_block(layer, "attn.hook_pattern") for layer in range(config.n_layers))
    )
    other = {manifest.hooks[name].dtype for name in gates} - {"float32"}
    if other or not gates:
        what = f"activations of {sorted(other)[0]}" if other else "no hook points that a page could edit"
        raise InputError(
            f"{config.model_name} has {what}: a page runs models of float32. Export it so, or adopt a float32 file."
        )
    driven = with_gates(without_past(model), {name: tuple(PARTS) for name in gates}, required=True)
    lens, why = _lens(driven)
    driven = driven if lens is None else lens
    hooks = read_manifest(driven).hooks
    outputs = {name: hooks[name].value for name in (*gates, *patterns) if name is not None}
    values = values_by_name(driven)
    ends = [] if lens is None else [PROBABILITIES, TOKENS]
    set_outputs(driven.graph, [values[name] for name in dict.fromkeys([LOGITS, *outputs.values(), *ends])])
    drop_unused(driven)
    return PageGraph(driven, gates, patterns, outputs, None if lens is None else tuple(lens_rows(model)), why, features)


def _lens(model: ir.Model) -> tuple[ir.Model | None, str]:
    """A copy with a lens, or None and why there is none."""
    manifest = read_manifest(model)
    missing = next((name for name in lens_rows(model) if name not in manifest.hooks), None)
    if missing is not None:
        return None, f"{manifest.config.model_name} has no logit lens: the file has no {missing!r}."
    try:
        return with_lens(model, LENS_COUNT), ""
    except InputError as error:
        return None, str(error)
