"""What a call to a vision model asks for: its images, checked."""

from __future__ import annotations

from typing import cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, as_array
from graphlens.edits.gate import Window
from graphlens.engine.plan import Plan
from graphlens.errors import InputError, called
from graphlens.file.io_names import PIXELS
from graphlens.model.request import Reader, Request
from graphlens.model.text import Input


class VisionReader(Reader[ArrayT]):
    """Reads the arguments of a vision model's ``forward`` into requests."""

    def request(self, base: Plan, input: Input[ArrayT], *given: object, **options: object) -> Request:
        """The request of a call of ``forward``.

        Args:
            base: The plan of whole runs: which flags are set, and which SAEs there are.
            input: Images, float [b, channels, height, width] or one [channels, height, width].
            *given: None: a run over images has no other arguments.
            **options: None.

        Raises:
            InputError: For what are no images of the model's size.
            TypeError: For arguments that ``forward`` does not have.
        """
        if given or options:
            what = repr(next(iter(options), given[0] if given else ""))
            raise TypeError(f"{called()[0]}() does not take {what} here: a run of a vision model has its images alone.")
        pixels = self._pixels(input)
        shape = (len(pixels), self._engine.manifest.config.n_ctx)
        return Request(base, {PIXELS: pixels}, None, None, None, None, "", shape, Window.whole(*shape))

    def whole_prompts(self, base: Plan, input: Input[ArrayT], **forward_options: object) -> Request:
        """The same: a run over images is always whole.

        Args:
            base: The plan of whole runs: which flags are set, and which SAEs there are.
            input: See ``request``.
            **forward_options: See there.

        Raises:
            InputError: What ``request`` raises.
        """
        return self.request(base, input, **forward_options)

    def _pixels(self, input: object) -> Array:
        """Images as the graph takes them, float32 [b, channels, height, width]."""
        cfg = self._engine.manifest.config
        wanted = f"[batch, {cfg.n_channels}, {cfg.image_size}, {cfg.image_size}]"
        try:
            pixels = as_array(cast(ArrayInput, input))
        except (ValueError, TypeError) as error:
            raise InputError(f"images are an array of floats {wanted}, not {type(input).__name__}.") from error
        if pixels.ndim == 3:
            pixels = pixels[None]
        if pixels.shape[1:] != (cfg.n_channels, cfg.image_size, cfg.image_size) or not len(pixels):
            raise InputError(f"the images have shape {list(pixels.shape)}; this model's are {wanted}.")
        if pixels.dtype.kind != "f":
            raise InputError(
                f"the images hold {pixels.dtype}: pass floats, scaled and normalised as the model's image processor does it."
            )
        return np.ascontiguousarray(pixels, np.float32)
