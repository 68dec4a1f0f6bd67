"""Tracing: how a Hugging Face module becomes a graph in which every hook point is marked.

One tracer for every family. Hook points are marked with a symbolic operator that the optimiser keeps; build.py turns
the marks into names. No weight exists while tracing: the module is built of fake tensors.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.activations import NewGELUActivation

from graphlens.export.families import Family, Tap

HOOK_DOMAIN = "ai.graphlens"
HOOK_OP = "HookPoint"
ATTENTION = "graphlens"
OPSET = 20
MODEL_PREFIX = "model."  # _Decoder's attribute, in front of every parameter name


def hook_point(x: Tensor, name: str) -> Tensor:
    """Marks ``x`` as the hook point ``name``: same shape and dtype, kept by export and optimiser."""
    return torch.onnx.ops.symbolic(
        f"{HOOK_DOMAIN}::{HOOK_OP}", (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1
    )


def hooked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with q, k, v, scores, pattern and z marked.

    query [b, h, q, d], key and value [b, kv_heads, k, d], attention_mask bool [b, 1, q, k] (True may be attended).
    Returns z [b, q, h, d] and the pattern [b, h, q, k]. Masked scores are -inf; a fully masked row has pattern 0.
    """
    prefix = f"blocks.{module.layer_idx}.attn."

    def marked(heads: Tensor, name: str) -> Tensor:
        return hook_point(heads.transpose(1, 2), prefix + name).transpose(1, 2)

    query, key, value = marked(query, "hook_q"), marked(key, "hook_k"), marked(value, "hook_v")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = torch.where(attention_mask, scores, torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device))
    scores = hook_point(scores, prefix + "hook_attn_scores")
    pattern = torch.softmax(scores, dim=-1)
    pattern = torch.where(torch.isnan(pattern), torch.zeros((), dtype=pattern.dtype, device=pattern.device), pattern)
    pattern = hook_point(pattern, prefix + "hook_pattern")
    z = hook_point(torch.matmul(pattern, value).transpose(1, 2), prefix + "hook_z")
    return z, pattern


def _mask_must_be_ready(*_: Any, **__: Any) -> Tensor:
    # Reached only if transformers stops passing a 4-D mask through unchanged. A missing mask means attention that is
    # silently not causal, so this must never return one.
    raise RuntimeError("transformers did not take the prepared 4-D attention mask")


class _Norm(nn.Module):
    """A LayerNorm or RMSNorm written out, with hook_scale and hook_normalized marked (the affine comes after)."""

    def __init__(self, norm: nn.Module, name: str, centred: bool) -> None:
        super().__init__()
        self.weight = norm.weight
        self.bias = getattr(norm, "bias", None)
        self.eps = float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
        self.name, self.centred = name, centred

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = hook_point(torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps), f"{self.name}.hook_scale")
        x = hook_point(x / scale, f"{self.name}.hook_normalized") * self.weight
        return x if self.bias is None else x + self.bias


class _FlatLinear(nn.Module):
    """nn.Linear on [tokens, features]: it exports as one Gemm that reads the weight as stored, untransposed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


class _Decoder(nn.Module):
    """The traced signature: positions, the [b, 1, q, k] mask and the [b, q] token mask come ready from outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.token_mask: Tensor | None = None

    def zero_padding(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        """A forward hook: ``out`` [b, q, D] with 0 where the token mask is False."""
        assert self.token_mask is not None
        return torch.where(self.token_mask.unsqueeze(-1), out, torch.zeros((), dtype=out.dtype, device=out.device))

    def forward(self, input_ids: Tensor, positions: Tensor, mask: Tensor, token_mask: Tensor) -> Tensor:
        self.token_mask = token_mask
        out = self.model(input_ids=input_ids, position_ids=positions, attention_mask=mask, use_cache=False)
        return out.logits


def _tap(module: nn.Module, prefix: str, tap: Tap) -> None:
    if tap.before is not None:
        before = prefix + tap.before
        module.register_forward_pre_hook(lambda _, args: (hook_point(args[0], before), *args[1:]))
    if tap.after is not None:
        after = prefix + tap.after

        def mark(_: nn.Module, __: Any, out: Any) -> Any:
            return (hook_point(out[0], after), *out[1:]) if isinstance(out, tuple) else hook_point(out, after)

        module.register_forward_hook(mark)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _instrument(model: nn.Module, family: Family) -> _Decoder:
    """Marks every hook point of the family on a freshly built model (in place) and wraps it for tracing."""
    decoder = _Decoder(model)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            _replace(model, path, _FlatLinear(module))
        elif type(module) is NewGELUActivation:
            _replace(model, path, nn.GELU(approximate="tanh"))  # the same function, as one node
    centred = family.normalization == "LN"
    if family.pos_embed is not None:
        # TransformerLens: the position embedding is 0 at masked pads. Registered before the tap, so it runs first.
        model.get_submodule(family.pos_embed).register_forward_hook(decoder.zero_padding)
    blocks = model.get_submodule(family.blocks)
    for i in range(len(blocks)):
        for path, name in family.norms.items():
            _replace(blocks[i], path, _Norm(blocks[i].get_submodule(path), f"blocks.{i}.{name}", centred))
    _replace(model, family.final_norm, _Norm(model.get_submodule(family.final_norm), "ln_final", centred))
    for path, tap in family.top.items():
        _tap(model.get_submodule(path), "", tap)
    for i in range(len(blocks)):
        for path, tap in family.block.items():
            _tap(blocks[i].get_submodule(path), f"blocks.{i}.", tap)
    return decoder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx reports progress on stdout and through warnings and loggers; a failure still raises."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def trace(config: Any, family: Family) -> ir.Model:
    """Builds the model of a transformers config without weights and traces it to an ONNX graph with marked hooks.

    The graph's inputs are input_ids, positions, mask and token_mask; its initializers are named as the module's
    parameters; they carry no data, except buffers that the model computes and no checkpoint stores.
    """
    AttentionInterface.register(ATTENTION, hooked_attention)
    AttentionMaskInterface.register(ATTENTION, _mask_must_be_ready)
    config = copy.deepcopy(config)
    config._attn_implementation = ATTENTION
    with _quiet(), torch.no_grad():
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            stored = set(model.state_dict())
            computed = {name for name, _ in model.named_buffers() if name not in stored}
            traced = _trace(model, family)
        values = _computed_buffers(config, computed) if computed else {}
    for name, value in traced.graph.initializers.items():
        buffer = values.get(name.removeprefix(MODEL_PREFIX))
        value.const_value = None if buffer is None else ir.tensor(buffer.numpy(), name=name)
    return traced


def _computed_buffers(config: Any, names: set[str]) -> dict[str, Tensor]:
    """Buffers that no checkpoint stores (rotary frequencies, say), by name, with the values the model gives them.

    The model is built for real, but every parameter moves to the meta device as it is registered, before it is touched.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        empty = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, empty)

    nn.Module.register_parameter = register_on_meta
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    finally:
        nn.Module.register_parameter = register
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _trace(model: nn.Module, family: Family) -> ir.Model:
    model.eval()
    decoder = _instrument(model, family).eval()
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    b, s = 2, 5
    ids = torch.zeros((b, s), dtype=torch.int64)
    inputs = (ids, ids.clone(), torch.ones((b, 1, s, s), dtype=torch.bool), ids.bool())
    rows = {0: batch, 1: sequence}
    program = torch.onnx.export(
        decoder,
        inputs,
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        verbose=False,
        input_names=["input_ids", "positions", "mask", "token_mask"],
        output_names=["logits"],
        dynamic_shapes=(rows, rows, {0: batch, 2: sequence, 3: sequence}, rows),
    )
    assert program is not None
    traced: ir.Model = program.model
    return traced
