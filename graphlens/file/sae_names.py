"""The names of the hook points that an SAE brings: each has that of the hook point where the SAE stands in front."""

from __future__ import annotations

from collections.abc import Collection, Iterable

HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
    "hook_sae_error",
    "hook_sae_output",
)
"""The hook points of an SAE, as SAELens names them, in the order in which they have values."""
INPUT, ACTS, ERROR, OUTPUT = HOOKS[0], HOOKS[2], HOOKS[4], HOOKS[5]
EDITABLE = HOOKS[:4]
"""Those whose edits its error term must not see."""
# Among an SAE's metadata: it was trained on what an attention or MLP module gives.
OF_MODULE = "trained_on_module_output"
FEATURES = "d_sae"  # the axis of an SAE's features; the hook map says how many they are


def is_of_sae(name: str) -> bool:
    """True for the name of a hook point that an SAE brings.

    >>> is_of_sae("blocks.2.hook_resid_post.hook_sae_acts_post")
    True
    """
    return name.rpartition(".")[2] in HOOKS


def host_of(name: str) -> str:
    """The hook point where an SAE stands, from the name of one that it brings.

    >>> host_of("blocks.2.hook_resid_post.hook_sae_acts_post")
    'blocks.2.hook_resid_post'
    """
    return name.rpartition(".")[0]


def with_saes(order: Iterable[str], wanted: Collection[str]) -> list[str]:
    """The names that are wanted, those of SAEs after the hook points where they stand.

    Args:
        order: Every name that is no SAE's, in an order.
        wanted: The names to keep.
    """
    hosts = {host_of(name) for name in wanted if is_of_sae(name)}
    names = (one for name in order for one in (name, *(f"{name}.{each}" for each in (HOOKS if name in hosts else ()))))
    return [name for name in names if name in wanted]
