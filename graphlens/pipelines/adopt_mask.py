"""Whether the input that matching took for the attention mask is one: patterns of attention tell which tokens are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.errors import ModelFileError
from graphlens.surgery.adoptable import STILL

if TYPE_CHECKING:
    from graphlens.file.safetensors import Array
    from graphlens.pipelines.adopt_probe import Probe

_NOTHING, _ROUNDED = 1e-5, 1e-2  # of a pattern: what a masked token has, in floats and in static quantisation


def ensure_masks(
    activations: Mapping[str, Array], probe: Probe, causal: bool, rounded: bool, name: str | None, original: Path
) -> tuple[str, ...]:
    """Refuses a file whose mask means something else than 1 at real tokens and 0 at padding.

    An input that is 1 at padding, or that is added to the scores, has the shape and type of a mask too. With it each run would be
    computed with the wrong tokens masked, and all arithmetic between hook points would hold.

    Args:
        activations: Hook name -> activation, of a run of whole prompts.
        probe: The prompts. Those padded on the left are there only if the file masks such padding.
        causal: True if tokens attend to none after them.
        rounded: True if patterns are rounded to integers.
        name: The original's name of the mask; None where it takes none.
        original: The file, for errors.

    Returns:
        What a statically quantised file does instead, in a sentence: a quantiser may round its mask away. It is adopted, so
        that drift can show it.

    Raises:
        ModelFileError: Tokens attend to padding, or to later tokens.
    """
    allowed = _ROUNDED if rounded else _NOTHING
    for hook, pattern in activations.items():
        if not hook.endswith("attn.hook_pattern") or pattern.ndim != 4 or pattern.shape[2] != pattern.shape[3]:
            continue
        mask = np.ones(probe.tokens.shape, bool) if probe.mask is None else probe.mask != 0
        hidden = np.broadcast_to(~mask[:, None, None, :], pattern.shape)
        if causal:
            hidden = hidden | ~np.tri(pattern.shape[2], dtype=bool)
        looked = np.abs(np.where(hidden, pattern, 0)).max((1, 3))[mask]
        if not (looked <= allowed).all():  # no number fails too
            what = "its attention" if name is None else f"its input {name!r} is no mask of 1 at real tokens, since it"
            far = float(np.nanmax(looked))
            if rounded:
                return (
                    f"{original.name} lets tokens look at padding or at later tokens ({hook} is {far:.1e} there): a quantiser "
                    "rounds its mask away, as in the original. Run prompts of one length.",
                )
            raise ModelFileError(
                f"{original}: {what} lets tokens look at padding or at later tokens ({hook} is {far:.1e} there). An input "
                f"that is 1 at padding, or is added to the scores, cannot be adopted. {STILL}"
            )
    return ()


def looks_ahead(activations: Mapping[str, Array], probe: Probe, rounded: bool) -> bool | None:
    """Whether tokens attend to later ones: what a mask that could not be read does all the same.

    Args:
        activations: Hook name -> activation, of a run of whole prompts.
        probe: The prompts.
        rounded: True if patterns are rounded to integers.

    Returns:
        True if one of the patterns does; None where no pattern is there.
    """
    mask = np.ones(probe.tokens.shape, bool) if probe.mask is None else probe.mask != 0
    later = ~np.tri(probe.tokens.shape[1], dtype=bool) & mask[:, None, :, None] & mask[:, None, None, :]
    found = None
    for hook, pattern in activations.items():
        if hook.endswith("attn.hook_pattern") and pattern.ndim == 4 and pattern.shape[2] == pattern.shape[3]:
            ahead = float(np.abs(np.where(later, pattern, 0)).max(initial=0))
            if not ahead <= (_ROUNDED if rounded else _NOTHING):
                return True
            found = False
    return found
