"""The layout of cross-layer transcoders: for each layer a file of its encoder, and one of what it writes to each later layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from graphlens.errors import ModelFileError
from graphlens.file.inside import inside, read_regular
from graphlens.file.sae_layouts import Asked, Layout, Tensors
from graphlens.file.safetensors import Array

_CONFIG = "config.yaml"
_ENCODER, _DECODER = "W_enc_{}.safetensors", "W_dec_{}.safetensors"
_HOOK_IN, _HOOK_OUT = "hook_resid_mid", "hook_mlp_out"  # where none is told
_MOST_CONFIG = 1_000_000


@dataclass(frozen=True)
class CrossLayerFiles:
    """The files of a cross-layer transcoder. A layer is read when it is asked for.

    Attributes:
        folder: Their folder.
        layers: How many layers there are.
    """

    folder: Path
    layers: int

    @classmethod
    def of(cls, folder: Path) -> CrossLayerFiles:
        """Those in a folder.

        Args:
            folder: The folder.

        Raises:
            ModelFileError: There are none, or layers are missing.
        """
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        layers = sum(1 for name in names if re.fullmatch(r"W_enc_\d+\.safetensors", name))
        if not layers:
            raise ModelFileError(f"{folder}: no cross-layer transcoder: there is no {_ENCODER.format(0)}.")
        absent = [
            each for at in range(layers) for each in (_ENCODER.format(at), _DECODER.format(at)) if each not in names
        ]
        if absent:
            raise ModelFileError(f"{folder}: {absent[0]} is missing. Fetch the folder again.")
        return cls(folder, layers)

    @cached_property
    def hooks(self) -> tuple[str, str]:
        """What its features read and write in a block, by the file of settings: "hook_resid_mid" and "hook_mlp_out", say."""
        try:
            text = read_regular(inside(self.folder, _CONFIG), _MOST_CONFIG).decode("utf-8", "replace")
        except FileNotFoundError:
            text = ""
        told = dict(re.findall(r"^(feature_input_hook|feature_output_hook):\s*[\"']?([\w.]+)", text, re.MULTILINE))
        return told.get("feature_input_hook", _HOOK_IN), told.get("feature_output_hook", _HOOK_OUT)

    def encoder(self, layer: int) -> dict[str, Array]:
        """The encoder of a layer, and the bias of what is written to it.

        Args:
            layer: The layer, from 0.

        Returns:
            ``W_enc`` [d_in, d_sae], ``b_enc`` [d_sae], ``b_dec`` [d_out], and ``threshold`` [d_sae] where there is one.

        Raises:
            ModelFileError: The file is damaged, or lacks one.
        """
        tensors = Tensors(self.folder / _ENCODER.format(layer))
        tensors.take("W_enc", f"W_enc_{layer}", transposed=True)
        for name in ("b_enc", "b_dec"):
            tensors.take(name, f"{name}_{layer}")
        if f"threshold_{layer}" in tensors.names:
            tensors.take("threshold", f"threshold_{layer}")
        shapes = {name: array.shape for name, array in tensors.weights.items()}
        encoder = shapes["W_enc"]
        wanted = {"b_dec": encoder[:1], "b_enc": encoder[1:], "threshold": encoder[1:]}
        if len(encoder) != 2 or any(shapes.get(name, shape) != shape for name, shape in wanted.items()):
            raise ModelFileError(
                f"{self.folder / _ENCODER.format(layer)}: its shapes do not fit one another: {shapes}. Fetch the file again."
            )
        return tensors.weights

    def decoder(self, layer: int) -> Array:
        """What a layer's features write to their own and each later layer.

        Args:
            layer: The layer, from 0.

        Returns:
            float32[d_sae, layers - layer, d_out].

        Raises:
            ModelFileError: The file is damaged, or its decoder has another shape.
        """
        path = self.folder / _DECODER.format(layer)
        found = Tensors(path).array(f"W_dec_{layer}")
        if found.ndim != 3 or found.shape[1] != self.layers - layer:
            raise ModelFileError(
                f"{path}: a decoder of shape {list(found.shape)}, where [features, {self.layers - layer}, width] is wanted."
            )
        return found


def _refuse(folder: Path, asked: Asked) -> NoReturn:
    raise ModelFileError(
        f"{folder}: a cross-layer transcoder, whose features write to many layers: it is no SAE of one hook point. Open it with "
        "graphlens.CrossLayerTranscoder.from_folder, which encodes and decodes; it cannot be spliced into a graph."
    )


LAYOUT = Layout(
    "cross-layer transcoders",
    (_ENCODER.format(0), _DECODER.format(0)),
    (_CONFIG,),
    _refuse,
    "relu and jumprelu, by `graphlens.CrossLayerTranscoder` alone",
    "`config.yaml`",
    fetched=False,
)
