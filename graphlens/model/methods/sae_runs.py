"""What HookedTransformer has of SAELens's HookedSAETransformer: runs with SAEs in one call, by SAELens's names.

These functions are methods: ``HookedTransformer`` takes them in by their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack, cast

from graphlens.analysis.arrays import ArrayT

if TYPE_CHECKING:
    from graphlens.analysis.cache.activation_cache import ActivationCache
    from graphlens.edits.sae import Sae
    from graphlens.model.forward import CacheOptions, HookOptions
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.request import ForwardOptions
    from graphlens.model.text import Input


def run_with_saes(
    self: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    return_type: str | None = "logits",
    loss_per_token: bool = False,
    *,
    saes: Sae | Sequence[Sae] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    exclude_special_tokens: bool | Sequence[int] = False,
    **options: Unpack[ForwardOptions[ArrayT]],
) -> ArrayT:
    """Runs the model once with SAEs. SAELens: the same name.

    Args:
        input: As in ``forward``.
        return_type: As in ``forward``.
        loss_per_token: As in ``forward``.
        saes: See ``saes``, as for the next three.
        reset_saes_end: See there.
        use_error_term: See there.
        exclude_special_tokens: See there.
        **options: The arguments of ``forward`` by name.

    Returns:
        What ``return_type`` names.

    Raises:
        UnknownHookPoint: See ``add_sae``.
        InputError: See there; and what ``forward`` raises.
    """
    with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
        return cast(ArrayT, self.forward(input, return_type, loss_per_token, **options))


def run_with_cache_with_saes(
    self: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    return_type: str | None = "logits",
    *,
    saes: Sae | Sequence[Sae] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    exclude_special_tokens: bool | Sequence[int] = False,
    return_cache_object: bool = True,
    **options: Unpack[CacheOptions[ArrayT]],
) -> tuple[ArrayT, ActivationCache[ArrayT]]:
    """Runs the model once with SAEs and keeps its activations, the SAEs' among them. SAELens: the same name.

    Args:
        input: As in ``forward``.
        return_type: As in ``forward``.
        saes: See ``saes``, as for the next three.
        reset_saes_end: See there.
        use_error_term: See there.
        exclude_special_tokens: See there.
        return_cache_object: As in ``run_with_cache``.
        **options: The arguments of ``run_with_cache`` by name.

    Returns:
        (output, ActivationCache).

    Raises:
        UnknownHookPoint: See ``add_sae``; and for a filter that matches nothing.
        InputError: See ``add_sae``; and what ``run_with_cache`` raises.
    """
    with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
        found: tuple[ArrayT, ActivationCache[ArrayT]] = self.run_with_cache(
            input, return_type, return_cache_object=return_cache_object, **options
        )
        return found


def run_with_hooks_with_saes(
    self: HookedTransformer[ArrayT],
    input: Input[ArrayT],
    return_type: str | None = "logits",
    *,
    saes: Sae | Sequence[Sae] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    exclude_special_tokens: bool | Sequence[int] = False,
    **options: Unpack[HookOptions[ArrayT]],
) -> ArrayT:
    """Runs the model once with SAEs and with hooks, which may be at the SAEs' hook points. SAELens: the same name.

    Args:
        input: As in ``forward``.
        return_type: As in ``forward``.
        saes: See ``saes``, as for the next three.
        reset_saes_end: See there.
        use_error_term: See there; SAELens's has no such argument.
        exclude_special_tokens: See there.
        **options: ``fwd_hooks``, ``bwd_hooks`` and the other arguments of ``run_with_hooks`` by name.

    Returns:
        What ``return_type`` names.

    Raises:
        UnknownHookPoint: See ``add_sae``; and for a hook's name that is none.
        InputError: See ``add_sae``; and what ``run_with_hooks`` raises.
    """
    with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
        found: ArrayT = self.run_with_hooks(input, return_type, **options)
        return found
