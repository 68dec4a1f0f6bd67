"""HookedViT: the object over the hooked file of a vision transformer, which runs on images and gives the logits of classes."""

from __future__ import annotations

import os
from typing import Any, Literal, NoReturn, cast

import numpy as np

from graphlens.analysis.arrays import Array, ArrayT
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.names import NamesFilter
from graphlens.model import describe
from graphlens.model.backward import Differentiated, Gradients, gradients
from graphlens.model.border import Border, NumpyBorder
from graphlens.model.forward import Forwarded, asked_of, unbatched
from graphlens.model.hook_calls import Hooks
from graphlens.model.methods.edits import EditMethods
from graphlens.model.methods.open import OpenMethods
from graphlens.model.methods.weights import WeightMethods
from graphlens.model.runner import Interventions

RETURN_TYPES = ("logits", "predictions", None)


class HookedViT(OpenMethods[ArrayT], EditMethods[ArrayT], WeightMethods[ArrayT]):
    """A hooked vision transformer: run it on images, read any activation, edit any activation.

    Made by ``from_onnx``, of a file that ``graphlens adopt`` wrote. Images are float arrays [b, channels, height, width],
    scaled and normalised as the model's image processor does it. A "position" is a patch: position 0 is the class token, and
    the patches follow row by row. The blocks are pre-norm and have a decoder's hook names; the classifier has ``head.hook_in``
    [b, d_model] and ``head.hook_out`` [b, classes]. TransformerLens 3.9 has no such class; vit-prisma calls it so too.

    Args:
        cfg: The engine of a hooked file.
        tokenizer: None: images need none.
        move_to_device: Holds HookedTransformer's place, as what follows.
        default_padding_side: See there.
        default_prepend_bos: See there.
        providers: See there.

    Attributes:
        runner: Runs the model with what is active.
    """

    _kind = "vision model"

    def _border(self) -> Border[ArrayT]:
        return cast(Border[ArrayT], NumpyBorder())

    @property
    def border(self) -> Border[ArrayT]:
        """How arrays cross to the user and back."""
        return self.runner.border

    def __repr__(self) -> str:
        return describe.summary(type(self).__name__, self.runner)

    @classmethod
    def from_pretrained(cls, model_name: str | os.PathLike[str], *args: object, **options: object) -> NoReturn:
        """Refused: vision models are adopted, not exported. Raises InputError.

        Args:
            model_name: Its name.
            *args: See HookedTransformer.from_pretrained.
            **options: See there.
        """
        raise InputError(
            f"graphlens exports no vision models: export {model_name!s} to ONNX (torch.onnx, optimum), then "
            "HookedViT.from_onnx(file, adopt=True)."
        )

    def to_single_token(self, string: str) -> NoReturn:
        """Refused: images have no text. Raises InputError.

        Args:
            string: See HookedTransformer.to_single_token.
        """
        raise InputError("a vision model has no tokenizer: its classes are numbers.")

    def tokens_to_residual_directions(self, tokens: object) -> ArrayT:
        """The direction of classes in what the classifier reads: columns of ``weights["head.W_H"]``.

        Args:
            tokens: A class, or several.

        Returns:
            [d_model], or [..., d_model] for several.

        Raises:
            InputError: For what is no class, and for a model whose classifier was not found.
        """
        weight = self.weights.get("head.W_H")
        if weight is None:
            raise InputError("the classifier's weights were not found in this model.")
        classes = np.asarray(tokens)
        if classes.dtype.kind not in "iu" or (
            classes.size and not 0 <= classes.min() <= classes.max() < weight.shape[1]
        ):
            raise InputError(f"classes are whole numbers from 0 to {weight.shape[1] - 1}, not {tokens!r:.80}.")
        return self.border.to_user(np.array(np.moveaxis(weight[:, classes], 0, -1)))

    # Running

    def forward(self, input: ArrayT | Array, return_type: str | None = "logits") -> ArrayT | None:
        """Runs the model with the active hooks and interventions.

        Args:
            input: Images, float [b, channels, height, width], or one [channels, height, width].
            return_type: "logits" [b, classes]; "predictions", the likeliest class of each image, int64 [b]; None, which runs
                for the hooks alone.

        Raises:
            InputError: For unusable input.
            HookResultError: For what a hook returned; and whatever a hook raised.
        """
        return self._run(False, input, return_type)[0]

    __call__ = forward

    def _run(
        self, names_filter: NamesFilter | Literal[False], input: ArrayT | Array, return_type: str | None
    ) -> tuple[ArrayT | None, Forwarded[ArrayT]]:
        """(what ``return_type`` asks for, the run with the activations that the filter picks; False picks none)."""
        if not is_one_of(return_type, RETURN_TYPES):
            raise InputError(f"return_type must be one of {RETURN_TYPES}, not {return_type!r}.")
        runner = self.runner
        request = runner.request(input)
        fetch = [] if names_filter is False else runner.select(names_filter, request)
        return_type = asked_of(runner, return_type, names_filter)
        ran = runner.run(request, fetch, output=return_type is not None)
        if ran.output is None:
            return None, Forwarded(None, ran.values, request)
        if return_type == "predictions":
            return runner.border.to_user(np.argmax(ran.output, -1)), Forwarded(None, ran.values, request)
        logits = runner.border.finish(ran.output, request, runner, ran.learned)
        return logits, Forwarded(logits, ran.values, request)

    def run_with_cache(
        self,
        input: ArrayT | Array,
        return_type: str | None = "logits",
        *,
        names_filter: NamesFilter = None,
        remove_batch_dim: bool = False,
        clear_contexts: bool = False,
        return_cache_object: bool = True,
    ) -> tuple[Any, Any]:
        """Runs the model and keeps its activations, those after any active hook.

        Args:
            input: As in ``forward``.
            return_type: See there.
            names_filter: Which activations: a hook name, a list of them, or a function name -> bool; None for all.
            remove_batch_dim: True drops the batch axis of a single image.
            clear_contexts: True empties every ``hook.ctx`` afterwards.
            return_cache_object: False gives a plain dictionary.

        Returns:
            (output, ActivationCache).

        Raises:
            UnknownHookPoint: For a name or filter that matches nothing.
            InputError: What ``forward`` raises.
        """
        from graphlens.analysis.cache.activation_cache import ActivationCache

        result, ran = self._run(names_filter, input, return_type)
        if checked_number(clear_contexts, "clear_contexts", bool):
            self.clear_contexts()
        to_user = self.border.to_user
        cache = ActivationCache({name: to_user(array) for name, array in ran.values.items()}, self)
        if checked_number(remove_batch_dim, "remove_batch_dim", bool):
            cache = unbatched(cache, ran.request.shape[0])
        return result, (cache if checked_number(return_cache_object, "return_cache_object", bool) else cache.cache_dict)

    def run_with_hooks(
        self,
        input: ArrayT | Array,
        return_type: str | None = "logits",
        *,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> ArrayT | None:
        """Runs the model with hooks that are added for this run.

        Args:
            input: As in ``forward``.
            return_type: See there.
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
                "bwd_hooks would never fire: use model.gradients(images, metric) inside model.hooks(bwd_hooks=...)."
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(input, return_type)

    def run_with_interventions(
        self,
        input: ArrayT | Array,
        interventions: Interventions,
        return_type: str | None = "logits",
        names_filter: NamesFilter = None,
        fwd_hooks: Hooks = (),
        strict: bool = True,
    ) -> Any:
        """Runs the model once with interventions; see HookedTransformer.run_with_interventions.

        Args:
            input: As in ``forward``.
            interventions: One Ablate, Patch, Steer or Scale, or several. ``positions`` are patches, 0 the class token.
            return_type: As in ``forward``.
            names_filter: As in ``run_with_cache``; None keeps no activations.
            fwd_hooks: Python hooks of the same run.
            strict: False ignores positions beyond the patches.

        Returns:
            What ``return_type`` names; with a ``names_filter`` the pair of it and an ActivationCache.

        Raises:
            UnknownHookPoint: For a hook point that is not there.
            InputError: For what the model lacks or what cannot fit, before anything runs.
        """
        with self.intervene(interventions, strict), self.hooks(fwd_hooks):
            if names_filter is None:
                return self.forward(input, return_type)
            return self.run_with_cache(input, return_type, names_filter=names_filter)

    def gradients(
        self, input: ArrayT | Array, metric: Differentiated[ArrayT], names: NamesFilter = None
    ) -> Gradients[ArrayT]:
        """d(metric)/d(activation) for hook points; see HookedTransformer.gradients.

        Args:
            input: As in ``forward``.
            metric: One of graphlens.metrics with a mean over the batch, its tokens being classes and its position the only one
                (LogitDiff(3, 5)); or an object with ``gradient(logits) -> d/d(logits)`` [b, classes].
            names: As ``names_filter`` in ``run_with_cache``; None is every hook point of floats.

        Returns:
            Each name and an array shaped like the activation.

        Raises:
            UnknownHookPoint: For a name that is none.
            InputError: For a metric without a derivative.
        """
        return gradients(self.runner, input, metric, names)
