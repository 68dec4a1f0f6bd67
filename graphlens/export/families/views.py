"""Where TransformerLens's weights lie in a checkpoint: views of its tensors, from a Spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from graphlens.export.families.spec import EncoderParts, Experts, Mlp, Spec
from graphlens.file.manifest import WeightView
from graphlens.file.names import in_block


def weight_views(spec: Spec, key_of: Mapping[str, tuple[str, str]]) -> dict[str, WeightView]:
    """TransformerLens weight names -> views of checkpoint tensors.

    Args:
        spec: What the model computes.
        key_of: The name of a module's parameter -> the (file, key) that stores it. Weights of other parameters are
            left out.
    """
    placed = dict(_of_model(spec) if spec.encoder is None else _of_encoder(spec, spec.encoder))
    for layer in range(spec.n_layers):
        block = f"{spec.blocks}.{layer}."
        for name, view in _of_block(spec):
            placed[in_block(layer, name)] = replace(view, tensor=block + view.tensor)
    views = {}
    for name, view in placed.items():
        if view.tensor in key_of:
            file, key = key_of[view.tensor]
            views[name] = replace(view, file=file, tensor=key)
    return views


def _of(parameter: str) -> WeightView:
    """A parameter as it is; its file is not known yet."""
    return WeightView("", parameter)


def _norm(name: str, module: str | None, spec: Spec, shared: bool = True) -> Iterator[tuple[str, WeightView]]:
    """The weight and the bias of a norm, if there is one."""
    if module is not None:
        plus = 1.0 if spec.norms.plus_one and shared else None
        yield f"{name}.w", replace(_of(f"{module}.weight"), plus=plus)
        yield f"{name}.b", _of(f"{module}.bias")


def _of_model(spec: Spec) -> Iterator[tuple[str, WeightView]]:
    """The weights outside the blocks."""
    times = None if spec.embed_scale == 1 else spec.embed_scale
    if spec.embed_in is None:
        yield "embed.W_E", replace(_of(f"{spec.embed}.weight"), times=times)
    else:
        yield "embed.W_tokens", _of(f"{spec.embed}.weight")
        yield "embed.W_project", replace(_of(f"{spec.embed_in}.weight"), permute=(1, 0), times=times)
    yield from _norm("embed.ln", spec.embed_norm, spec, shared=False)
    if spec.pos_embed is not None:
        rows = (0, spec.pos_offset, spec.pos_offset + spec.n_ctx) if spec.pos_offset else None
        yield "pos_embed.W_pos", replace(_of(f"{spec.pos_embed}.weight"), cut=rows)
    yield from _norm("ln_final", spec.final_norm, spec)
    if spec.head_in is None:
        yield "unembed.W_U", replace(_of(f"{spec.head}.weight"), permute=(1, 0))
    else:
        yield "unembed.W_project", replace(_of(f"{spec.head_in}.weight"), permute=(1, 0))
        yield "unembed.W_tokens", replace(_of(f"{spec.head}.weight"), permute=(1, 0))
    yield "unembed.b_U", _of(f"{spec.head}.bias")


def _of_encoder(spec: Spec, parts: EncoderParts) -> Iterator[tuple[str, WeightView]]:
    """The weights outside the blocks of an encoder."""
    rows = (0, spec.pos_offset, spec.pos_offset + spec.n_ctx) if spec.pos_offset else None
    yield "embed.embed.W_E", _of(f"{spec.embed}.weight")
    yield "embed.pos_embed.W_pos", replace(_of(f"{spec.pos_embed}.weight"), cut=rows)
    yield "embed.token_type_embed.W_token_type", _of(f"{parts.token_types}.weight")
    yield from _norm("embed.ln", spec.embed_norm, spec)
    yield "mlm_head.W", replace(_of(f"{parts.dense}.weight"), permute=(1, 0))
    yield "mlm_head.b", _of(f"{parts.dense}.bias")
    yield from _norm("mlm_head.ln", spec.final_norm, spec)
    yield "unembed.W_U", replace(_of(f"{spec.head}.weight"), permute=(1, 0))
    yield "unembed.b_U", _of(f"{spec.head}.bias")


def _of_block(spec: Spec) -> Iterator[tuple[str, WeightView]]:
    """The weights of a block, as views of parameters of the block."""
    attention = spec.attention
    yield from _norm("ln1", spec.ln1, spec)
    yield from _norm("ln1_post", spec.ln1_post, spec)
    for part, letter in enumerate("QKV"):
        yield f"attn.W_{letter}", _heads(spec, part, "weight")
        yield f"attn.b_{letter}", _heads(spec, part, "bias")
    for letter, path in (("q", attention.q_norm), ("k", attention.k_norm)):
        yield from _norm(f"attn.{letter}_norm", None if path is None else f"{attention.module}.{path}", spec)
    out, sizes = f"{attention.module}.{attention.out}", (attention.n_heads, attention.d_head)
    # What is multiplied into a sublayer's output is so into its last weights: hook_attn_out is z W_O + b_O.
    times = None if spec.residual_scale == 1 else spec.residual_scale
    if spec.transposed:
        yield "attn.W_O", replace(_of(f"{out}.weight"), shape=(*sizes, spec.d_model), times=times)
    else:
        yield "attn.W_O", replace(_of(f"{out}.weight"), shape=(spec.d_model, *sizes), permute=(1, 2, 0), times=times)
    yield "attn.b_O", replace(_of(f"{out}.bias"), times=times)
    yield from _norm("ln2", spec.ln2, spec)
    yield from _norm("ln2_post", spec.ln2_post, spec)
    yield from _of_mlp(spec)


def _heads(spec: Spec, part: int, kind: str) -> WeightView:
    """W_Q, W_K or W_V [heads, d_model, d_head], or its bias [heads, d_head]: part 0, 1 or 2."""
    a = spec.attention
    groups, count = a.n_heads // a.n_key_value_heads, a.n_heads if part == 0 else a.n_key_value_heads
    sizes: tuple[int, ...] = (count, a.d_head)
    matrix = kind == "weight"
    if a.fused is None:
        view = _of(f"{a.module}.{(a.q, a.k, a.v)[part]}.{kind}")
    else:
        view = _of(f"{a.module}.{a.fused}.{kind}")
        if a.layout == "parts" and groups == 1:
            view = replace(view, take=(1 if spec.transposed and matrix else 0, part, 3))
        elif a.layout == "parts":
            start = (0, a.n_heads, a.n_heads + a.n_key_value_heads)[part] * a.d_head
            view = replace(view, cut=(1 if spec.transposed and matrix else 0, start, start + count * a.d_head))
        else:
            members = 1 if a.layout == "heads" else groups
            start, stop = ((0, members), (members, members + 1), (members + 1, members + 2))[part]
            view = replace(view, within=(1, start, stop), joined=True)
            sizes = (a.n_key_value_heads if a.layout == "groups" else a.n_heads, members + 2, a.d_head)
    if not matrix:
        return replace(view, shape=sizes)
    if spec.transposed:
        return replace(view, shape=(spec.d_model, *sizes), permute=(1, 0, 2))
    order = (0, 2, 1) if len(sizes) == 2 else (0, 1, 3, 2)
    return replace(view, shape=(*sizes, spec.d_model), permute=order)


def _of_mlp(spec: Spec) -> Iterator[tuple[str, WeightView]]:
    """The weights of a block's MLP."""
    mlp = spec.mlp
    at = f"{mlp.module}." if mlp.module else ""
    order = None if spec.transposed else (1, 0)
    if mlp.experts is not None:
        yield from _of_experts(mlp, mlp.experts)
        return
    if mlp.gate_up is not None:
        for part, letter in enumerate(("gate", "in")):
            half = (0, part, 2)
            yield f"mlp.W_{letter}", replace(_of(f"{at}{mlp.gate_up}.weight"), take=half, permute=order)
            yield f"mlp.b_{letter}", replace(_of(f"{at}{mlp.gate_up}.bias"), take=half)
    else:
        for letter, path in (("gate", mlp.gate), ("in", mlp.up)):
            if path is not None:
                yield f"mlp.W_{letter}", replace(_of(f"{at}{path}.weight"), permute=order)
                yield f"mlp.b_{letter}", _of(f"{at}{path}.bias")
    times = None if spec.residual_scale == 1 else spec.residual_scale
    yield "mlp.W_out", replace(_of(f"{at}{mlp.down}.weight"), permute=order, times=times)
    yield "mlp.b_out", replace(_of(f"{at}{mlp.down}.bias"), times=times)
    if mlp.late_bias is not None:
        yield "mlp.b_in", _of(f"{at}{mlp.late_bias}.bias")
    yield from _norm("mlp.ln", None if mlp.norm is None else at + mlp.norm, spec)


def _of_experts(mlp: Mlp, experts: Experts) -> Iterator[tuple[str, WeightView]]:
    """The weights of an MLP of experts, each matrix [outputs, inputs] as TransformerLens has them."""
    yield "mlp.W_gate.weight", _of(f"{mlp.module}.{experts.router}.weight")
    for expert in range(experts.count):
        for name, path in (("W_gate", mlp.gate), ("W_in", mlp.up), ("W_out", mlp.down)):
            yield f"mlp.experts.{expert}.{name}.weight", _of(f"{mlp.module}.{experts.each}.{expert}.{path}.weight")
