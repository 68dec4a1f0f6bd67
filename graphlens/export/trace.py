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

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig

from graphlens.errors import ExportError
from graphlens.export.families import Family, Tap
from graphlens.file.io_names import BODY_INPUTS, INPUT_IDS, LOGITS
from graphlens.file.names import in_block

HOOK_DOMAIN = "ai.graphlens"
HOOK_OP = "HookPoint"
ATTENTION = "graphlens"
OPSET = 20
MODEL_PREFIX = "model."  # _Decoder's attribute, in front of every parameter name
# What transformers hands to some families' attention and hooked_attention does not compute.
_NOT_COMPUTED = ("sliding_window", "s_aux")


def hook_point(x: Tensor, name: str) -> Tensor:
    """Marks a tensor as a hook point, for export and optimiser to keep.

    Args:
        x: The activation.
        name: The hook point's full name.

    Returns:
        The same tensor for all that reads it: same shape and dtype.
    """
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
    **others: object,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with q, k, v, scores, pattern and z marked, as transformers' AttentionInterface asks.

    Masked scores are -inf; a fully masked row has pattern 0, as in TransformerLens.

    Args:
        module: transformers' attention module, which knows its layer.
        query: [b, h, q, d].
        key: [b, kv_heads, k, d].
        value: [b, kv_heads, k, d].
        attention_mask: bool [b, 1, q, k], True where a query may attend to a key.
        scaling: What the scores are multiplied by; None stands for 1 / sqrt(d).
        dropout: Not used: the model is in evaluation mode.
        softcap: The bound that tanh squeezes the scores into, or None.
        others: What transformers passes to other kinds of attention.

    Returns:
        z [b, q, h, d] and the pattern [b, h, q, k].

    Raises:
        ExportError: The family asks for a kind of attention that this function does not compute.
    """
    for name in _NOT_COMPUTED:
        if others.get(name) is not None:
            raise ExportError(f"the attention of {type(module).__name__} uses {name}, which graphlens cannot export.")
    layer = module.layer_idx

    def marked(heads: Tensor, name: str) -> Tensor:
        return hook_point(heads.transpose(1, 2), in_block(layer, name)).transpose(1, 2)

    query, key, value = marked(query, "attn.hook_q"), marked(key, "attn.hook_k"), marked(value, "attn.hook_v")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = torch.where(attention_mask, scores, torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device))
    scores = hook_point(scores, in_block(layer, "attn.hook_attn_scores"))
    pattern = torch.softmax(scores, dim=-1)
    pattern = torch.where(torch.isnan(pattern), torch.zeros((), dtype=pattern.dtype, device=pattern.device), pattern)
    pattern = hook_point(pattern, in_block(layer, "attn.hook_pattern"))
    z = hook_point(torch.matmul(pattern, value).transpose(1, 2), in_block(layer, "attn.hook_z"))
    return z, pattern


def _mask_must_be_ready(*_: object, **__: object) -> Tensor:
    """What transformers would call to build a mask of its own. It must not: the traced model is given one."""
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
        """The norm of ``x`` [b, p, d_model] over its last axis."""
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
        """The linear map of the last axis of ``x``."""
        flat = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


class _Decoder(nn.Module):
    """The model as it is traced: positions and masks are inputs, made ready outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.token_mask: Tensor | None = None

    def zero_padding(self, _: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """A forward hook: ``out`` [b, p, d_model] with 0 where the token mask is False."""
        assert self.token_mask is not None
        return torch.where(self.token_mask.unsqueeze(-1), out, torch.zeros((), dtype=out.dtype, device=out.device))

    def forward(self, input_ids: Tensor, positions: Tensor, mask: Tensor, token_mask: Tensor) -> Tensor:
        """Logits [b, p, d_vocab].

        Args:
            input_ids: int64 [b, p].
            positions: int64 [b, p].
            mask: bool [b, 1, q, k], True where a query may attend to a key.
            token_mask: bool [b, p], False at padding.
        """
        self.token_mask = token_mask
        out = self.model(input_ids=input_ids, position_ids=positions, attention_mask=mask, use_cache=False)
        return out.logits


def _tap(module: nn.Module, tap: Tap, layer: int | None = None) -> None:
    """Marks the hook points at a module's boundary; those of a block are named without ``blocks.N.``."""

    def full(name: str) -> str:
        return name if layer is None else in_block(layer, name)

    if tap.before is not None:
        before = full(tap.before)
        module.register_forward_pre_hook(lambda _, args: (hook_point(args[0], before), *args[1:]))
    if tap.after is not None:
        after = full(tap.after)

        def mark(_: nn.Module, __: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            return (hook_point(out[0], after), *out[1:]) if isinstance(out, tuple) else hook_point(out, after)

        module.register_forward_hook(mark)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts ``module`` where ``root`` has another at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _simplify(model: nn.Module, family: Family) -> None:
    """Replaces modules, in place, by ones that compute the same in fewer nodes."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            _replace(model, path, _FlatLinear(module))
        elif type(module).__name__ in family.tanh_gelu:
            _replace(model, path, nn.GELU(approximate="tanh"))


def _instrument(model: nn.Module, family: Family) -> _Decoder:
    """Marks every hook point of the family on a freshly built model (in place) and wraps it for tracing."""
    decoder = _Decoder(model)
    _simplify(model, family)
    if family.pos_embed is not None:
        # Registered before the tap, so it runs first.
        model.get_submodule(family.pos_embed).register_forward_hook(decoder.zero_padding)
    blocks = model.get_submodule(family.blocks)
    for layer, block in enumerate(blocks):
        for path, name in family.norms.items():
            _replace(block, path, _Norm(block.get_submodule(path), in_block(layer, name), family.centred_norms))
    final = model.get_submodule(family.final_norm)
    _replace(model, family.final_norm, _Norm(final, "ln_final", family.centred_norms))
    for path, tap in family.top.items():
        _tap(model.get_submodule(path), tap)
    for layer, block in enumerate(blocks):
        for path, tap in family.block.items():
            _tap(block.get_submodule(path), tap, layer)
    return decoder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch.onnx, which reports its progress on stdout and through warnings and loggers; errors still raise."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def trace(config: PretrainedConfig, family: Family) -> ir.Model:
    """Traces a model without its weights to an ONNX graph in which every hook point is marked.

    Args:
        config: transformers' config of the model.
        family: Its family.

    Returns:
        A graph with the inputs of ``_Decoder.forward``. Its initializers are named as the parameters, with "model." in
        front, and hold no data, except buffers that the model computes and no checkpoint stores.

    Raises:
        ExportError: transformers cannot build the model of this config.
    """
    AttentionInterface.register(ATTENTION, hooked_attention)
    AttentionMaskInterface.register(ATTENTION, _mask_must_be_ready)
    config = copy.deepcopy(config)
    config._attn_implementation = ATTENTION
    with _quiet(), torch.no_grad():
        with FakeTensorMode():
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
                raise ExportError(
                    f"transformers cannot build the model that config.json describes ({error})."
                ) from error
            stored = set(model.state_dict())
            computed = {name for name, _ in model.named_buffers() if name not in stored}
            traced = _trace(model, family)
        values = _computed_buffers(config, computed) if computed else {}
    for name, value in traced.graph.initializers.items():
        buffer = values.get(name.removeprefix(MODEL_PREFIX))
        value.const_value = None if buffer is None else ir.tensor(buffer.numpy(), name=name)
    return traced


def _computed_buffers(config: PretrainedConfig, names: set[str]) -> dict[str, Tensor]:
    """The values that the model gives to buffers that no checkpoint stores (rotary frequencies, say), by name.

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
    """The graph of a model of fake tensors, for any batch and length."""
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
        input_names=[INPUT_IDS, *BODY_INPUTS],
        output_names=[LOGITS],
        dynamic_shapes=(rows, rows, {0: batch, 2: sequence, 3: sequence}, rows),
    )
    assert program is not None
    traced: ir.Model = program.model
    return traced
