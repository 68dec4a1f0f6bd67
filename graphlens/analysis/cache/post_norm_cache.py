"""The caches of models that normalise their residual stream: without what only a residual stream that is a sum has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from graphlens.analysis.arrays import ArrayT
from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.errors import InputError


class PostNormCache(ActivationCache[ArrayT]):
    """Activations of a model that normalises its residual stream after each sublayer (OPT-350m); see ActivationCache.

    No residual stream is the sum of what was written to it, and its last one is not what the unembedding reads: what computes
    with such sums is refused. ``compute_head_results``, ``stack_head_results``, ``get_neuron_results``,
    ``stack_neuron_results`` and ``stack_activation`` are as elsewhere.
    """

    _why = "is not for this model: it "

    def _refused(self, name: str) -> NoReturn:
        raise InputError(
            f"{name} {self._why}normalises its residual stream after each sublayer, so it is not the sum of "
            "what was written to it. There is stack_activation('resid_pre'), and stack_head_results."
        )

    def accumulated_resid(self, *args: object, **options: object) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("accumulated_resid")

    def decompose_resid(self, *args: object, **options: object) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("decompose_resid")

    def get_full_resid_decomposition(self, *args: object, **options: object) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("get_full_resid_decomposition")

    def apply_ln_to_stack(self, *args: object, **options: object) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("apply_ln_to_stack")

    def logit_lens(self, *args: object, **options: object) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("logit_lens")

    def logit_attrs(self, *args: object, **options: object) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("logit_attrs")

    def stack_head_results(self, *args: object, **options: object) -> Any:
        """As in ActivationCache, without a remainder and without a norm.

        Args:
            *args: See there.
            **options: The same by name.

        Raises:
            InputError: For ``incl_remainder`` and ``apply_ln``, and what it raises there.
        """
        order = ("layer", "return_labels", "incl_remainder", "pos_slice", "apply_ln")
        return self._plain(order, super().stack_head_results, args, options)

    def stack_neuron_results(self, *args: object, **options: object) -> Any:
        """As in ActivationCache, without a remainder and without a norm.

        Args:
            *args: See there.
            **options: The same by name.

        Raises:
            InputError: For ``incl_remainder`` and ``apply_ln``, and what it raises there.
        """
        order = ("layer", "pos_slice", "neuron_slice", "return_labels", "incl_remainder", "apply_ln")
        return self._plain(order, super().stack_neuron_results, args, options)

    def _plain(
        self,
        order: tuple[str, ...],
        method: Callable[..., ArrayT | tuple[ArrayT, list[str]]],
        args: tuple[object, ...],
        options: dict[str, object],
    ) -> ArrayT | tuple[ArrayT, list[str]]:
        """What a method gives, which is not asked for a remainder or a norm; ``order`` are its first arguments."""
        given = dict(zip(order, args, strict=False)) | options
        for what in ("incl_remainder", "apply_ln"):
            if given.get(what):
                self._refused(f"{method.__name__} with {what}")
        return method(*args, **options)


class HeadedCache(ActivationCache[ArrayT]):
    """Activations of an encoder whose norms come before its sublayers, with a masked-language head; see ActivationCache.

    The residual stream is a sum. But between it and the logits lies the head, with a matrix and an activation function: what
    takes the unembedding for all there is after the last norm is refused.
    """

    def _refused(self, name: str) -> NoReturn:
        raise InputError(
            f"{name} is not for this model: a matrix and an activation function (mlm_head) lie between its last norm and its "
            "unembedding. There is decompose_resid, and accumulated_resid."
        )

    def logit_lens(self, *args: object, **options: object) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("logit_lens")

    def logit_attrs(self, *args: object, **options: object) -> NoReturn:
        """Refused. Raises InputError."""
        self._refused("logit_attrs")


class EncoderCache(PostNormCache[ArrayT]):
    """Activations of an encoder by hook name; see PostNormCache."""

    _why = "is for decoders: an encoder "
