"""A cross-layer transcoder as data: features that read one layer and write to it and all later ones; it is read only."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from graphlens.edits.numbers import numbers_of
from graphlens.errors import InputShapeError, ModelFileError, checked_number
from graphlens.file.folder import user_path
from graphlens.file.sae_cross_layer import CrossLayerFiles
from graphlens.file.safetensors import Array


class CrossLayerTranscoder:
    """A cross-layer transcoder: each layer's features read there, and write to that layer's MLP output and all later ones'.

    It encodes and decodes arrays. It cannot be spliced into a graph.

    Args:
        files: Its files. Each layer's are mapped when they are asked for.

    Attributes:
        n_layers: Number of layers.
        d_in: Width of what it reads and writes.
        d_sae: Features of a layer.
    """

    def __init__(self, files: CrossLayerFiles) -> None:
        self._files = files
        self.n_layers = files.layers
        self.d_in, self.d_sae = files.encoder(0)["W_enc"].shape

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> CrossLayerTranscoder:
        """Opens the one in a folder.

        Args:
            path: A folder with ``W_enc_0.safetensors``, ``W_dec_0.safetensors`` and so on, as circuit-tracer reads them.

        Returns:
            The transcoder. No weight is read yet.

        Raises:
            ModelFileError: There is none, or a layer of it is missing or damaged.
        """
        return cls(CrossLayerFiles.of(user_path(path)))

    def hooks(self, layer: int) -> tuple[str, str]:
        """The hook points of a layer: what its features read, and what is written for it.

        Args:
            layer: The layer; negative ones count from the end.

        Raises:
            InputError: There is no such layer.
        """
        at = self._layer(layer)
        read, written = self._files.hooks
        return f"blocks.{at}.{read}", f"blocks.{at}.{written}"

    def encode(self, x: npt.ArrayLike) -> Array:
        """The features of every layer.

        Args:
            x: What each layer reads, [layer, ..., d_in].

        Returns:
            float32[layer, ..., d_sae].

        Raises:
            InputError: It has other sizes.
            ModelFileError: A file is damaged.
        """
        read = self._of_layers(x, "x", self.d_in)
        return np.stack([self.encode_layer(layer, read[layer]) for layer in range(self.n_layers)])

    def encode_layer(self, layer: int, x: npt.ArrayLike) -> Array:
        """The features of one layer.

        Args:
            layer: The layer; negative ones count from the end.
            x: What it reads, [..., d_in].

        Returns:
            float32[..., d_sae].

        Raises:
            InputError: There is no such layer, or the width is another.
            ModelFileError: Its file is damaged.
        """
        at, read = self._layer(layer), numbers_of(x, "x")
        if read.shape[-1:] != (self.d_in,):
            raise InputShapeError(f"x: activations of shape {list(read.shape)}, where [..., {self.d_in}] is wanted.")
        weights = self._encoder(at)
        pre: Array = read @ weights["W_enc"] + weights["b_enc"]
        return pre * (pre > weights["threshold"]) if "threshold" in weights else np.maximum(pre, np.float32(0))

    def decode(self, features: npt.ArrayLike) -> Array:
        """What features write, summed over the layers that they come from.

        Args:
            features: [layer, ..., d_sae].

        Returns:
            float32[layer, ..., d_in], what is written for each layer.

        Raises:
            InputError: They have other sizes.
            ModelFileError: A file is damaged.
        """
        given = self._of_layers(features, "features", self.d_sae)
        biases = [self._encoder(layer)["b_dec"] for layer in range(self.n_layers)]
        made = np.stack([np.broadcast_to(bias, (*given.shape[1:-1], *bias.shape)) for bias in biases]).astype(
            np.float32
        )
        for layer in range(self.n_layers):
            decoder = self._files.decoder(layer)
            self._ensure_like(layer, "decoder", (decoder.shape[2], decoder.shape[0]))
            for later in range(decoder.shape[1]):
                made[layer + later] += given[layer] @ decoder[:, later]
        return made

    def _encoder(self, layer: int) -> dict[str, Array]:
        """The encoder of a layer, which must be as wide as the first one's."""
        weights = self._files.encoder(layer)
        self._ensure_like(layer, "encoder", weights["W_enc"].shape)
        return weights

    def _ensure_like(self, layer: int, what: str, sizes: tuple[int, ...]) -> None:
        if sizes != (self.d_in, self.d_sae):
            raise ModelFileError(
                f"layer {layer}: its {what} is of {sizes[1]} features and width {sizes[0]}, and layer 0's of {self.d_sae} and "
                f"{self.d_in}. One of the two files is another transcoder's."
            )

    def _layer(self, layer: int) -> int:
        return checked_number(layer, "layer", least=-self.n_layers, most=self.n_layers - 1) % self.n_layers

    def _of_layers(self, value: npt.ArrayLike, what: str, width: int) -> Array:
        """What a user gave for all layers, checked."""
        array = numbers_of(value, what)
        if array.ndim < 2 or array.shape[0] != self.n_layers or array.shape[-1] != width:
            raise InputShapeError(
                f"{what}: shape {list(array.shape)}, where [{self.n_layers}, ..., {width}] is wanted."
            )
        return array

    def __repr__(self) -> str:
        read, written = self._files.hooks
        return f"CrossLayerTranscoder({self.n_layers} layers of {self.d_sae} features, {read} -> {written})"
