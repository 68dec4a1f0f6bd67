"""The TransformerLens-shaped object over a hooked file. NumPy in and out; graphlens.torch has the same in tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

from graphlens.analysis.arrays import ArrayInput, ArrayT, UserArray
from graphlens.analysis.metric import Metric
from graphlens.analysis.slices import SliceInput
from graphlens.errors import InputError, checked_number
from graphlens.file.names import NamesFilter
from graphlens.model import describe
from graphlens.model.backward import Differentiable, Gradients, gradients
from graphlens.model.border import Border, NumpyBorder
from graphlens.model.forward import CacheOptions, HookOptions, InterventionOptions, positions_of, run_forward, unbatched
from graphlens.model.hook_calls import Hooks, pairs
from graphlens.model.kv_cache import KeyValueCache
from graphlens.model.methods import sae_runs
from graphlens.model.methods.edits import EditMethods
from graphlens.model.methods.generate import GenerateMethods
from graphlens.model.methods.open import OpenMethods
from graphlens.model.methods.text import TextMethods
from graphlens.model.methods.weights import WeightMethods
from graphlens.model.request import OUTPUT_ARGUMENTS, ForwardOptions, Output, check_arguments
from graphlens.model.runner import Interventions
from graphlens.model.text import Input

if TYPE_CHECKING:
    from graphlens.analysis.cache.activation_cache import ActivationCache


class HookedTransformer(
    OpenMethods[ArrayT],
    EditMethods[ArrayT],
    TextMethods[ArrayT],
    WeightMethods[ArrayT],
    GenerateMethods[ArrayT],
):
    """A hooked model: run it, read any activation, edit any activation.

    Opened by ``from_pretrained``, ``from_pretrained_no_processing`` or ``from_onnx``, or built from a config, with random
    weights: ``HookedTransformer(cfg)``. Its graph is exported the first time there is such a config, which needs the export
    extra, and comes from the cache afterwards. Tokens are integer arrays [b, p]
    or [p], nested lists, or strings; ``prepend_bos`` and ``padding_side`` apply to strings. A pickled model is opened again
    from its file, a deep copy shares the file and its sessions; both have its flags, defaults and the weights that were
    set, and no hooks and interventions.

    Args:
        cfg: A HookedTransformerConfig, or a dictionary of its arguments; or the engine of a hooked file.
        tokenizer: A transformers tokenizer; None for that of ``cfg.tokenizer_name`` or of the file's folder, if there is one.
        move_to_device: TransformerLens's; changes nothing.
        default_padding_side: "right" or "left"; None is the tokenizer's own.
        default_prepend_bos: Whether text gets a BOS token where a call does not say; None for what the config says.
        providers: ONNX Runtime's provider names, in place of ``cfg.device``; see from_onnx.

    Attributes:
        runner: Runs the model with what is active; experiments are built on it.
    """

    def _border(self) -> Border[ArrayT]:
        return cast(Border[ArrayT], NumpyBorder())

    @property
    def border(self) -> Border[ArrayT]:
        """How arrays cross to the user and back."""
        return self.runner.border

    def __repr__(self) -> str:
        return describe.summary(type(self).__name__, self.runner)

    @overload
    def forward(
        self,
        input: Input[ArrayT],
        return_type: Literal["logits", "loss"] = "logits",
        loss_per_token: bool = False,
        **options: Unpack[ForwardOptions[ArrayT]],
    ) -> ArrayT: ...

    @overload
    def forward(
        self,
        input: Input[ArrayT],
        return_type: Literal["both"],
        loss_per_token: bool = False,
        **options: Unpack[ForwardOptions[ArrayT]],
    ) -> Output[ArrayT]: ...

    @overload
    def forward(
        self,
        input: Input[ArrayT],
        return_type: None,
        loss_per_token: bool = False,
        **options: Unpack[ForwardOptions[ArrayT]],
    ) -> None: ...

    @overload
    def forward(
        self,
        input: Input[ArrayT],
        return_type: str | None,
        loss_per_token: bool = False,
        *forward_args: Any,
        **options: Any,
    ) -> Any: ...

    def forward(
        self,
        input: Input[ArrayT],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Input[ArrayT] | None = None,
        shortformer_pos_embed: ArrayInput | UserArray | None = None,
        attention_mask: Any = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> ArrayT | Output[ArrayT] | None:
        """Runs the model with the active hooks and interventions. TransformerLens: the same name.

        Args:
            input: Text (beyond n_ctx it is cut, with a UserWarning) or token ids (that long they are an error), or with
                ``start_at_layer`` the residual stream [b, p, d_model] before that block.
            return_type: "logits" [b, p, V]; "loss", the mean next-token cross-entropy in nats; "both", a pair with
                names (``.logits``, ``.loss``); None, which runs for the hooks alone.
            loss_per_token: Whether the loss is [b, p-1].
            prepend_bos: Whether text gets a BOS token; None for the model's default.
            padding_side: "right" or "left", for text; for ids with a KV cache, where PADs are padding.
            start_at_layer: The first block that runs; negative ones count from the end.
            tokens: With ``start_at_layer``, the tokens, for the loss.
            shortformer_pos_embed: ``model.pos_embed(tokens)`` with ``start_at_layer``, in a model that adds it to queries
                and keys; it does so without being told.
            attention_mask: int [b, p], 1 at real tokens, 0 at padding; positions count real tokens only.
            stop_at_layer: Returns the residual stream before that block. Blocks left out are not run.
            past_kv_cache: Read and extended. Padding on either side is then masked: exactly that of text, and of ids
                the PADs that end (``padding_side`` "left": begin) a row, unless there is an ``attention_mask``.

        Raises:
            InputError: For unusable input.
            HookResultError: For what a hook returned; and whatever a hook raised.
        """
        return run_forward(
            self.runner, False, False, input, return_type, loss_per_token, prepend_bos, padding_side, start_at_layer, tokens,
            shortformer_pos_embed, attention_mask, stop_at_layer, past_kv_cache,
        ).result  # fmt: skip

    __call__ = forward

    @overload
    def run_with_cache(
        self,
        input: Input[ArrayT],
        return_type: Literal["logits", "loss"] = "logits",
        *,
        return_cache_object: Literal[True] = True,
        **options: Unpack[CacheOptions[ArrayT]],
    ) -> tuple[ArrayT, ActivationCache[ArrayT]]: ...

    @overload
    def run_with_cache(
        self,
        input: Input[ArrayT],
        return_type: Literal["logits", "loss"] = "logits",
        *,
        return_cache_object: Literal[False],
        **options: Unpack[CacheOptions[ArrayT]],
    ) -> tuple[ArrayT, dict[str, ArrayT]]: ...

    @overload
    def run_with_cache(
        self,
        input: Input[ArrayT],
        return_type: None,
        *,
        return_cache_object: Literal[True] = True,
        **options: Unpack[CacheOptions[ArrayT]],
    ) -> tuple[None, ActivationCache[ArrayT]]: ...

    @overload
    def run_with_cache(
        self, input: Input[ArrayT], return_type: str | None, *forward_args: Any, **options: Any
    ) -> tuple[Any, Any]: ...

    def run_with_cache(
        self,
        input: Input[ArrayT],
        *forward_args: Any,
        names_filter: NamesFilter = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: SliceInput = None,
        return_cache_object: bool = True,
        **forward_options: Any,
    ) -> tuple[Any, Any]:
        """Runs the model and keeps its activations, those after any active hook. TransformerLens: the same name.

        Args:
            input: As in ``forward``.
            *forward_args: The arguments of ``forward`` after ``input``.
            names_filter: Which activations: a hook name, a list of names, or a function name -> bool, which sees our
                names alone; None for all.
            device: TransformerLens's; activations stay where the model runs.
            remove_batch_dim: Whether the batch axis is dropped; of several prompts the first is kept, with a UserWarning.
            incl_bwd: With ``return_type="loss"``: also runs backward from the loss, and keeps each gradient as
                ``<name>_grad``, after any backward hook.
            reset_hooks_end: TransformerLens's; changes nothing.
            clear_contexts: Whether every ``hook.ctx`` is emptied.
            pos_slice: Keeps those positions of each activation (an int, slice, array or Slice), queries of scores and
                patterns; an int keeps an axis of 1, and Slice(int) drops it.
            return_cache_object: False gives the dictionary.
            **forward_options: The arguments of ``forward`` by name.

        Returns:
            (output, ActivationCache).

        Raises:
            UnknownHookPoint: For a name or filter that matches nothing.
            InputError: For ``incl_bwd`` without a scalar, for another ``device``, and what ``forward`` raises.
        """
        if device is not None and str(device).partition(":")[0] != self.cfg.device:
            raise InputError(f"this model runs on {self.cfg.device}; its activations cannot be put on {device}.")
        clear_contexts, remove_batch_dim, return_cache_object = (
            checked_number(clear_contexts, "clear_contexts", bool),
            checked_number(remove_batch_dim, "remove_batch_dim", bool),
            checked_number(return_cache_object, "return_cache_object", bool),
        )
        ran = run_forward(self.runner, names_filter, incl_bwd, input, *forward_args, **forward_options)
        values = ran.values if pos_slice is None else positions_of(self.runner, ran, pos_slice)
        if clear_contexts:
            self.clear_contexts()
        to_user = self.border.to_user
        # Here, and not where the model's class is imported: many jobs cache nothing.
        from graphlens.analysis.cache.activation_cache import ActivationCache
        from graphlens.analysis.cache.post_norm_cache import PostNormCache

        kind = PostNormCache if self.runner.config.normalises_residual else ActivationCache
        cache: ActivationCache[ArrayT] = kind({name: to_user(array) for name, array in values.items()}, self)
        cache.mask, cache.straight_through = ran.request.real, ran.straight_through
        if remove_batch_dim:
            cache = unbatched(cache, ran.request.shape[0])
        return ran.result, (cache if return_cache_object else cache.cache_dict)

    @overload
    def run_with_hooks(
        self,
        input: Input[ArrayT],
        return_type: Literal["logits", "loss"] = "logits",
        **options: Unpack[HookOptions[ArrayT]],
    ) -> ArrayT: ...

    @overload
    def run_with_hooks(
        self, input: Input[ArrayT], return_type: str | None, *forward_args: Any, **options: Any
    ) -> Any: ...

    def run_with_hooks(
        self,
        input: Input[ArrayT],
        *forward_args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **forward_options: Any,
    ) -> Any:
        """Runs the model with hooks that are added for this run. TransformerLens: the same name.

        Args:
            input: As in ``forward``.
            *forward_args: The arguments of ``forward`` after ``input``.
            fwd_hooks: (hook name or function name -> bool, function) pairs. A function is called as
                ``function(activation, hook=HookPoint)``; what it returns replaces the activation, None keeps it, edits
                in place count.
            bwd_hooks: The same for gradients; see ``hooks``. They need ``return_type="loss"`` here, since arrays have
                no ``backward()``; tensors have.
            reset_hooks_end: False lets them stay, as if added.
            clear_contexts: Whether each ``hook.ctx`` is emptied after the run.
            **forward_options: The arguments of ``forward`` by name.

        Returns:
            What ``return_type`` names.

        Raises:
            UnknownHookPoint: For a name that is none.
            HookResultError: For what a hook returned; and whatever a hook raises.
        """
        check_arguments(forward_args[2:], forward_options, OUTPUT_ARGUMENTS[len(forward_args) :])
        bwd_hooks = pairs(bwd_hooks)
        given = dict(zip(OUTPUT_ARGUMENTS, forward_args, strict=False)) | forward_options
        scalar = given.get("return_type") == "loss" and not given.get("loss_per_token")
        if bwd_hooks and not self.border.backward_later and (not scalar or given.get("stop_at_layer") is not None):
            raise InputError(
                "bwd_hooks would never fire: pass return_type='loss' (one number, of a whole run), whose gradients then come "
                "by, or use model.gradients(tokens, metric) inside model.hooks(bwd_hooks=...)."
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(input, *forward_args, **forward_options)

    run_with_saes = sae_runs.run_with_saes
    run_with_cache_with_saes = sae_runs.run_with_cache_with_saes
    run_with_hooks_with_saes = sae_runs.run_with_hooks_with_saes

    @overload
    def run_with_interventions(
        self,
        input: Input[ArrayT],
        interventions: Interventions,
        return_type: Literal["logits", "loss"] = "logits",
        names_filter: None = None,
        **options: Unpack[InterventionOptions[ArrayT]],
    ) -> ArrayT: ...

    @overload
    def run_with_interventions(
        self,
        input: Input[ArrayT],
        interventions: Interventions,
        return_type: Literal["logits", "loss"] = "logits",
        *,
        names_filter: str | Sequence[str] | Callable[[str], bool],
        **options: Unpack[InterventionOptions[ArrayT]],
    ) -> tuple[ArrayT, ActivationCache[ArrayT]]: ...

    @overload
    def run_with_interventions(
        self, input: Input[ArrayT], interventions: Interventions, return_type: str | None, *args: Any, **options: Any
    ) -> Any: ...

    def run_with_interventions(
        self,
        input: Input[ArrayT],
        interventions: Interventions,
        return_type: str | None = "logits",
        names_filter: NamesFilter = None,
        fwd_hooks: Hooks = (),
        strict: bool = True,
        **forward_options: Any,
    ) -> Any:
        """Runs the model once with interventions (see ``intervene``).

        The interventions are inputs of the graph. A session is opened for each *kind* of change at a set of hook points;
        other values, positions, heads and coefficients reuse it (see ``model.sessions``).

        Args:
            input: As in ``forward``.
            interventions: One Ablate, Patch, Steer or Scale, or several.
            return_type: As in ``forward``.
            names_filter: As in ``run_with_cache``; None keeps no activations.
            fwd_hooks: Python hooks of the same run.
            strict: False ignores positions beyond the sequence.
            **forward_options: The arguments of ``forward`` by name.

        Returns:
            What ``return_type`` names; with a ``names_filter`` the pair of it and an ActivationCache.

        Raises:
            UnknownHookPoint: For a hook point that is not there.
            InputError: For what the model lacks or what cannot fit, before anything runs.
        """
        check_arguments((), forward_options, OUTPUT_ARGUMENTS[1:])
        with self.intervene(interventions, strict), self.hooks(fwd_hooks):
            if names_filter is None:
                return self.forward(input, return_type=return_type, **forward_options)
            return self.run_with_cache(input, return_type=return_type, names_filter=names_filter, **forward_options)

    def gradients(
        self,
        input: Input[ArrayT],
        metric: Metric | Differentiable[ArrayT],
        names: NamesFilter = None,
        **forward_options: Any,
    ) -> Gradients[ArrayT]:
        """d(metric)/d(activation) for hook points, with the active interventions and backward hooks.

        Gradients are total, through everything that depends on the activation. A forward hook in Python has no
        derivative: gradients pass it as if it had added a constant, with a UserWarning if it changed anything. A metric
        whose derivative depends on the logits takes a forward first, in which forward hooks are called too.

        Args:
            input: Whole prompts, as in ``forward``; a list of texts is padded on the left.
            metric: One of graphlens.metrics with a mean over the batch, or an object with ``gradient(logits) ->
                d/d(logits)`` [b, p, V], for a metric of one's own.
            names: As ``names_filter`` in ``run_with_cache``; None is every hook point of floats.
            **forward_options: The arguments of ``forward`` by name.

        Returns:
            Each name and an array shaped like the activation; ``straight_through`` says whether rounding was passed by.

        Raises:
            UnknownHookPoint: For a name that is none.
            InputError: For a metric without a derivative, and for hook points of integers.
        """
        return gradients(self.runner, input, metric, names, **forward_options)
