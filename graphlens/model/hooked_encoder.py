"""HookedEncoder: the TransformerLens-shaped object over the hooked file of an encoder (BERT), with a masked-language head."""

from __future__ import annotations

import os
from typing import Any, Literal, Self, Unpack, cast, overload

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.analysis.cache.post_norm_cache import EncoderCache, HeadedCache
from graphlens.analysis.slices import SliceInput
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.names import NamesFilter, in_block
from graphlens.file.processing import STEPS
from graphlens.model import describe
from graphlens.model.backward import Differentiated, Gradients, gradients
from graphlens.model.border import Border, NumpyBorder
from graphlens.model.encoder_request import EncoderOptions, Numbers
from graphlens.model.forward import Forwarded, asked_of, positions_of, unbatched
from graphlens.model.hook_calls import Hooks
from graphlens.model.methods.edits import EditMethods
from graphlens.model.methods.encoder_text import EncoderTextMethods
from graphlens.model.methods.encoder_weights import EncoderWeightMethods
from graphlens.model.methods.open import OpenMethods
from graphlens.model.request import Request
from graphlens.model.runner import Interventions
from graphlens.model.text import Input

RETURN_TYPES = ("logits", "predictions", None)


class HookedEncoder(
    OpenMethods[ArrayT],
    EditMethods[ArrayT],
    EncoderTextMethods[ArrayT],
    EncoderWeightMethods[ArrayT],
):
    """A hooked encoder, TransformerLens's HookedEncoder: run it, read any activation, edit any activation.

    Made by ``from_pretrained`` or ``from_onnx``. Tokens are integer arrays [b, p] or [p], nested lists, or strings, which the
    tokenizer puts between its special tokens. Its tokens attend to each other both ways: it does not generate, and has no KV
    cache and no run of some layers only.

    An adopted encoder whose norms come before its sublayers (ModernBERT, MegatronBERT: ``cfg.pre_norm_encoder``) has a decoder's
    hook points and weights by their names: ``hook_embed``, ``ln_final``.

    Args:
        cfg: The engine of a hooked file. Encoders are not built from a config.
        tokenizer: None for that of the file's folder.
        move_to_device: Holds HookedTransformer's place, as what follows the next one.
        default_padding_side: "right" or "left"; None is the tokenizer's own.
        default_prepend_bos: See above.
        providers: See above.

    Attributes:
        runner: Runs the model with what is active; experiments are built on it.
    """

    _kind = "encoder"

    def _border(self) -> Border[ArrayT]:
        return cast(Border[ArrayT], NumpyBorder())

    @property
    def border(self) -> Border[ArrayT]:
        """How arrays cross to the user and back."""
        return self.runner.border

    def __repr__(self) -> str:
        return describe.summary(type(self).__name__, self.runner)

    @classmethod
    def from_pretrained(cls, model_name: str | os.PathLike[str], **options: Any) -> Self:  # type: ignore[override]
        """Opens a model by name or folder. TransformerLens: the same name. The weights of encoders are never processed.

        Args:
            model_name: A hub name, a TransformerLens alias, a checkpoint folder or a hooked folder.
            **options: The arguments of ``HookedTransformer.from_pretrained``, those for weight processing at False.

        Raises:
            ExportError: For a name or checkpoint that cannot be had or exported.
            ModelFileError: For a hooked folder that is damaged.
            InputError: For weight processing, a decoder, and what ONNX Runtime cannot honour.
        """
        for step in STEPS:
            if checked_number(options.get(step, False), step, bool):
                raise InputError(f"{step}: the weights of encoders are not processed, as in TransformerLens.")
        return super().from_pretrained(model_name, **{**options, **dict.fromkeys(STEPS, False)})

    # Running

    @overload
    def forward(
        self,
        input: Input[ArrayT],
        return_type: Literal["logits"] = "logits",
        token_type_ids: Numbers = None,
        one_zero_attention_mask: Numbers = None,
        *,
        attention_mask: Numbers = None,
    ) -> ArrayT: ...

    @overload
    def forward(
        self,
        input: Input[ArrayT],
        return_type: Literal["predictions"],
        token_type_ids: Numbers = None,
        one_zero_attention_mask: Numbers = None,
        *,
        attention_mask: Numbers = None,
    ) -> str | list[str]: ...

    @overload
    def forward(
        self,
        input: Input[ArrayT],
        return_type: None,
        token_type_ids: Numbers = None,
        one_zero_attention_mask: Numbers = None,
        *,
        attention_mask: Numbers = None,
    ) -> None: ...

    @overload
    def forward(
        self,
        input: Input[ArrayT],
        return_type: str | None,
        token_type_ids: Numbers = None,
        one_zero_attention_mask: Numbers = None,
        *,
        attention_mask: Numbers = None,
    ) -> ArrayT | str | list[str] | None: ...

    def forward(
        self,
        input: Input[ArrayT],
        return_type: str | None = "logits",
        token_type_ids: Numbers = None,
        one_zero_attention_mask: Numbers = None,
        *,
        attention_mask: Numbers = None,
    ) -> ArrayT | str | list[str] | None:
        """Runs the model with the active hooks and interventions. TransformerLens: the same name.

        Args:
            input: Text (beyond n_ctx it is cut, with a UserWarning) or token ids (that long they are an error).
            return_type: "logits" [b, p, V]; "predictions", the likeliest token in the place of each masked one, as text, of
                several a list; None, which runs for the hooks alone.
            token_type_ids: int [b, p], the segment of each token; None for zeros.
            one_zero_attention_mask: int [b, p], 1 at tokens that all attend to and 0 at padding. None masks the padding of
                text, and takes all ids for real.
            attention_mask: Another name of that.

        Raises:
            InputError: For unusable input.
            HookResultError: For what a hook returned; and whatever a hook raised.
        """
        return self._run(False, input, return_type, token_type_ids, one_zero_attention_mask, attention_mask)[0]

    __call__ = forward

    def encoder_output(
        self, tokens: Input[ArrayT], token_type_ids: Numbers = None, one_zero_attention_mask: Numbers = None
    ) -> ArrayT:
        """The residual stream [b, p, d_model] after the last block. TransformerLens: the same name.

        Args:
            tokens: As in ``forward``.
            token_type_ids: See there.
            one_zero_attention_mask: See there.

        Raises:
            InputError: What ``forward`` raises.
        """
        end = "hook_resid_post" if self.cfg.pre_norm_encoder else "hook_normalized_resid_post"
        name = in_block(self.cfg.n_layers - 1, end)
        return self.border.to_user(
            self._run(name, tokens, None, token_type_ids, one_zero_attention_mask)[1].values[name]
        )

    def _run(
        self,
        names_filter: NamesFilter | Literal[False],
        input: Input[ArrayT],
        return_type: str | None,
        token_type_ids: Numbers,
        one_zero_attention_mask: Numbers,
        attention_mask: Numbers = None,
    ) -> tuple[ArrayT | str | list[str] | None, Forwarded[ArrayT]]:
        """(what ``return_type`` asks for, the run with the activations that the filter picks; False picks none)."""
        if not is_one_of(return_type, RETURN_TYPES):
            raise InputError(f"return_type must be one of {RETURN_TYPES}, not {return_type!r}.")
        runner = self.runner
        request = runner.request(input, token_type_ids, one_zero_attention_mask, attention_mask=attention_mask)
        masked = self._masked(request) if return_type == "predictions" else None
        fetch = [] if names_filter is False else runner.select(names_filter, request)
        return_type = asked_of(runner, return_type, names_filter)
        ran = runner.run(request, fetch, output=return_type is not None)
        if ran.output is None:
            return None, Forwarded(None, ran.values, request)
        if masked is not None:
            return self._predictions(ran.output[masked]), Forwarded(None, ran.values, request)
        logits = runner.border.finish(ran.output, request, runner, ran.learned)
        return logits, Forwarded(logits, ran.values, request)

    def _cache_kind(self) -> type[ActivationCache[ArrayT]]:
        """Which cache fits: what can be computed from a residual stream depends on where the norms are."""
        if not self.cfg.pre_norm_encoder:
            return EncoderCache
        return HeadedCache if self.runner.hooks.find("mlm_head.ln.hook_normalized") else ActivationCache

    def _masked(self, request: Request) -> Array:
        """Which tokens are masked, bool [b, p]. Raises InputError for none."""
        mask = self.runner.text.need_tokenizer().mask_token_id
        if mask is None:
            raise InputError("return_type='predictions' needs a tokenizer with a mask token, and this one names none.")
        masked: Array = request.need_tokens() == mask
        if not masked.any():
            raise InputError(
                "return_type='predictions' is of masked tokens, and there is none: put "
                f"{self.runner.text.of_each([mask])[0]!r} in the text."
            )
        return masked

    def _predictions(self, logits: Array) -> str | list[str]:
        """The likeliest tokens of logits [n, V], as text as TransformerLens gives it."""
        found = self.runner.text.need_tokenizer().decode(np.argmax(logits, -1))
        return found if " " not in found else [f"Prediction {i}: {each}" for i, each in enumerate(found.split(" "))]

    def run_with_cache(
        self,
        input: Input[ArrayT],
        return_type: str | None = "logits",
        token_type_ids: Numbers = None,
        one_zero_attention_mask: Numbers = None,
        *,
        attention_mask: Numbers = None,
        names_filter: NamesFilter = None,
        device: object = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: SliceInput = None,
        return_cache_object: bool = True,
    ) -> tuple[Any, Any]:
        """Runs the model and keeps its activations, those after any active hook. TransformerLens: the same name.

        Args:
            input: As in ``forward``.
            return_type: See there, as for the next three.
            token_type_ids: See there.
            one_zero_attention_mask: See there.
            attention_mask: See there.
            names_filter: See HookedTransformer.run_with_cache, as for those that follow.
            device: See there.
            remove_batch_dim: See there.
            incl_bwd: False: an encoder has no loss. ``gradients`` takes a metric.
            reset_hooks_end: See there.
            clear_contexts: See there.
            pos_slice: See there.
            return_cache_object: See there.

        Returns:
            (output, EncoderCache); an ActivationCache of a model whose norms come before its sublayers.

        Raises:
            UnknownHookPoint: For a name or filter that matches nothing.
            InputError: For ``incl_bwd``, for another ``device``, and what ``forward`` raises.
        """
        if device is not None and str(device).partition(":")[0] != self.cfg.device:
            raise InputError(f"this model runs on {self.cfg.device}; its activations cannot be put on {device}.")
        if checked_number(incl_bwd, "incl_bwd", bool):
            raise InputError(
                "incl_bwd runs backward from a loss, and an encoder has none: take model.gradients(tokens, metric)."
            )
        given = (token_type_ids, one_zero_attention_mask, attention_mask)
        result, ran = self._run(names_filter, input, return_type, *given)
        values = ran.values if pos_slice is None else positions_of(self.runner, ran, pos_slice)
        if checked_number(clear_contexts, "clear_contexts", bool):
            self.clear_contexts()
        to_user = self.border.to_user
        cache = self._cache_kind()({name: to_user(array) for name, array in values.items()}, self)
        cache.mask = ran.request.real
        if checked_number(remove_batch_dim, "remove_batch_dim", bool):
            cache = unbatched(cache, ran.request.shape[0])
        return result, (cache if checked_number(return_cache_object, "return_cache_object", bool) else cache.cache_dict)

    def run_with_hooks(
        self,
        input: Input[ArrayT],
        return_type: str | None = "logits",
        token_type_ids: Numbers = None,
        one_zero_attention_mask: Numbers = None,
        *,
        attention_mask: Numbers = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Any:
        """Runs the model with hooks that are added for this run. TransformerLens: the same name.

        Args:
            input: As in ``forward``.
            return_type: See there, as for the next three.
            token_type_ids: See there.
            one_zero_attention_mask: See there.
            attention_mask: See there.
            fwd_hooks: See HookedTransformer.run_with_hooks, as for those that follow.
            bwd_hooks: See there. An array has no ``backward()``: use ``gradients`` then.
            reset_hooks_end: See there.
            clear_contexts: See there.

        Raises:
            UnknownHookPoint: For a name that is none.
            HookResultError: For what a hook returned; and whatever a hook raises.
        """
        if bwd_hooks and not self.border.backward_later:
            raise InputError(
                "bwd_hooks would never fire: use model.gradients(tokens, metric) inside model.hooks(bwd_hooks=...)."
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(
                input, return_type, token_type_ids, one_zero_attention_mask, attention_mask=attention_mask
            )

    def run_with_interventions(
        self,
        input: Input[ArrayT],
        interventions: Interventions,
        return_type: str | None = "logits",
        names_filter: NamesFilter = None,
        fwd_hooks: Hooks = (),
        strict: bool = True,
        **forward_options: Unpack[EncoderOptions],
    ) -> Any:
        """Runs the model once with interventions; see HookedTransformer.run_with_interventions.

        Args:
            input: As in ``forward``.
            interventions: One Ablate, Patch, Steer or Scale, or several.
            return_type: As in ``forward``.
            names_filter: As in ``run_with_cache``; None keeps no activations.
            fwd_hooks: Python hooks of the same run.
            strict: False ignores positions beyond the sequence.
            **forward_options: The arguments of ``forward`` by name.

        Returns:
            What ``return_type`` names; with a ``names_filter`` the pair of it and an EncoderCache.

        Raises:
            UnknownHookPoint: For a hook point that is not there.
            InputError: For what the model lacks or what cannot fit, before anything runs.
        """
        with self.intervene(interventions, strict), self.hooks(fwd_hooks):
            if names_filter is None:
                return self.forward(input, return_type, **forward_options)
            return self.run_with_cache(input, return_type, names_filter=names_filter, **forward_options)

    def gradients(
        self,
        input: Input[ArrayT],
        metric: Differentiated[ArrayT],
        names: NamesFilter = None,
        **forward_options: Unpack[EncoderOptions],
    ) -> Gradients[ArrayT]:
        """d(metric)/d(activation) for hook points; see HookedTransformer.gradients.

        Args:
            input: As in ``forward``.
            metric: One of graphlens.metrics with a mean over the batch, at the position of a masked token, say; or an object
                with ``gradient(logits) -> d/d(logits)`` [b, p, V].
            names: As ``names_filter`` in ``run_with_cache``; None is every hook point of floats.
            **forward_options: The arguments of ``forward`` by name.

        Returns:
            Each name and an array shaped like the activation.

        Raises:
            UnknownHookPoint: For a name that is none.
            InputError: For a metric without a derivative.
        """
        return gradients(self.runner, input, metric, names, **forward_options)
