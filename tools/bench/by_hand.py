"""GPT-2 and Llama without hooks, as one would write them by hand in ONNX: each norm and each activation is one operator.

A stricter floor than the stripped file, whose norms are in the steps that hook points need.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[np.float32]]
OPSET = 20


class Writer:
    """A graph in the making. Values are named by their numbers; weights by their names in the checkpoint."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self.used = weights, Weights()
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node and gives its output, or outputs."""
        from onnx import helper

        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, name: str, transposed: bool = False) -> str:
        """A weight of the checkpoint."""
        found = self._weights[name]
        self.used[name] = np.ascontiguousarray(found.T if transposed else found)
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small constant."""
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def heads(self, value: str, count: int) -> str:
        """[b * p, heads * d_head] -> [b, heads, p, d_head]."""
        shape = self("Concat", self("Shape", "input_ids"), self.constant([count, -1]), axis=0)
        return str(self("Transpose", self("Reshape", value, shape), perm=[0, 2, 1, 3]))

    def rows(self, value: str, width: int) -> str:
        """[b, p, width] -> [b * p, width]: of a matrix, a product with a matrix and a sum with a vector are one operator."""
        return str(self("Reshape", value, self.constant([-1, width])))

    def product(self, value: str, weight: str, bias: str = "", transposed: bool = False) -> str:
        """[rows, in] times a weight [in, out], or its transpose, plus a bias."""
        return str(self("Gemm", value, weight, *([bias] if bias else []), transB=int(transposed)))

    def logits(self, value: str, unembedding: str, width: int) -> str:
        """[b, p, V] from [b * p, d] and W_E [V, d]."""
        shape = self("Concat", self("Shape", "input_ids"), self.constant([width]), axis=0)
        return str(self("Reshape", self.product(value, unembedding, transposed=True), shape))

    def attention(self, q: str, k: str, v: str, masked: str, scale: float) -> str:
        """[b, p, heads, d_head] from q, k and v [b, heads, p, d_head]; ``masked``: float [p, p], added to the scores."""
        keys = self("Transpose", k, perm=[0, 1, 3, 2])
        scaled = self("Mul", q, self.constant(scale, np.float32))
        pattern = self("Softmax", self("Add", self("MatMul", scaled, keys), masked), axis=-1)
        return str(self("Transpose", self("MatMul", pattern, v), perm=[0, 2, 1, 3]))

    def causal(self, ids: str) -> tuple[str, str]:
        """(the positions int64 [p], what is added to scores: 0 where a query may look, else a large negative number)."""
        length = self("Gather", self("Shape", ids), self.constant(1))
        positions = self("Range", self.constant(0), length, self.constant(1))
        later = self("Less", self("Unsqueeze", positions, self.constant([1])), positions)
        masked = self("Where", later, self.constant(np.finfo(np.float32).min, np.float32), self.constant(0, np.float32))
        return positions, masked


def gpt2(write: Writer, config: dict[str, Any], prefix: str) -> str:
    """The logits of GPT-2."""
    heads, eps = config["n_head"], config["layer_norm_epsilon"]
    positions, masked = write.causal("input_ids")

    def norm(value: str, name: str) -> str:
        scale, bias = (write.weight(f"{prefix}{name}.{part}") for part in ("weight", "bias"))
        return str(write("LayerNormalization", value, scale, bias, axis=-1, epsilon=eps))

    def linear(value: str, name: str) -> str:  # GPT-2's matrices are [in, out]
        weight, bias = (write.weight(f"{prefix}{name}.{part}") for part in ("weight", "bias"))
        return write.product(value, weight, bias)

    width = config["n_embd"]
    embedded = write("Gather", write.weight(f"{prefix}wte.weight"), "input_ids")
    residual = write.rows(
        write("Add", embedded, write("Gather", write.weight(f"{prefix}wpe.weight"), positions)), width
    )
    scale = (width // heads) ** -0.5
    for layer in range(config["n_layer"]):
        block = f"h.{layer}."
        together = linear(norm(residual, f"{block}ln_1"), f"{block}attn.c_attn")
        q, k, v = (write.heads(each, heads) for each in write("Split", together, outputs=3, axis=-1, num_outputs=3))
        z = write.rows(write.attention(q, k, v, masked, scale), width)
        residual = write("Add", residual, linear(z, f"{block}attn.c_proj"))
        hidden = write("Gelu", linear(norm(residual, f"{block}ln_2"), f"{block}mlp.c_fc"), approximate="tanh")
        residual = write("Add", residual, linear(hidden, f"{block}mlp.c_proj"))
    return write.logits(norm(residual, "ln_f"), write.weight(f"{prefix}wte.weight"), config["vocab_size"])


def llama(write: Writer, config: dict[str, Any], prefix: str) -> str:
    """The logits of Llama. Its norms are one ``SimplifiedLayerNormalization`` of ONNX Runtime's each."""
    count, kept, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    width = config["hidden_size"] // count
    positions, masked = write.causal("input_ids")
    rotary = config.get("rope_parameters") or {}
    theta = float(rotary.get("rope_theta", config.get("rope_theta", 10_000.0)))
    inverse = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.outer(np.arange(config["max_position_embeddings"]), np.concatenate([inverse, inverse]))
    write.used |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    cos, sin = write("Gather", "cos", positions), write("Gather", "sin", positions)

    def norm(value: str, name: str) -> str:
        return str(
            write("SimplifiedLayerNormalization", value, write.weight(f"{prefix}{name}.weight"), axis=-1, epsilon=eps)
        )

    def linear(value: str, name: str) -> str:
        return write.product(value, write.weight(f"{prefix}{name}.weight", transposed=True))

    def turned(value: str) -> str:
        first, second = write("Split", value, outputs=2, axis=-1, num_outputs=2)
        other = write("Concat", write("Neg", second), first, axis=-1)
        return str(write("Add", write("Mul", value, cos), write("Mul", other, sin)))

    def repeated(value: str) -> str:  # [b, kv heads, p, d] -> [b, heads, p, d]
        if kept == count:
            return value
        several = write(
            "Expand", write("Unsqueeze", value, write.constant([2])), write.constant([1, 1, count // kept, 1, 1])
        )
        shape = write(
            "Concat", write("Shape", value, end=1), write.constant([count]), write("Shape", value, start=2), axis=0
        )
        return str(write("Reshape", several, shape))

    residual = write.rows(
        write("Gather", write.weight(f"{prefix}embed_tokens.weight"), "input_ids"), config["hidden_size"]
    )
    for layer in range(config["num_hidden_layers"]):
        block = f"layers.{layer}."
        read = norm(residual, f"{block}input_layernorm")
        q, k, v = (
            write.heads(linear(read, f"{block}self_attn.{letter}_proj"), heads)
            for letter, heads in (("q", count), ("k", kept), ("v", kept))
        )
        z = write.attention(turned(q), repeated(turned(k)), repeated(v), masked, width**-0.5)
        z = write.rows(z, count * width)
        residual = write("Add", residual, linear(z, f"{block}self_attn.o_proj"))
        read = norm(residual, f"{block}post_attention_layernorm")
        gate = linear(read, f"{block}mlp.gate_proj")
        hidden = write("Mul", write("Mul", gate, write("Sigmoid", gate)), linear(read, f"{block}mlp.up_proj"))
        residual = write("Add", residual, linear(hidden, f"{block}mlp.down_proj"))
    head = f"{prefix}embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return write.logits(norm(residual, "norm"), write.weight(head), config["vocab_size"])


ARCHITECTURES = {"gpt2": gpt2, "llama": llama}


def write_by_hand(checkpoint: str, folder: str) -> None:
    """Writes ``model.onnx`` and its weights into a folder, from a checkpoint's config and safetensors."""
    import onnx
    from onnx import helper
    from safetensors.numpy import save_file

    config = json.loads((Path(checkpoint) / "config.json").read_text())
    weights = Weights(_weights(Path(checkpoint)))
    first = {"gpt2": "wte.weight", "llama": "embed_tokens.weight"}[config["model_type"]]
    prefix = next(name for name in weights if name.endswith(first))[: -len(first)]
    write = Writer(weights)
    logits = ARCHITECTURES[config["model_type"]](write, config, prefix)
    write.nodes[-1].output[0] = "logits" if write.nodes[-1].output[0] == logits else logits
    out = Path(folder)
    out.mkdir(parents=True)
    save_file(write.used, out / "weights.safetensors")
    external = list(_external(write.used, out / "weights.safetensors"))
    graph = helper.make_graph(
        write.nodes,
        "by hand",
        [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "sequence", config["vocab_size"]])],
        [*write.constants, *external],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save(model, out / "model.onnx")


def _weights(checkpoint: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    from safetensors import safe_open

    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name).astype(np.float32, copy=False)


def _external(weights: Weights, path: Path) -> Iterator[Any]:
    """The tensors of a graph whose data lie in a safetensors file."""
    import onnx

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, array in weights.items():
        begin, end = header[name]["data_offsets"]
        tensor = onnx.TensorProto(
            name=name, data_type=onnx.TensorProto.FLOAT, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL
        )
        for key, value in (("location", path.name), ("offset", str(8 + size + begin)), ("length", str(end - begin))):
            tensor.external_data.add(key=key, value=value)
        yield tensor
