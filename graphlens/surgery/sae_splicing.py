"""SAEs inside a graph: where each stands, what reads it, and the hook points that it brings."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphlens.edits.spliced_sae import SplicedSae
from graphlens.errors import InputError
from graphlens.file.io_names import INPUT_IDS, LOGITS, SEED
from graphlens.file.manifest import HookEntry, Manifest
from graphlens.file.names import RESIDUAL, axis_sizes, canonical, in_block, split_name, unknown_hook
from graphlens.file.sae_names import ERROR, FEATURES, INPUT, OF_MODULE, OUTPUT
from graphlens.surgery.clean_path import CLEAN
from graphlens.surgery.graph import finish, let_read, read_manifest, values_by_name
from graphlens.surgery.sae_nodes import Nodes, SaeNodes, Sizes

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae

_TOKENS = ("batch", "pos")
_PRE, _MLP_INPUT = "mlp.hook_pre", "mlp.hook_in"
# A sublayer's output -> the norm that lies before it, where a model has one.
_POST_NORMS = {"hook_mlp_out": "ln2_post.hook_scale", "hook_attn_out": "ln1_post.hook_scale"}
_BOOL, _FLOAT, _INT32 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT32


def with_sae(
    model: ir.Model,
    sae: Sae,
    error_term: bool = False,
    exclude_tokens: Iterable[int] | None = None,
    beside: bool = False,
    features: Sequence[int] | None = None,
) -> ir.Model:
    """A copy with an SAE inside: what it makes of a hook point's activations goes on in their place.

    It brings the hook points ``<hook>.hook_sae_input``, ``.hook_sae_acts_pre``, ``.hook_sae_acts_post``,
    ``.hook_sae_recons``, ``.hook_sae_error`` (with an error term) and ``.hook_sae_output``, as SAELens names them; those of a
    transcoder are named by the hook point that it stands for. The hook point itself has what the model computed, before the
    SAE. Gradients take the error for a constant, and no edit of the SAE's hook points changes it.

    Args:
        model: A hooked model; it is left as it is.
        sae: The SAE. Its weights are not copied.
        error_term: True adds what it does not reconstruct, so that the model computes what it did.
        exclude_tokens: The ids of tokens at which it is left out.
        beside: True lets the model compute what it did: the SAE's hook points can only be read.
        features: Only these features, in this order (``sae.only(features)``).

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model lacks a hook point of the SAE's.
        InputError: The widths differ, or an SAE is there already.
    """
    excluded = () if exclude_tokens is None else exclude_tokens
    chosen = sae if features is None else sae.only(features)
    return with_saes(model, [SplicedSae.of(chosen, error_term, excluded, beside)])


def with_saes(model: ir.Model, saes: Sequence[SplicedSae]) -> ir.Model:
    """A copy with several SAEs inside, whatever their order; see ``with_sae``.

    Args:
        model: A hooked model; it is left as it is.
        saes: The SAEs.

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model lacks a hook point of one of them.
        InputError: The widths differ, or two stand at one place.
    """
    if SEED in values_by_name(model):
        raise InputError(
            "this graph is differentiated: its gradients would be those of the model without the SAE. Put the SAE in first."
        )
    model = model.clone()
    manifest = read_manifest(model)
    manifest = manifest.with_hooks(_with_mlp_inputs(manifest.hooks, saes))
    order = {name: place for place, name in enumerate(manifest.hooks)}
    placed = [(place_of(one, manifest.hooks, manifest), one) for one in saes]
    written = [place.writes for place, _ in placed]
    if twice := [name for name in written if written.count(name) > 1]:
        raise InputError(f"two SAEs would stand for {twice[0]!r}: give one of them.")
    for name, entry in manifest.hooks.items():
        if not entry.value:
            manifest = manifest.with_hooks({**manifest.hooks, name: replace(entry, value=_read_by_mlp(model, name))})
    for place, one in sorted(placed, key=lambda pair: order[pair[0].writes]):
        manifest = _Splice(model, manifest, one, place).done()
    return finish(model, manifest, "the graph with SAEs")


def _with_mlp_inputs(hooks: Mapping[str, HookEntry], saes: Iterable[SplicedSae]) -> dict[str, HookEntry]:
    """Hook points, and what MLPs read where a transcoder asks for it: SAELens's ``mlp.hook_in``, which is none of a file's own.

    It has no value yet.
    """
    asked = {canonical(one.hook, hooks) for one in saes} - hooks.keys()
    found: dict[str, HookEntry] = {}
    for name, entry in hooks.items():
        layer, rest = split_name(name)
        if layer is not None and rest == _PRE and (own := in_block(layer, _MLP_INPUT)) in asked:
            found[own] = HookEntry("", RESIDUAL, entry.dtype)
        found[name] = entry
    return found


def _read_by_mlp(model: ir.Model, name: str) -> str:
    """The name of the value that is ``mlp.hook_in`` in a graph."""
    from graphlens.surgery.lone_part import read_by_mlp
    from graphlens.surgery.ranks import fill_in

    layer = split_name(name)[0]
    assert layer is not None, "a hook point of a block"
    value = read_by_mlp(model, layer)
    if value.type is None or value.shape is None:  # in a graph of another exporter
        fill_in(model)
    pre = values_by_name(model)[read_manifest(model).hooks[in_block(layer, _PRE)].value]
    if pre.is_graph_output() and not value.is_graph_output():  # as all hook points are, or none
        model.graph.outputs.append(value)
    return str(value.name)


def carried_on(hooks: Mapping[str, HookEntry], name: str) -> str:
    """The name of the value that goes on from a hook point: that of the SAE which stands there, or its own.

    Args:
        hooks: The graph's hook map.
        name: The hook point.
    """
    return hooks.get(f"{name}.{OUTPUT}", hooks[name]).value


class Place:
    """Where an SAE stands in a model: the hook points' own names.

    Args:
        reads: The hook point that it reads.
        writes: The hook point whose value it stands for.
    """

    def __init__(self, reads: str, writes: str) -> None:
        self.reads, self.writes = reads, writes


def place_of(one: SplicedSae, hooks: Mapping[str, HookEntry], manifest: Manifest) -> Place:
    """Where an SAE stands in a model, checked; nothing of a graph is looked at.

    Args:
        one: The SAE.
        hooks: The hook points that there are, in firing order.
        manifest: What the file says about itself.

    Returns:
        The place.

    Raises:
        UnknownHookPoint: The model lacks a hook point of the SAE's.
        InputError: The widths differ, an SAE is there already, the hook point is no activation of tokens, or the SAE writes
            before what it reads is there.
    """
    hooks = _with_mlp_inputs(hooks, [one])
    names, cfg, config = list(hooks), one.sae.cfg, manifest.config
    reads, writes = (canonical(name, hooks) for name in (one.hook, one.writes))
    for name in (reads, writes):
        if name not in hooks:
            raise unknown_hook(name, names, config.n_layers)
    joins = cfg.reshape_activations == "hook_z"
    sizes = axis_sizes(config)
    for name, width, what in ((reads, cfg.d_in, "d_in"), (writes, cfg.width_out, "d_out")):
        entry = hooks[name]
        lead = entry.axes[: -2 if joins else -1]
        its = math.prod(entry.sizes(sizes).get(axis, 1) for axis in entry.axes[len(lead) :])
        if lead[:2] != _TOKENS or not entry.dtype.startswith("float"):
            wanted = "[batch, pos, head, d_head]" if joins else f"[batch, pos, {what}]"
            raise InputError(
                f"this SAE cannot stand at {name!r}: it reads {wanted}, and the activations there are "
                f"[{', '.join(entry.axes)}] of {entry.dtype}."
            )
        if its != width:
            raise InputError(
                f"this SAE has {what} {width}, and the activations at {name!r} have a width of {its}: it was trained on another "
                f"model{'' if cfg.model_name is None else f' ({cfg.model_name})'} or for another hook point."
            )
    layer, rest = split_name(writes)
    norm = _POST_NORMS.get(rest)
    if cfg.metadata.get(OF_MODULE) and layer is not None and norm is not None and in_block(layer, norm) in hooks:
        raise InputError(
            f"this SAE was trained on what the module gives, and {writes!r} of this model is behind a norm that comes after it: "
            "there is no hook point between the two."
        )
    if hooks[writes].value == LOGITS and not one.beside:
        raise InputError(
            f"this SAE cannot stand at {writes!r}: that is the model's result, and nothing goes on from there."
        )
    if f"{writes}.{INPUT}" in hooks:
        raise InputError(
            f"an SAE stands at {writes!r} already: take it away first (reset_saes), or open the plain model."
        )
    if names.index(reads) > names.index(writes):
        raise InputError(f"this transcoder reads {reads!r}, which comes after {writes!r} that it stands for.")
    return Place(reads, writes)


class _Splice:
    """An SAE being put into a graph, in place."""

    def __init__(self, model: ir.Model, manifest: Manifest, one: SplicedSae, place: Place) -> None:
        self._graph, self._manifest, self._one, self._place = model.graph, manifest, one, place
        self._values = values_by_name(model)
        self._nodes = Nodes(f"{place.writes}/sae", f"sae-{one.key[:16]}.safetensors")

    def done(self) -> Manifest:
        """The manifest of the graph with the SAE in it."""
        place, hooks, sae = self._place, self._manifest.hooks, self._one.sae
        original = self._values[hooks[place.writes].value]
        # A transcoder that reads where another SAE stands reads what goes on from there.
        read = original if place.reads == place.writes else self._values[carried_on(hooks, place.reads)]
        readers = tuple(original.uses())
        was_output = original.is_graph_output()
        x = self._single(read)
        coded = SaeNodes(self._nodes, sae.cfg, sae.weights).coded(x)
        found = dict(coded.hooks)
        made = coded.made
        mask = self._mask(original) if self._one.excluded else None
        wide = x if read is original else self._single(original)
        if self._one.error_term:
            found[ERROR] = self._error(wide, made, mask)
            made = self._op("Add", [made, found[ERROR]], wide.shape)
        if mask is not None:
            made = self._op("Where", [mask, wide, made], wide.shape)
        found[OUTPUT] = self._like(made, original)
        entries = self._entries(found)
        for name, value in found.items():
            value.name = entries[name].value
        # Behind whatever comes last of what it reads: an output of the graph may be read from anywhere.
        self._nodes.install(self._graph, self._latest([read, original, *self._tokens()]))
        if not self._one.beside:
            let_read(readers, found[OUTPUT], original)
        if was_output:
            self._graph.outputs.extend(found.values())
        return self._manifest.with_hooks(self._hooks(entries, str(original.name), str(found[OUTPUT].name)))

    def _op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: ir.Shape | Sizes | None,
        dtype: ir.DataType = _FLOAT,
        **attributes: int,
    ) -> ir.Value:
        assert shape is not None, "that of a hook point"
        return self._nodes.op(op_type, inputs, tuple(shape), dtype, **attributes)

    def _single(self, value: ir.Value) -> ir.Value:
        """A value in float32, which an SAE computes in."""
        return value if value.dtype == _FLOAT else self._op("Cast", [value], value.shape, to=int(_FLOAT))

    def _like(self, made: ir.Value, original: ir.Value) -> ir.Value:
        """What goes on, as a value of its own, in the model's dtype."""
        dtype = original.dtype
        assert dtype is not None, "that of a hook point"
        if dtype == _FLOAT:
            return self._op("Identity", [made], original.shape)
        return self._op("Cast", [made], original.shape, dtype, to=int(dtype))

    def _error(self, original: ir.Value, made: ir.Value, mask: ir.Value | None) -> ir.Value:
        """What the SAE does not reconstruct; 0 where it is left out."""
        clean = self._op("Identity", [made], original.shape)
        clean.name = f"{self._place.writes}/{CLEAN}"
        error = self._op("Sub", [original, clean], original.shape)
        if mask is None:
            return error
        nothing = self._nodes.constant(np.zeros((), np.float32), "no_error")
        return self._op("Where", [mask, nothing, error], original.shape)

    def _tokens(self) -> list[ir.Value]:
        """The tokens, where some are left out. Raises InputError for a graph without them."""
        if not self._one.excluded:
            return []
        if INPUT_IDS not in self._values:
            raise InputError(
                "tokens to leave an SAE out at (exclude_special_tokens) can be told in a run from tokens alone, and this graph "
                "reads none."
            )
        return [self._values[INPUT_IDS]]

    def _mask(self, original: ir.Value) -> ir.Value:
        """True at the tokens where the SAE is left out: bool [batch, pos, 1, ...]."""
        (tokens,) = self._tokens()
        assert original.shape is not None, "that of a hook point"
        lead = tuple(original.shape)[:2]
        dtype = tokens.dtype
        assert dtype is not None, "that of an input"
        ids = self._nodes.constant(np.asarray(self._one.excluded, dtype.numpy()), "excluded")
        column = self._op("Unsqueeze", [tokens, self._nodes.integers(2)], (*lead, 1), dtype)
        is_one = self._op("Equal", [column, ids], (*lead, len(self._one.excluded)), _BOOL)
        counted = self._op("Cast", [is_one], is_one.shape, _INT32, to=int(_INT32))
        most = self._op("ReduceMax", [counted, self._nodes.integers(-1)], (*lead, 1), _INT32, keepdims=1)
        mask = self._op("Cast", [most], most.shape, _BOOL, to=int(_BOOL))
        more = len(original.shape) - 3
        if more:
            mask = self._op(
                "Unsqueeze", [mask, self._nodes.integers(*range(3, 3 + more))], (*lead, 1, *[1] * more), _BOOL
            )
        return mask

    def _entries(self, found: Collection[str]) -> dict[str, HookEntry]:
        """The entries of the SAE's hook points in the hook map, in firing order."""
        cfg, hooks = self._one.sae.cfg, self._manifest.hooks
        read, written = hooks[self._place.reads].axes, hooks[self._place.writes].axes
        lead = read[: -2 if cfg.reshape_activations == "hook_z" else -1]
        joined = (*lead, "d_queries") if len(lead) < len(read) - 1 else read
        features = (*lead, FEATURES)
        axes = {
            INPUT: joined,
            "hook_sae_acts_pre": features,
            "hook_sae_acts_post": features,
            "hook_sae_recons": joined if joined != read else written,
            ERROR: written,
            OUTPUT: written,
        }
        entries = {}
        for name, its in axes.items():
            if name in found:
                dtype = hooks[self._place.writes].dtype if name == OUTPUT else "float32"
                width = cfg.d_sae if its is features else None
                entries[name] = HookEntry(f"{self._place.writes}.{name}", its, dtype, width)
        return entries

    def _hooks(self, entries: Mapping[str, HookEntry], original: str, output: str) -> dict[str, HookEntry]:
        """The hook map with the SAE's after the hook point where it stands, and what shares its value later on."""
        hooks: dict[str, HookEntry] = {}
        passed = False
        for name, entry in self._manifest.hooks.items():
            later = passed and entry.value == original and not self._one.beside
            hooks[name] = replace(entry, value=output) if later else entry
            if name == self._place.writes:
                passed = True
                hooks |= {f"{name}.{each}": one for each, one in entries.items()}
        return hooks

    def _latest(self, values: Sequence[ir.Value]) -> ir.Value:
        """Of some values the one that is computed last."""
        producers = {value.producer(): value for value in values if value.producer() is not None}
        found = next((producers[node] for node in reversed(self._graph) if node in producers), None)
        return values[0] if found is None else found
