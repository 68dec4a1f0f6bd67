"""The methods of HookedTransformer that put SAEs into the model and take them away; the names are SAELens's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Literal, Self, Unpack, cast, overload

from graphlens.analysis.arrays import ArrayT
from graphlens.edits.spliced_sae import SplicedSae
from graphlens.engine.plan import Plan
from graphlens.engine.sae_places import ensure_fit
from graphlens.errors import InputError, checked_number, warn
from graphlens.model.per_thread import Block

if TYPE_CHECKING:
    from graphlens.analysis.cache.activation_cache import ActivationCache
    from graphlens.edits.sae import Sae
    from graphlens.model.forward import CacheOptions, HookOptions
    from graphlens.model.hooked_transformer import HookedTransformer
    from graphlens.model.request import ForwardOptions, Output
    from graphlens.model.runner import Runner
    from graphlens.model.text import Input

# Tokens that stand for no text, by the names that tokenizers have for them; those of a chat are none of them, as in SAELens.
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")


class SaeMethods(Generic[ArrayT]):
    """The part of HookedTransformer that runs with SAEs.

    While an SAE is attached, the model has its hook points: ``<hook>.hook_sae_input``, ``.hook_sae_acts_pre``,
    ``.hook_sae_acts_post`` [b, p, d_sae], ``.hook_sae_recons``, ``.hook_sae_error`` (with an error term) and
    ``.hook_sae_output``. They are read, edited, differentiated and hooked as all others are.
    """

    runner: Runner[ArrayT]

    def add_sae(
        self,
        sae: Sae,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        features: Sequence[int] | None = None,
    ) -> None:
        """Attaches an SAE or a transcoder, for every thread, until ``reset_saes``. SAELens: the same name.

        It takes the place of one that reads the same hook point.

        Args:
            sae: The SAE.
            use_error_term: True adds what it does not reconstruct to its output, so that the model computes what it did until a
                feature is edited. None is False.
            exclude_special_tokens: True leaves it out at BOS, EOS, PAD and SEP; a list of token ids, at those.
            features: Attaches these features alone, in this order (``sae.only(features)``): a wide SAE's others are then neither
                in memory nor computed. With an error term the model still computes what it did.

        Raises:
            UnknownHookPoint: The model lacks a hook point of the SAE's.
            InputError: The SAE's width is not the activations', another SAE stands for the same hook point, or there is no
                tokenizer that knows special tokens.
        """
        sae = sae if features is None else sae.only(features)
        found = self._checked([sae], use_error_term, exclude_special_tokens)
        self.runner.flags.saes.add(found)

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Takes SAEs away. SAELens: the same name.

        Args:
            act_names: The hook points that they read; None for all.
        """
        attached = self.runner.flags.saes
        names = (
            list(attached.by_hook) if act_names is None else [act_names] if isinstance(act_names, str) else act_names
        )
        for name in names:
            if name not in attached.by_hook:
                warn(f"no SAE is attached to {name!r}, so there is nothing to reset.")
        attached.remove(names)

    @property
    def acts_to_saes(self) -> dict[str, Sae]:
        """The SAEs that are attached, by the hook point that each reads. SAELens: the same name."""
        return {hook: one.sae for hook, one in self.runner.flags.saes.by_hook.items()}

    def saes(
        self,
        saes: Sae | Sequence[Sae] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Block[Self]:
        """Attaches SAEs to every call inside the ``with`` block, in the thread that entered it. SAELens: the same name.

        Args:
            saes: One, or several. Those that were attached to the same hook points are back after the block.
            reset_saes_end: False lets them stay, as if added.
            use_error_term: See ``add_sae``, as for the next.
            exclude_special_tokens: See there.

        Raises:
            UnknownHookPoint: See there.
            InputError: See there.
        """
        found = self._checked(saes if isinstance(saes, Sequence) else [saes], use_error_term, exclude_special_tokens)
        stay = not checked_number(reset_saes_end, "reset_saes_end", bool)
        if stay:
            self.runner.flags.saes.add(found)
        return self.runner.flags.saes.during(() if stay else found).giving(self)

    @overload
    def run_with_saes(
        self,
        input: Input[ArrayT],
        return_type: Literal["logits", "loss"] = "logits",
        loss_per_token: bool = False,
        *,
        saes: Sae | Sequence[Sae] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **options: Unpack[ForwardOptions[ArrayT]],
    ) -> ArrayT: ...

    @overload
    def run_with_saes(
        self,
        input: Input[ArrayT],
        return_type: str | None,
        loss_per_token: bool = False,
        *,
        saes: Sae | Sequence[Sae] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **options: Unpack[ForwardOptions[ArrayT]],
    ) -> ArrayT | Output[ArrayT] | None: ...

    def run_with_saes(
        self,
        input: Input[ArrayT],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        *,
        saes: Sae | Sequence[Sae] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **options: Unpack[ForwardOptions[ArrayT]],
    ) -> ArrayT | Output[ArrayT] | None:
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
            found: ArrayT | Output[ArrayT] | None = self._model.forward(input, return_type, loss_per_token, **options)
            return found

    def run_with_cache_with_saes(
        self,
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
            found: tuple[ArrayT, ActivationCache[ArrayT]] = self._model.run_with_cache(
                input, return_type, return_cache_object=return_cache_object, **options
            )
            return found

    def run_with_hooks_with_saes(
        self,
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
            found: ArrayT = self._model.run_with_hooks(input, return_type, **options)
            return found

    @property
    def _model(self) -> HookedTransformer[ArrayT]:
        return cast("HookedTransformer[ArrayT]", self)

    def _checked(
        self, saes: Sequence[Sae], use_error_term: bool | None, exclude: bool | Sequence[int]
    ) -> list[SplicedSae]:
        """SAEs as records, once they are known to fit the model and those that are attached."""
        excluded = self._excluded(exclude)
        found = [SplicedSae.of(sae, use_error_term or False, excluded) for sae in saes]
        flags = self.runner.flags
        ensure_fit(self.runner.engine, Plan(flags.names), flags.saes.with_others(found))
        for one in found:
            name = one.sae.cfg.model_name
            its = {self.runner.config.model_name, self.runner.engine.manifest.source}
            if name is not None and _plain(name) not in map(_plain, its):
                warn(
                    f"the SAE at {one.hook!r} was trained on {name}, and this model is {self.runner.config.model_name}."
                )
        return found

    def _excluded(self, exclude: bool | Sequence[int]) -> Sequence[int]:
        """The ids of the tokens that SAEs are left out at."""
        if not isinstance(exclude, bool):
            found = [exclude] if isinstance(exclude, int) else list(exclude)
        elif not exclude:
            return ()
        else:
            tokenizer = self.runner.text.tokenizer
            if tokenizer is None:
                raise InputError(
                    "exclude_special_tokens=True: this model has no tokenizer that knows special tokens. Pass their ids."
                )
            ids: Mapping[str, int | None] = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
            found = [index for index in ids.values() if index is not None]
        if found and self.runner.config.is_vision:
            raise InputError("exclude_special_tokens: a vision model reads no tokens. Leave it out.")
        return found


def _plain(name: str) -> str:
    """A model's name whoever published it: "google/gemma-2-2b" and "gemma-2-2b" are one, "gpt2-small" and "gpt2" too."""
    return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower()).removesuffix("small")
