"""What an SAE's file says of the model that it was trained on, beside the model that it is put into."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from graphlens.errors import warn
from graphlens.file.names import split_name
from graphlens.file.processing import HOW_OPENED

if TYPE_CHECKING:
    from graphlens.edits.sae import Sae
    from graphlens.file.manifest import Manifest

_STREAM = (
    "hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
)  # fmt: skip
# Step of weight processing -> the hook points whose activations it changes, without their block. The model's predictions stay.
_CHANGED = {
    "center_writing_weights": _STREAM,
    "fold_value_biases": ("attn.hook_v", "attn.hook_z"),
    "fold_ln": ("mlp.hook_in",),
}


def warn_of_another_model(sae: Sae, manifest: Manifest) -> None:
    """Warns where an SAE says that it was trained on another model, or on one whose weights were processed otherwise.

    Args:
        sae: The SAE.
        manifest: What the model's file says about itself.
    """
    name, its = sae.cfg.model_name, manifest.config.model_name
    if name is not None and _plain(name) not in map(_plain, (its, manifest.source)):
        warn(f"the SAE at {sae.cfg.hook!r} was trained on {name}, and this model is {its}.")
    told = sae.cfg.metadata.get(HOW_OPENED)
    if not isinstance(told, dict):
        return
    places = {split_name(hook)[1] for hook in (sae.cfg.hook, sae.cfg.writes)}
    done = [
        step for step in manifest.processing if told.get(step) is False and places.intersection(_CHANGED.get(step, ()))
    ]
    if done:
        warn(
            f"the SAE at {sae.cfg.hook!r} was trained on weights without {' and '.join(done)}, which this model's went through: "
            "its activations there are others. Open the model with from_pretrained_no_processing, or pass "
            f"{', '.join(f'{step}=False' for step in done)}."
        )


def _plain(name: str) -> str:
    """A model's name whoever published it: "google/gemma-2-2b" and "gemma-2-2b" are one, "gpt2-small" and "gpt2" too."""
    return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower()).removesuffix("small")
