"""The cache of an encoder's run: an ActivationCache without what only a residual stream that is a sum has."""

from __future__ import annotations

from typing import Any, NoReturn

from graphlens.analysis.arrays import ArrayT
from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.errors import InputError


class EncoderCache(ActivationCache[ArrayT]):
    """Activations of an encoder by hook name; see ActivationCache.

    An encoder normalises its residual stream after each sublayer, so no residual stream is the sum of what was written to it,
    and its last one is not what the unembedding reads: what computes with such sums is refused. ``compute_head_results``,
    ``stack_head_results``, ``get_neuron_results``, ``stack_neuron_results`` and ``stack_activation`` are as in a decoder.
    """

    def _refused(self, name: str) -> NoReturn:
        raise InputError(
            f"{name} is for decoders: an encoder normalises its residual stream after each sublayer, so it is not the sum of "
            "what was written to it. There is stack_activation('resid_pre'), and stack_head_results."
        )

    def accumulated_resid(self, *args: Any, **options: Any) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("accumulated_resid")

    def decompose_resid(self, *args: Any, **options: Any) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("decompose_resid")

    def get_full_resid_decomposition(self, *args: Any, **options: Any) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("get_full_resid_decomposition")

    def apply_ln_to_stack(self, *args: Any, **options: Any) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("apply_ln_to_stack")

    def logit_lens(self, *args: Any, **options: Any) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("logit_lens")

    def logit_attrs(self, *args: Any, **options: Any) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("logit_attrs")

    def stack_head_results(self, layer: int | None = -1, *args: Any, **options: Any) -> Any:
        """As in ActivationCache, without a remainder and without a norm.

        Args:
            layer: See there.
            *args: The arguments after it.
            **options: The same by name.

        Raises:
            InputError: For ``incl_remainder`` and ``apply_ln``, and what it raises there.
        """
        self._plain("stack_head_results", ("return_labels", "incl_remainder", "pos_slice", "apply_ln"), args, options)
        return super().stack_head_results(layer, *args, **options)

    def stack_neuron_results(self, layer: int | None, *args: Any, **options: Any) -> Any:
        """As in ActivationCache, without a remainder and without a norm.

        Args:
            layer: See there.
            *args: The arguments after it.
            **options: The same by name.

        Raises:
            InputError: For ``incl_remainder`` and ``apply_ln``, and what it raises there.
        """
        order = ("pos_slice", "neuron_slice", "return_labels", "incl_remainder", "apply_ln", "project_output_onto")
        self._plain("stack_neuron_results", order, args, options)
        return super().stack_neuron_results(layer, *args, **options)

    def _plain(self, name: str, order: tuple[str, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Refuses a remainder and a norm among the arguments of a method."""
        given = dict(zip(order, args, strict=False)) | options
        for what in ("incl_remainder", "apply_ln"):
            if given.get(what):
                self._refused(f"{name} with {what}")
