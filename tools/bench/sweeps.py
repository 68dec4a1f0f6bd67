"""Activation-patching sweeps: which cells they have, prompts for them, and the loop on a bare ONNX Runtime.

Imported in peers' environments too: only the standard library and NumPy at the top, no graphlens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LENGTH = 15
METADATA_KEY = "graphlens"  # where a hooked file says which of its outputs carries which hook point


@dataclass(frozen=True)
class Kind:
    """A sweep over every layer's ``hook`` and, within it, over ``axes`` (in the order of the result), each of which is
    axis ``places[axis]`` of the activation."""

    name: str
    hook: str
    axes: tuple[str, ...]
    places: Mapping[str, int]
    rank: int = 4

    def shape(self, layers: int, length: int, heads: int) -> tuple[int, ...]:
        """The result's: [layers, *axes]."""
        sizes = {"pos": length, "head": heads, "head_index": heads}
        return (layers, *(sizes[axis] for axis in self.axes))

    def hook_name(self, layer: int) -> str:
        """The hook point of one layer."""
        return f"blocks.{layer}.{self.hook}"


def _kinds() -> dict[str, Kind]:
    vector = {"pos": 1, "head": 2}
    kinds = [
        Kind("resid_pre", "hook_resid_pre", ("pos",), vector, rank=3),
        Kind("attn_head_out_all_pos", "attn.hook_z", ("head",), vector),
        Kind("attn_head_out_by_pos", "attn.hook_z", ("pos", "head"), vector),
        *(Kind(f"attn_head_{name}_all_pos", f"attn.hook_{name}", ("head",), vector) for name in "qkv"),
        Kind("attn_head_pattern_all_pos", "attn.hook_pattern", ("head_index",), {"head_index": 1}),
    ]
    return {kind.name: kind for kind in kinds}


KINDS = _kinds()


@dataclass(frozen=True)
class Prompts:
    """Token ids [b, p] of both sides, and the two whose logits are compared: correct minus incorrect."""

    clean: Array
    corrupted: Array
    answers: tuple[int, int]


def random_prompts(vocabulary: int, batch: int, length: int = LENGTH, one_token: bool = False) -> Prompts:
    """Seeded prompts that begin with the same token and differ at every other position, so that nothing is shared.

    ``one_token``: they differ at one position alone, two thirds through (10 of 15), as prompts with another name there do.
    """
    draw = np.random.default_rng(0)
    clean = draw.integers(1, vocabulary, (batch, length))
    corrupted = (clean - 1 + draw.integers(1, vocabulary - 1, clean.shape)) % (vocabulary - 1) + 1
    clean[:, 0] = corrupted[:, 0] = 0
    if one_token:
        same = np.arange(length) != 2 * length // 3
        corrupted[:, same] = clean[:, same]
    correct, incorrect = draw.choice(vocabulary, 2, replace=False).tolist()
    return Prompts(clean, corrupted, (correct, incorrect))


def even_layers(layers: int, share: int | None) -> list[int] | None:
    """``share`` of the layers, evenly spaced with both ends among them; None (all) where that is no fewer than all."""
    if share is None or share >= layers:
        return None
    if share == 1:
        return [layers // 2]
    return [round(index * (layers - 1) / (share - 1)) for index in range(share)]


def logit_difference(logits: Array, answers: tuple[int, int]) -> float:
    """Correct minus incorrect at the last position, averaged over the batch; logits: [b, p, V]."""
    last = logits[:, -1]
    return float((last[:, answers[0]] - last[:, answers[1]]).mean())


def open_bare(folder: str | Path) -> Any:
    """A plain onnxruntime.InferenceSession on a folder's file, defaults but for its warnings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"])


def write_gated(hooked: str, folder: str, pattern: str, part: str) -> None:
    """Writes a file whose only output is the logits, with a gate of one kind at every hook point that matches."""
    from graphlens.deploy import write_drivable

    write_drivable(hooked, pattern, folder, kinds=(part,))


def clean_activations(hooked: str | Path, kind: Kind, ids: Array) -> list[Array]:
    """The hook point's activation of each layer, from one run of the hooked file in a bare session."""
    session = open_bare(hooked)
    hooks = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])["hooks"]
    names = [f"blocks.{layer}.{kind.hook}" for layer in range(len(hooks)) if f"blocks.{layer}.{kind.hook}" in hooks]
    found: list[Array] = session.run([hooks[name]["value"] for name in names], {"input_ids": ids})
    return found


def floor_loop(
    session: Any,
    kind: Kind,
    corrupted: Array,
    clean: Sequence[Array],
    answers: tuple[int, int],
    layers: Sequence[int] | None = None,
) -> Array:
    """The sweep as one forward per patch: the logit difference of each, shaped as TransformerLens's functions shape it.

    ``session``: a bare one on a file with a patch gate at every layer's hook point (write_gated). ``clean``: that hook
    point's clean activation of each layer. ``layers``: those to sweep, None for all; the result has as many rows.
    """
    chosen = range(len(clean)) if layers is None else layers
    sizes = [clean[0].shape[kind.places[axis]] for axis in kind.axes]
    values = np.empty((len(chosen), *sizes), np.float32)
    for row, layer in enumerate(chosen):
        hook = kind.hook_name(layer)
        for cell in product(*map(range, sizes)):
            feed = {"input_ids": corrupted, f"{hook}/where": _where(kind, sizes, cell), f"{hook}/patch": clean[layer]}
            values[(row, *cell)] = logit_difference(session.run(["logits"], feed)[0], answers)
    return values


def _where(kind: Kind, sizes: Sequence[int], cell: Sequence[int]) -> Array:
    """What a patch replaces: a mask of the activation's rank, 1 along every axis but those swept."""
    shape = [1] * kind.rank
    index = [0] * kind.rank
    for axis, size, position in zip(kind.axes, sizes, cell, strict=True):
        shape[kind.places[axis]], index[kind.places[axis]] = size, position
    mask = np.zeros(shape, bool)
    mask[tuple(index)] = True
    return mask


def unpatched(session: Any, corrupted: Array, answers: tuple[int, int]) -> float:
    """The logit difference of the corrupted run without any patch."""
    return logit_difference(session.run(["logits"], {"input_ids": corrupted})[0], answers)
