"""Tracing: how a model without its weights becomes an ONNX graph, for any batch and length."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphlens.errors import ExportError
from graphlens.export.alone import alone
from graphlens.export.decoder import MODEL_PREFIX, Block, Decoder
from graphlens.export.encoder import Encoder
from graphlens.export.families import Spec
from graphlens.export.modules import own_model
from graphlens.export.post_norms import PostNormBlock
from graphlens.export.recorded import record
from graphlens.file.io_names import DECODER_INPUTS, ENCODER_INPUTS, INPUT_IDS, LOGITS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPSET = 20


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


@alone
def trace(config: PretrainedConfig | None, spec: Spec, layers: Sequence[int] | None = None) -> ir.Model:
    """Traces a model without its weights to an ONNX graph in which every hook point is marked.

    Args:
        config: transformers' config of the model; None where its modules are our own.
        spec: What it computes.
        layers: The blocks that the graph has, in order; None for all. See ``repeat_blocks``.

    Returns:
        A graph with the inputs of ``Decoder.forward`` or ``Encoder.forward``. Its initializers are named as the parameters,
        with "model." in front, and hold no data, except buffers that the model computes and no checkpoint stores.

    Raises:
        ExportError: transformers cannot build the model of this config, or builds another than the Spec says.
    """
    if spec.own:
        return _recorded(spec)
    assert config is not None, "the modules are transformers'"
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with _quiet(), torch.no_grad():
        with FakeTensorMode():
            model = _built(config, spec)
            stored = set(model.state_dict())
            computed = {name for name, _ in model.named_buffers() if name not in stored}
            with _as_specified():
                traced = _trace(_forward_of(model, spec, layers), spec)
        values = _computed_buffers(config, spec, computed) if computed else {}
    for name, value in traced.graph.initializers.items():
        if name.endswith(".slopes"):
            buffer = slopes(spec.attention.n_heads)
        elif name.endswith(".long_inv_freq"):
            buffer = _long_frequencies(config, spec)
        else:
            buffer = values.get(name.removeprefix(MODEL_PREFIX))
        value.const_value = None if buffer is None else ir.tensor(buffer.numpy(), name=name)
    return traced


@alone
def parameter_shapes(config: PretrainedConfig, spec: Spec) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that are traced, by name. The model has no weights.

    Args:
        config: transformers' config of the model.
        spec: What it computes.

    Raises:
        ExportError: transformers cannot build the model of this config, or builds another than the Spec says.
    """
    config = copy.deepcopy(config)
    with _quiet(), torch.device("meta"):
        model = _built(config, spec)
        with _as_specified():
            parameters = _forward_of(model, spec, None).named_parameters()
        return {name.removeprefix(MODEL_PREFIX): tuple(parameter.shape) for name, parameter in parameters}


@contextlib.contextmanager
def _as_specified() -> Iterator[None]:
    """Makes an ExportError of what torch raises where a Spec names modules or sizes that the model does not have."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # torch.onnx wraps whatever a forward raises in errors of its own
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # type: ignore[assignment]
        why = str(cause).strip().partition("\n")[0]
        raise ExportError(
            f"transformers' model is not what the family's Spec says ({type(cause).__name__}: {why:.200}). Either config.json "
            "asks for what graphlens does not know, or a family of your own names a module or a size that is not there."
        ) from error


def _built(config: PretrainedConfig, spec: Spec) -> nn.Module:
    """transformers' model of a config."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForCausalLM if spec.encoder is None else AutoModelForMaskedLM
    try:
        model: nn.Module = kind.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ExportError(f"transformers cannot build the model that config.json describes ({error}).") from error
    return model


def _forward_of(model: nn.Module, spec: Spec, layers: Sequence[int] | None) -> nn.Module:
    """The forward that is traced, of some blocks or of all, over the parameters of transformers' model."""
    if layers is not None:
        parent, _, name = spec.blocks.rpartition(".")
        every = model.get_submodule(spec.blocks)
        kept = {str(layer): every.get_submodule(str(layer)) for layer in layers}
        setattr(model.get_submodule(parent), name, nn.ModuleDict(kept))
    if spec.encoder is not None:
        return Encoder(model, spec)
    return Decoder(model, spec, PostNormBlock if spec.residual_norms else Block)


def slopes(n_heads: int, even: bool = False) -> Tensor:
    """The slopes of ALiBi (Press et al. 2021) for each head, float32 [1, n_heads, 1, 1], as Bloom has them.

    Args:
        n_heads: The number of heads. For one that is no power of two, those of the next larger power fill up the rest.
        even: True for powers of 2^(-8/n_heads) also there, as TransformerLens has them.
    """
    if even:
        start = 2 ** (-8 / n_heads)
        return (start * start ** torch.arange(n_heads)).to(torch.float32).reshape(1, -1, 1, 1)
    closest = 2 ** math.floor(math.log2(n_heads))
    base = 2 ** (-(2 ** -(math.log2(closest) - 3)))
    found = [base**index for index in range(1, closest + 1)]
    if closest != n_heads:
        extra = 2 ** (-(2 ** -(math.log2(2 * closest) - 3)))
        found += [extra**index for index in range(1, 1 + 2 * min(closest, n_heads - closest), 2)]
    return torch.tensor(found, dtype=torch.float32).reshape(1, -1, 1, 1)


def _long_frequencies(config: PretrainedConfig, spec: Spec) -> Tensor:
    """The rotary frequencies [r / 2] of an input that is longer than those of a short one hold for."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary = spec.attention.rotary
    assert rotary is not None
    assert rotary.short is not None
    found: Tensor = ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=rotary.short + 1)[0]
    return found


def _computed_buffers(config: PretrainedConfig, spec: Spec, names: set[str]) -> dict[str, Tensor]:
    """The values that the model gives to buffers that no checkpoint stores (rotary frequencies, say), by name.

    The model is built for real, but its parameters hold no data.
    """
    with _parameters_on_meta():
        model = _built(config, spec)
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _recorded(spec: Spec) -> ir.Model:
    """The graph of a model whose modules are our own."""
    with torch.no_grad(), _parameters_on_meta():
        decoder = Decoder(own_model(spec), spec).eval()
        for name, buffer in decoder.named_buffers():
            if name.endswith(".slopes"):
                buffer.copy_(slopes(spec.attention.n_heads, spec.attention.even_slopes))
        return record(decoder, OPSET)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Lets every parameter of the modules that are made move to the meta device as it is registered, before it is touched."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        empty = None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, empty)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _trace(forward: nn.Module, spec: Spec) -> ir.Model:
    """The graph of a forward over fake tensors, for any batch and length."""
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    b, s = 2, 5
    ids, square = torch.zeros((b, s), dtype=torch.int64), torch.ones((b, 1, s, s), dtype=torch.bool)
    rows, square_sizes = {0: batch, 1: sequence}, {0: batch, 2: sequence, 3: sequence}
    names: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    sizes: tuple[dict[int, torch.export.Dim], ...]
    if spec.encoder is None:
        names = DECODER_INPUTS
        inputs = (ids, ids.clone(), square, ids.bool(), square.clone(), torch.zeros((s, s)))
        sizes = (rows, rows, square_sizes, rows, square_sizes, {0: sequence, 1: sequence})
    else:
        names = ENCODER_INPUTS
        inputs = (ids, torch.ones((b, 1, 1, s), dtype=torch.bool), ids.clone())
        sizes = (rows, {0: batch, 3: sequence}, rows)
    program = torch.onnx.export(
        forward.eval(),
        inputs,
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        verbose=False,
        input_names=[INPUT_IDS, *names],
        output_names=[LOGITS],
        dynamic_shapes=sizes,
    )
    assert program is not None
    traced: ir.Model = program.model
    return traced
