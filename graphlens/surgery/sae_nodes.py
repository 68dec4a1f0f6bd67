"""What an SAE computes, as nodes of a graph: the same as ``edits/sae_forward.py``, in standard operators, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphlens.file.held import HeldTensor
from graphlens.file.sae_config import SaeConfig
from graphlens.file.safetensors import Array
from graphlens.surgery.graph import Attribute, install, numbered

_EPSILON = 1e-5  # of the normalisation "layer_norm"
_INLINE = 1 << 10  # bytes of a weight that goes into the graph itself
_FLOAT = ir.DataType.FLOAT
Sizes = Sequence[int | ir.SymbolicDim]


class Nodes:
    """Nodes and constants that are to be put into a graph, all named under one hook point. Each output has a type and a shape.

    Args:
        prefix: What all names begin with.
        file: What the file is called that gets large constants when the graph is written.
    """

    def __init__(self, prefix: str, file: str) -> None:
        self.tape, self._prefix, self._file = Tape(), prefix, file
        self._numbers = 0

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sizes,
        dtype: ir.DataType = _FLOAT,
        **attributes: Attribute,
    ) -> ir.Value:
        """Adds a node with one output.

        Args:
            op_type: The operator.
            inputs: What the node reads.
            shape: The output's shape.
            dtype: Its dtype.
            **attributes: The node's attributes.

        Returns:
            The output.
        """
        value = self.tape.op(op_type, inputs, attributes)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
        return value

    def constant(self, array: Array, label: str) -> ir.Value:
        """Adds a constant; a large one stays where it is.

        Args:
            array: Its content.
            label: What it is called, after the prefix.

        Returns:
            The constant.
        """
        name = f"{self._prefix}/{label}"
        tensor: ir.TensorProtocol = ir.tensor(array, name=name)
        if array.nbytes > _INLINE and array.dtype == np.float32:
            tensor = HeldTensor(array, name, self._file)
        return self.tape.initializer(tensor, name=name)

    def integers(self, *numbers: int) -> ir.Value:
        """Adds a constant of int64, [number]."""
        self._numbers += 1
        return self.constant(np.asarray(numbers, np.int64), f"integers_{self._numbers}")

    def install(self, graph: ir.Graph, after: ir.Value) -> None:
        """Puts everything into a graph, behind the node that computes a value."""
        install(
            graph,
            self.tape,
            numbered(f"{self._prefix}/"),
            lambda node, place: f"{node.name}_{place}" if place else str(node.name),
            after=after,
        )


@dataclass(frozen=True)
class Coded:
    """The values of an SAE in a graph.

    Attributes:
        hooks: A name of ``HOOKS``, but for the error and the output -> its value.
        made: What it makes of its input, in the shape that it stands for.
    """

    hooks: Mapping[str, ir.Value]
    made: ir.Value


class SaeNodes:
    """An SAE being written as nodes.

    Args:
        nodes: Takes them.
        cfg: Its settings.
        weights: Its weights.
    """

    def __init__(self, nodes: Nodes, cfg: SaeConfig, weights: Mapping[str, Array]) -> None:
        self._nodes, self._cfg, self._weights = nodes, cfg, weights
        self._made: dict[str, ir.Value] = {}
        self._lead: Sizes = ()

    def coded(self, x: ir.Value) -> Coded:
        """The SAE of a value.

        Args:
            x: What it reads, float32 [..., d_in], or [..., head, d_head] where it joins heads.

        Returns:
            Its values.
        """
        cfg, op = self._cfg, self._nodes.op
        assert x.shape is not None, "that of a hook point"
        joins = cfg.reshape_activations == "hook_z"
        self._lead = tuple(x.shape)[: -2 if joins else -1]
        if joins:
            read = op("Reshape", [x, self._nodes.integers(*[0] * len(self._lead), -1)], self._wide(cfg.d_in))
        else:
            read = op("Identity", [x], tuple(x.shape))
        scaled, scale, shift = self._normalised(read)
        if cfg.apply_b_dec_to_input:
            scaled = op("Sub", [scaled, self._weight("b_dec")], self._wide(cfg.d_in))
        pre, gate = self._pre(scaled)
        post = self._post(pre, gate)
        recons = self._decoded(post)
        made = recons
        if cfg.is_transcoder:
            if cfg.has_skip:
                turned = op("Transpose", [self._weight("W_skip")], (cfg.d_in, cfg.width_out), perm=[1, 0])
                skip = op("MatMul", [x, turned], self._wide(cfg.width_out))
                made = op("Add", [made, skip], self._wide(cfg.width_out))
        else:
            if scale is not None:
                made = op("Mul", [made, scale], self._wide(cfg.d_in))
            if shift is not None:
                made = op("Add", [made, shift], self._wide(cfg.d_in))
            if joins:
                parts = tuple(x.shape)[-2:]
                sizes = self._nodes.integers(*[0] * len(self._lead), *(int(str(size)) for size in parts))
                made = op("Reshape", [made, sizes], tuple(x.shape))
        found = {
            "hook_sae_input": read,
            "hook_sae_acts_pre": pre,
            "hook_sae_acts_post": post,
            "hook_sae_recons": recons,
        }
        return Coded(found, made)

    def _wide(self, size: int) -> Sizes:
        return (*self._lead, size)

    def _weight(self, name: str) -> ir.Value:
        if name not in self._made:
            self._made[name] = self._nodes.constant(self._weights[name], name)
        return self._made[name]

    def _scalar(self, number: float, label: str) -> ir.Value:
        return self._nodes.constant(np.asarray(number, np.float32), label)

    def _mean(self, x: ir.Value) -> ir.Value:
        return self._nodes.op("ReduceMean", [x, self._nodes.integers(-1)], self._wide(1), keepdims=1)

    def _normalised(self, x: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """(the input in the scale that the SAE was trained in, by what factor and shift it goes back)."""
        op, size, kind = self._nodes.op, self._cfg.d_in, self._cfg.normalize_activations
        if kind not in ("constant_norm_rescale", "layer_norm"):
            return x, None, None
        if kind == "constant_norm_rescale":
            squares = op("Mul", [x, x], self._wide(size))
            total = op("ReduceSum", [squares, self._nodes.integers(-1)], self._wide(1), keepdims=1)
            norm = op("Sqrt", [total], self._wide(1))
            factor = op("Div", [self._scalar(size**0.5, "norm"), norm], self._wide(1))
            back = op("Reciprocal", [factor], self._wide(1))
            return op("Mul", [x, factor], self._wide(size)), back, None
        mean = self._mean(x)
        centred = op("Sub", [x, mean], self._wide(size))
        squares = op("Mul", [centred, centred], self._wide(size))
        # The deviation is over d_in - 1, as torch's.
        total = op("ReduceSum", [squares, self._nodes.integers(-1)], self._wide(1), keepdims=1)
        variance = op("Div", [total, self._scalar(size - 1, "count")], self._wide(1))
        deviation = op("Sqrt", [variance], self._wide(1))
        divisor = op("Add", [deviation, self._scalar(_EPSILON, "epsilon")], self._wide(1))
        return op("Div", [centred, divisor], self._wide(size)), deviation, mean

    def _pre(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(pre-activations, what a gated SAE opens its features by)."""
        op, wide = self._nodes.op, self._wide(self._cfg.d_sae)
        product = op("MatMul", [x, self._weight("W_enc")], wide)
        if self._cfg.activation != "gated":
            pre = op("Add", [product, self._weight("b_enc")], wide)
            return pre, pre
        gate = op("Add", [product, self._weight("b_gate")], wide)
        factor = self._nodes.constant(np.exp(self._weights["r_mag"]), "factor")
        return op("Add", [op("Mul", [product, factor], wide), self._weight("b_mag")], wide), gate

    def _post(self, pre: ir.Value, gate: ir.Value) -> ir.Value:
        """The features."""
        op, wide, kind = self._nodes.op, self._wide(self._cfg.d_sae), self._cfg.activation
        if kind == "topk":
            return self._largest(pre)
        rectified = op("Relu", [pre], wide)
        if kind == "relu":
            return rectified
        least = self._weight("threshold") if kind == "jumprelu" else self._scalar(0, "zero")
        compared = pre if kind == "jumprelu" else gate
        is_open = op("Greater", [compared, least], wide, ir.DataType.BOOL)
        return op("Mul", [rectified, op("Cast", [is_open], wide, to=int(_FLOAT))], wide)

    def _largest(self, pre: ir.Value) -> ir.Value:
        """The k largest of each token's pre-activations, rectified, the others 0."""
        cfg, op, wide = self._cfg, self._nodes.op, self._wide(self._cfg.d_sae)
        if cfg.rescale_acts_by_decoder_norm:
            pre = op("Mul", [pre, self._nodes.constant(self._norms(), "norms")], wide)
        assert cfg.k is not None, "the settings were checked"
        values, places = self._nodes.tape.op_multi_out(
            "TopK", [pre, self._nodes.integers(cfg.k)], {"axis": -1}, num_outputs=2
        )
        for value, dtype in ((values, _FLOAT), (places, ir.DataType.INT64)):
            value.shape, value.type = ir.Shape(self._wide(cfg.k)), ir.TensorType(dtype)
        rectified = op("Relu", [values], self._wide(cfg.k))
        sizes = op("Shape", [pre], (len(wide),), ir.DataType.INT64)
        nothing = op("Expand", [self._scalar(0, "nothing"), sizes], wide)
        return op("ScatterElements", [nothing, places, rectified], wide, axis=-1)

    def _norms(self) -> Array:
        """The norm of each feature's row in ``W_dec``, [d_sae]."""
        found: Array = np.linalg.norm(self._weights["W_dec"], axis=-1)
        return found

    def _decoded(self, post: ir.Value) -> ir.Value:
        """What features stand for, before any normalisation is undone."""
        cfg, op = self._cfg, self._nodes.op
        if cfg.rescale_acts_by_decoder_norm:
            factor = self._nodes.constant(1 / self._norms(), "inverse_norms")
            post = op("Mul", [post, factor], self._wide(cfg.d_sae))
        product = op("MatMul", [post, self._weight("W_dec")], self._wide(cfg.width_out))
        return op("Add", [product, self._weight("b_dec")], self._wide(cfg.width_out))
