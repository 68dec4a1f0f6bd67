"""Weight processing of weights in memory, by TransformerLens's names; nothing is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError
from graphlens.file.model_config import ModelConfig
from graphlens.file.names import split_name

# A bias that processing may need where there is none -> the matrix that says its shape.
_BIASES = {
    **{f"attn.b_{letter}": f"attn.W_{letter}" for letter in "QKV"},
    "attn.b_O": "attn.W_O", "mlp.b_in": "mlp.W_in", "mlp.b_gate": "mlp.W_gate", "mlp.b_out": "mlp.W_out",
    "unembed.b_U": "unembed.W_U",
}  # fmt: skip
_NORMS = ("ln1", "ln2", "ln_final", "mlp.ln")


def processed_state(
    state: Mapping[str, Array], steps: Sequence[str], config: ModelConfig, without_biases: bool = False
) -> dict[str, Array]:
    """Weights after TransformerLens's processing, in float32.

    Args:
        state: TransformerLens name -> weight. Keys' and values' weights as often as they are stored.
        steps: Which of file/processing.py's STEPS; their order is always theirs.
        config: The architecture that they are for.
        without_biases: True leaves the biases of norms where they are.

    Returns:
        The same names, and the biases that processing made where there were none. A norm that was folded is 1, its bias 0.

    Raises:
        InputError: For a norm's bias that would have to become one of the gate of an MLP, which has none.
    """
    from graphlens.surgery.processed import process_group

    found = {name: np.array(array, np.float32) for name, array in state.items()}
    groups: dict[int | None, dict[str, Array]] = {}
    for name, array in found.items():
        layer, rest = split_name(name)
        prefix, _, leaf = rest.rpartition(".")
        groups.setdefault(layer, {})[f"{prefix}.{leaf.removeprefix('_')}"] = array
    for layer, group in groups.items():
        made = {bias: _zeros(bias, group[matrix]) for bias, matrix in _BIASES.items() if matrix in group}
        made = {bias: array for bias, array in made.items() if bias not in group}
        kept = {name for name in group if without_biases and name in {f"{norm}.b" for norm in _NORMS}}
        work = {name: array for name, array in {**group, **made}.items() if name not in kept}
        process_group(work, steps, config)
        if "mlp.b_gate" in made and np.any(made["mlp.b_gate"]):
            raise InputError(
                f"blocks.{layer}.ln2.b cannot be folded into mlp.W_gate, which has no bias in TransformerLens: it would be "
                "lost. Pass fold_ln=False."
            )
        if "fold_ln" in steps:
            _set_to_one(group, kept)
        prefix = "" if layer is None else f"blocks.{layer}."
        found |= {f"{prefix}{bias}": array for bias, array in made.items() if np.any(array)}
    return found


def _zeros(bias: str, matrix: Array) -> Array:
    """A bias of zeros for a matrix."""
    per_head = matrix.ndim == 3 and bias != "attn.b_O"
    return np.zeros((matrix.shape[0], matrix.shape[2]) if per_head else matrix.shape[-1:], np.float32)


def _set_to_one(group: Mapping[str, Array], kept: Collection[str]) -> None:
    """Makes norms whose factors were folded those that do nothing."""
    for norm in _NORMS:
        if f"{norm}.w" in group:
            group[f"{norm}.w"][...] = 1
        if f"{norm}.b" in group and f"{norm}.b" not in kept:
            group[f"{norm}.b"][...] = 0
