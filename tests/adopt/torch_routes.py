"""Files as torch's two exporters make them of transformers' models: eager and sdpa attention, with and without past."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.adopt.adopt_cases import PAST, inputs_of
from tests.adopt.checkpoints import CHECKPOINTS, load

INPUTS = {
    "decoder": ("input_ids", "attention_mask", "position_ids"),
    "encoder": ("input_ids", "attention_mask", "token_type_ids"),
    "vision": ("pixel_values",),
}


class _Called(nn.Module):
    """A model called with tensors by place, which gives logits, and keys and values where it is given some."""

    def __init__(self, model: Any, names: Sequence[str], layers: int) -> None:
        super().__init__()
        self.model, self.names, self.layers = model, names, layers

    def forward(self, *tensors: Tensor) -> Any:
        options: dict[str, Any] = dict(zip(self.names, tensors, strict=False))
        kept = tensors[len(self.names) :]
        if "input_ids" in options and "token_type_ids" not in options:
            options["use_cache"] = bool(self.layers)
        if not self.layers:
            return self.model(**options).logits
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(self.layers):
            cache.update(kept[2 * layer], kept[2 * layer + 1], layer)
        logits = self.model(**options, past_key_values=cache).logits
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def legacy(name: str, checkpoint: Path, target: Path, attention: str = "eager", past: bool = False) -> None:
    """Exports with torch's older exporter (by tracing), opset 17."""
    module, tensors, inputs, outputs, axes = _parts(name, checkpoint, attention, past)
    with quiet():
        torch.onnx.export(
            module, tensors, target, input_names=inputs, output_names=outputs, dynamic_axes=axes, opset_version=17, dynamo=False
        )  # fmt: skip


def dynamo(name: str, checkpoint: Path, target: Path, opset: int, attention: str = "eager", past: bool = False) -> None:
    """Exports with torch's newer exporter, weights within the file."""
    module, tensors, inputs, outputs, axes = _parts(name, checkpoint, attention, past)
    sizes = {axis: torch.export.Dim.DYNAMIC for each in axes.values() for axis in each.values()}
    shapes = tuple({axis: sizes[size] for axis, size in axes[given].items()} for given in inputs)
    with quiet():
        torch.onnx.export(
            module, tensors, target, input_names=inputs, output_names=outputs, dynamic_shapes=(shapes,),
            opset_version=opset, dynamo=True, external_data=False,
        )  # fmt: skip


def _parts(name: str, checkpoint: Path, attention: str, past: bool) -> tuple[Any, ...]:
    """The module, its tensors, the names of its inputs and outputs, and which axes are dynamic."""
    names = INPUTS[CHECKPOINTS[name].kind]
    given = inputs_of(name, "plain")
    model = load(checkpoint, attention)
    tensors = [torch.from_numpy(given[each]) for each in names]
    axes: dict[str, dict[int, str]] = {each: {0: "batch", 1: "sequence"} for each in names}
    if "pixel_values" in axes:
        axes["pixel_values"] = {0: "batch"}
    outputs, inputs, layers = ["logits"], list(names), 0
    if past:
        config = model.config
        layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tensors = [
            tensor if each == "attention_mask" else tensor[:, PAST["past"] :]
            for each, tensor in zip(names, tensors, strict=True)
        ]
        axes["attention_mask"] = {0: "batch", 1: "all"}
        for layer in range(layers):
            for part in ("key", "value"):
                inputs.append(f"past_key_values.{layer}.{part}")
                outputs.append(f"present.{layer}.{part}")
                axes[inputs[-1]] = {0: "batch", 2: "past"}
                tensors.append(torch.randn(len(tensors[0]), heads, PAST["past"], width))
    return _Called(model, names, layers), tuple(tensors), inputs, outputs, axes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own words: none of them is about what is tested."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
