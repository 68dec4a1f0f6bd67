"""Files that adopting refuses, or adopts in part: no transformers, two halves, frozen shapes, encoder-decoders, control flow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.adopt.checkpoints import LABELS, VOCABULARY, checkpoint_of, load
from tests.adopt.torch_routes import legacy, quiet

FROZEN = (1, 128)


def _saved(nodes: list[Any], inputs: list[Any], outputs: list[Any], numbers: dict[str, np.ndarray], path: Path) -> None:
    graph = helper.make_graph(
        nodes, "graph", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in numbers.items()]
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, producer_name="tf2onnx", ir_version=9), path)


def _numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def convolutions(path: Path, root: Path) -> None:
    """A convolutional classifier of images: no attention, and its Softmax is that of the classes."""
    node = helper.make_node
    nodes = [
        node("Conv", ["image", "w0", "b0"], ["c0"], name="conv0", pads=[1, 1, 1, 1]),
        node("Relu", ["c0"], ["r0"], name="relu0"),
        node("Conv", ["r0", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        node("Add", ["c1", "r0"], ["s1"], name="add1"),
        node("GlobalAveragePool", ["s1"], ["pooled"], name="pool"),
        node("Flatten", ["pooled"], ["flat"], name="flat"),
        node("Gemm", ["flat", "w2", "b2"], ["scores"], name="fc"),
        node("Softmax", ["scores"], ["classes"], name="softmax", axis=-1),
    ]
    numbers = {"w0": _numbers(5, 3, 3, 3), "b0": _numbers(5), "w1": _numbers(5, 5, 3, 3), "b1": _numbers(5)}
    numbers |= {"w2": _numbers(5, LABELS), "b2": _numbers(LABELS)}
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 24, 24])
    classes = helper.make_tensor_value_info("classes", TensorProto.FLOAT, ["batch", LABELS])
    _saved(nodes, [image], [classes], numbers, path)


def no_softmax(path: Path, root: Path) -> None:
    """What tf2onnx makes of a small network of token embeddings: no Softmax anywhere."""
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "bytes"], ["embedded"], name="embed"),
        node("MatMul", ["embedded", "w0"], ["m0"], name="dense0"),
        node("Add", ["m0", "b0"], ["a0"], name="bias0"),
        node("Relu", ["a0"], ["r0"], name="relu0"),
        node("ReduceMax", ["r0"], ["pooled"], name="max", axes=[1], keepdims=0),
        node("MatMul", ["pooled", "w1"], ["m1"], name="dense1"),
        node("Sigmoid", ["m1"], ["label"], name="sigmoid"),
    ]
    numbers = {"table": _numbers(257, 8), "w0": _numbers(8, 12), "b0": _numbers(12), "w1": _numbers(12, LABELS)}
    given = helper.make_tensor_value_info("bytes", TensorProto.INT32, ["batch", 64])
    label = helper.make_tensor_value_info("label", TensorProto.FLOAT, ["batch", LABELS])
    _saved(nodes, [given], [label], numbers, path)


class _Seq2Seq(torch.nn.Module):
    """An encoder-decoder as one graph from its two inputs to its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        name = "input_ids" if given.dtype == torch.int64 else "input_features"
        seen = torch.ones_like(decoder_input_ids)  # without it transformers looks for packed sequences
        options = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": seen, "use_cache": False}
        return self.model(**{name: given}, **options).logits


def _random(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def _exported(module: Any, given: Any, names: list[str], outputs: list[str], path: Path, axes: Any) -> None:
    with quiet():
        torch.onnx.export(
            module, given, path, input_names=names, output_names=outputs, dynamic_axes=axes, opset_version=17, dynamo=False
        )  # fmt: skip


def t5(path: Path, root: Path) -> None:
    """T5 with its decoder, in one graph: cross-attention and a relative position bias."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 40, "d_kv": 8, "d_ff": 77, "num_layers": 2, "num_heads": 5}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = _Seq2Seq(_random(transformers.T5ForConditionalGeneration(config)))
    ids = torch.arange(22).reshape(2, 11) + 2
    axes = {"input_ids": {0: "batch", 1: "sequence"}, "decoder_input_ids": {0: "batch", 1: "written"}}
    _exported(model, (ids, ids[:, :5]), list(axes), ["logits"], path, axes)


def t5_decoder(path: Path, root: Path) -> None:
    """T5's decoder alone, from the encoder's states: what optimum calls decoder_model.onnx."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 40, "d_kv": 8, "d_ff": 77, "num_layers": 2, "num_heads": 5}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = _random(transformers.T5ForConditionalGeneration(config))

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            from transformers.modeling_outputs import BaseModelOutput

            encoded = BaseModelOutput(last_hidden_state=states)
            return self.model(decoder_input_ids=ids, encoder_outputs=encoded, use_cache=False).logits

    ids = torch.arange(10).reshape(2, 5) + 2
    axes = {"input_ids": {0: "batch", 1: "written"}, "encoder_hidden_states": {0: "batch", 1: "sequence"}}
    _exported(Decoder(), (ids, torch.randn(2, 11, 40)), list(axes), ["logits"], path, axes)


def whisper(path: Path, root: Path) -> None:
    """Whisper: an encoder of sound and a decoder, in one graph."""
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 40, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 5}
    sizes |= {"decoder_attention_heads": 5, "encoder_ffn_dim": 77, "decoder_ffn_dim": 77, "num_mel_bins": 8}
    sizes |= {"vocab_size": VOCABULARY, "max_source_positions": 15, "max_target_positions": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **tokens)
    model = _Seq2Seq(_random(transformers.WhisperForConditionalGeneration(config)))
    axes = {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "written"}}
    given = (torch.randn(2, 8, 30), torch.arange(10).reshape(2, 5) + 2)
    _exported(model, given, list(axes), ["logits"], path, axes)


def branches(path: Path, root: Path) -> None:
    """A decoder whose graph is inside an If, as optimum's merged decoders are."""
    source = root / "branches-source.onnx"
    legacy("gpt2", checkpoint_of("gpt2", root), source)
    model = onnx.load(source)
    source.unlink()
    graph = model.graph
    parts = []
    for part in ("with", "without"):
        inside = onnx.GraphProto()
        inside.CopyFrom(graph)
        inside.name = part
        del inside.input[:]
        del inside.initializer[:]
        del inside.value_info[:]
        renamed = {output: f"{part}/{output}" for each in inside.node for output in each.output}
        for each in inside.node:
            each.name = f"{part}/{each.name}"
            each.input[:] = [renamed.get(value, value) for value in each.input]
            each.output[:] = [renamed[value] for value in each.output]
        inside.output[0].name = renamed[inside.output[0].name]
        parts.append(inside)
    chosen = helper.make_node(
        "If", ["use_cache_branch_0"], ["logits"], name="If", then_branch=parts[0], else_branch=parts[1]
    )
    first = helper.make_node("Squeeze", ["use_cache_branch"], ["use_cache_branch_0"], name="squeeze")
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend([first, chosen])
    graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    onnx.save(model, path)


def no_data(path: Path, root: Path) -> None:
    """A file whose external data is not beside it."""
    source = root / "no-data-source.onnx"
    legacy("gpt2", checkpoint_of("gpt2", root), source)
    onnx.save(onnx.load(source), path, save_as_external_data=True, location=path.name + "_data", size_threshold=64)
    source.unlink()
    (path.parent / (path.name + "_data")).unlink()


def halves(path: Path, root: Path) -> None:
    """Two folders, each with a half of a model: this file ends in the second block's input, ``*.second.onnx`` goes on."""
    source = root / "halves-source.onnx"
    legacy("gpt2", checkpoint_of("gpt2", root), source)
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    onnx.save(model, source)
    names = [value.name for value in model.graph.input]
    between = next(
        each.output[0] for each in model.graph.node if each.op_type == "Add" and "/h.1/Add" in each.output[0]
    )
    extractor = onnx.utils.Extractor(model)
    onnx.save(extractor.extract_model(names, [between]), path)
    second = _reachable(model, between)
    onnx.save(extractor.extract_model([between, *second], ["logits"]), path.with_suffix(".second.onnx"))
    source.unlink()


def _reachable(model: onnx.ModelProto, cut: str) -> list[str]:
    """The graph inputs that what comes after a value needs besides it."""
    made_by = {output: each for each in model.graph.node for output in each.output}
    inputs = {value.name for value in model.graph.input}
    found: list[str] = []
    left, seen = ["logits"], {cut}
    while left:
        value = left.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in inputs:
            found.append(value)
        left += list(made_by[value].input) if value in made_by else []
    return found


def hidden_states(path: Path, root: Path) -> None:
    """A decoder without its head: what gives embeddings for search."""
    model = load(checkpoint_of("llama", root)).model

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    ids = torch.arange(22).reshape(2, 11)
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask", "last_hidden_state")}
    _exported(Body(), (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"], ["last_hidden_state"], path, axes)


def frozen(path: Path, root: Path) -> None:
    """BERT with shapes of 1 x 128 in its file, as tools for phones make it."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5}
    config = transformers.BertConfig(**sizes, intermediate_size=77, max_position_embeddings=FROZEN[1])
    model = _random(transformers.BertForMaskedLM(config))

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    ids = torch.arange(FROZEN[1])[None]
    given = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    _exported(Called(), given, ["input_ids", "attention_mask", "token_type_ids"], ["logits"], path, {})


# What it is -> what makes it. A wrong --config is llama's file with neox's checkpoint folder.
STRANGE: dict[str, Callable[[Path, Path], None]] = {
    "convolutions": convolutions,
    "no-softmax": no_softmax,
    "t5": t5,
    "t5-decoder": t5_decoder,
    "whisper": whisper,
    "branches": branches,
    "no-data": no_data,
    "halves": halves,
    "hidden-states": hidden_states,
    "frozen": frozen,
}


def strange_file(name: str, root: Path) -> Path:
    """The file of a name of STRANGE under ``root``, in a folder of its own, made where it is not there yet."""
    path = root / "strange" / name / "model.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            STRANGE[name](path, root)
        except BaseException:
            shutil.rmtree(path.parent)
            raise
    return path
