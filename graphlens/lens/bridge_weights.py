"""A model with its weights processed, as TransformerBridge goes on with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from graphlens.engine.engine import Engine
from graphlens.errors import InputError, warn


class LensWeights:
    """The part of TransformerBridge that gives weights by TransformerLens's names."""

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See HookedTransformer."""
        raise NotImplementedError

    def tl_named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight with its name, as ``named_parameters``. TransformerLens: the same name.

        Yields:
            (TransformerLens name, tensor).
        """
        yield from self.named_parameters()

    def tl_parameters(self) -> dict[str, torch.Tensor]:
        """Every weight by its name, ``blocks.0.attn.W_Q`` say. TransformerLens: the same name."""
        return dict(self.named_parameters())

    get_params = tl_parameters


def processed(engine: Engine, steps: Sequence[str], booted: tuple[str, str | None] | None) -> Engine | None:
    """An engine over the processed file of a model; None where the model stays as it is.

    Args:
        engine: Over the model's file as it is.
        steps: The steps of weight processing.
        booted: The model's name and revision, for files in another dtype than float32, in which weights are processed.

    Raises:
        InputError: While weights are set that are not the file's, and for a dtype whose processed weights cannot be had.
    """
    from graphlens.pipelines.cache import cached_export

    if engine.replaced:
        raise InputError(
            "weights were set by set_weights, and processing is of the file's: call model.reset_weights() first, or set "
            "weights after the processing."
        )
    done, dtype = engine.manifest.processing, engine.manifest.config.dtype
    if done:
        warn(
            f"the weights of this model are processed already ({', '.join(done)}) and stay as they are: boot it again to "
            "process them otherwise."
        )
    if done or not steps:
        return None
    name, revision = (str(engine.folder), None) if dtype == "float32" else booted or (None, None)
    if name is None:
        raise InputError(
            f"this model computes in {dtype}, and weights are processed in float32: boot it by its name, or in float32."
        )
    folder = cached_export(name, revision=revision, dtype=dtype, processing=steps)
    return Engine(folder, engine.asked, engine.manifest.config.n_ctx, engine.max_memory)
