"""TransformerBridge: the torch face under TransformerLens 4's names and with its way of calling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Self, cast

import torch

from graphlens.analysis.cache.activation_cache import ActivationCache
from graphlens.analysis.metric import Metric
from graphlens.analysis.slices import SliceInput
from graphlens.errors import InputError, checked_number
from graphlens.file.names import NamesFilter
from graphlens.lens.bridge_arguments import check_boot, one_cache, without_batch
from graphlens.lens.bridge_border import BridgeBorder
from graphlens.lens.bridge_hooks import BridgeCache, BridgeHooks, is_scores
from graphlens.lens.bridge_weights import LensWeights, processed
from graphlens.model import torch_face
from graphlens.model.backward import Differentiable, Gradients
from graphlens.model.config import HookPointInfo
from graphlens.model.hook_calls import Hooks, pairs
from graphlens.model.hooks import HookPoint
from graphlens.model.kv_cache import KeyValueCache
from graphlens.model.request import Output
from graphlens.model.text import Input


class TransformerBridge(torch_face.HookedTransformer, LensWeights):
    """graphlens.torch.HookedTransformer under TransformerLens 4's names: its TransformerBridge.

    ``boot_transformers`` opens a model with the checkpoint's weights as they are; ``enable_compatibility_mode`` processes
    them. ``hook.name``, ``hook_dict`` and caches have TransformerLens 4's names (``blocks.0.attn.q.hook_out``); those of 3.9
    (``blocks.0.attn.hook_q``) are accepted everywhere, and both are keys of ``hook_dict`` and of a cache of all activations.

    All else is HookedTransformer's. A change at ``ln2.hook_in`` (``hook_resid_mid``) is one of the residual stream; in
    TransformerLens 4 a tensor that a hook returns there changes what the norm reads alone. See docs/transformerlens4.md.
    """

    _booted: tuple[str, str | None] | None = None  # the name and revision, where there was no hf_model

    def _border(self) -> BridgeBorder:
        return BridgeBorder()

    @property
    def _names(self) -> BridgeHooks:
        return cast(BridgeHooks, self.runner.hooks)

    # Opening

    @classmethod
    def boot_transformers(
        cls,
        model_name: str,
        hf_config_overrides: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = torch.float32,
        tokenizer: object = None,
        load_weights: bool = True,
        trust_remote_code: bool = False,
        model_class: object = None,
        hf_model: torch.nn.Module | None = None,
        n_ctx: int | None = None,
        revision: str | None = None,
        **unsupported: object,
    ) -> Self:
        """Opens a model with the checkpoint's weights exactly as they are. TransformerLens 4: the same name.

        Args:
            model_name: A hub name, a TransformerLens alias, a checkpoint folder or a hooked folder.
            hf_config_overrides: TransformerLens's; None.
            device: "cpu" or "cuda"; None for CUDA where it works.
            dtype: "float32", "float64", "float16" or "bfloat16", also as a torch dtype.
            tokenizer: A transformers or tokenizers one in place of the checkpoint's.
            load_weights: TransformerLens's; True.
            trust_remote_code: TransformerLens's; False.
            model_class: TransformerLens's; None.
            hf_model: A transformers model in memory to use instead of the name's weights.
            n_ctx: The longest input; see ``HookedTransformer.from_onnx``.
            revision: The hub's branch, tag or commit.
            **unsupported: TransformerLens's other arguments, at the values that ask for nothing.

        Raises:
            ExportError: For a name or checkpoint that cannot be had or exported.
            InputError: For what ONNX Runtime or graphlens cannot honour.
        """
        asked = unsupported | {
            "hf_config_overrides": hf_config_overrides,
            "load_weights": load_weights,
            "trust_remote_code": trust_remote_code,
            "model_class": model_class,
        }
        check_boot(asked)
        bridge = cls.from_pretrained_no_processing(
            model_name,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            n_ctx=n_ctx,
            revision=revision,
        )
        if hf_model is None:
            bridge._booted = (model_name, revision)
        return bridge

    @property
    def compatibility_mode(self) -> bool:
        """True once ``enable_compatibility_mode`` was called."""
        return cast(BridgeBorder, self.runner.border).compatibility_mode

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Processes the weights and masks as TransformerLens 3's HookedTransformer does. TransformerLens 4: the same name.

        Masked attention scores are minus infinity from then on, caches have 3.9's names besides, whatever was asked for, and
        ``hook.name`` is that of 3.9, but for ``blocks.N.hook_in`` and ``hook_out``: as there.
        Hooks and flags stay as they are. The processed file is made in the cache folder the first time.

        Args:
            disable_warnings: TransformerLens's; changes nothing.
            no_processing: True leaves the weights as they are, whatever follows.
            fold_ln: A processing flag, as the others; see ``process_weights``.
            center_writing_weights: See there.
            center_unembed: See there.
            fold_value_biases: See there.
            refactor_factored_attn_matrices: See there.

        Raises:
            InputError: While weights are set by ``set_weights``, which are not the file's.
        """
        if not checked_number(no_processing, "no_processing", bool):
            self.process_weights(
                fold_ln=fold_ln,
                center_writing_weights=center_writing_weights,
                center_unembed=center_unembed,
                fold_value_biases=fold_value_biases,
                refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            )
        self.runner.border = replace(cast(BridgeBorder, self.runner.border), compatibility_mode=True)
        self._names.rename()

    def process_weights(
        self,
        verbose: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Goes on with processed weights, without what else ``enable_compatibility_mode`` does. TransformerLens 4: the same
        name.

        Args:
            verbose: TransformerLens's; changes nothing.
            fold_ln: See ``enable_compatibility_mode``, as for what follows.
            center_writing_weights: See there.
            center_unembed: See there.
            fold_value_biases: See there.
            refactor_factored_attn_matrices: See there.

        Raises:
            InputError: While weights are set by ``set_weights``, and for a dtype whose processed weights cannot be had.
        """
        flags = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        steps = tuple(name for name, on in flags.items() if checked_number(on, name, bool))
        engine = processed(self.runner.engine, steps, self._booted)
        if engine is not None:
            self.runner.use(engine)

    # Running

    def forward(  # type: ignore[override]
        self,
        input: Input[torch.Tensor],
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        *,
        tokens: Input[torch.Tensor] | None = None,
        past_key_values: KeyValueCache | None = None,
        past_kv_cache: KeyValueCache | None = None,
    ) -> torch.Tensor | Output[torch.Tensor] | None:
        """Runs the model with the active hooks and interventions. TransformerLens 4: the same name.

        Args:
            input: See ``HookedTransformer.forward``, as for what has no other description.
            return_type: See there.
            loss_per_token: See there.
            prepend_bos: See there.
            padding_side: See there.
            attention_mask: See there.
            labels: TransformerLens 4's; None. ``model.loss_fn(logits, tokens)`` gives the loss of other tokens.
            start_at_layer: See there.
            stop_at_layer: See there.
            tokens: See there.
            past_key_values: The same as ``past_kv_cache``: a KeyValueCache of graphlens.
            past_kv_cache: See there.

        Raises:
            InputError: For unusable input.
        """
        if labels is not None:
            raise InputError(
                "labels cannot be honoured: take model.loss_fn(logits, tokens) of the tokens that are meant."
            )
        cache = one_cache(past_key_values, past_kv_cache)
        return super().forward(
            input,
            return_type,
            loss_per_token,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            start_at_layer=start_at_layer,
            tokens=tokens,
            attention_mask=attention_mask,
            stop_at_layer=stop_at_layer,
            past_kv_cache=cache,
        )

    __call__ = forward  # type: ignore[assignment]

    def run_with_cache(  # type: ignore[override]
        self,
        input: Input[torch.Tensor],
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        pos_slice: SliceInput = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        *,
        return_type: str | None = "logits",
        past_key_values: KeyValueCache | None = None,
        past_kv_cache: KeyValueCache | None = None,
        **options: object,
    ) -> tuple[torch.Tensor | Output[torch.Tensor] | None, ActivationCache[torch.Tensor] | dict[str, torch.Tensor]]:
        """Runs the model and keeps its activations, by TransformerLens 4's names. TransformerLens 4: the same name.

        Args:
            input: See ``HookedTransformer.run_with_cache``, as for what has no other description.
            return_cache_object: False gives the dictionary.
            remove_batch_dim: See there.
            names_filter: A hook name, a list of names, or a function name -> bool, which is asked for TransformerLens 4's
                names and for those of 3.9; the cache has those that it returns True for. None for all names.
            stop_at_layer: See there.
            start_at_layer: See there.
            pos_slice: See there.
            incl_bwd: See there.
            reset_hooks_end: See there.
            clear_contexts: See there.
            return_type: See ``forward``.
            past_key_values: The same as ``past_kv_cache``.
            past_kv_cache: A KeyValueCache of graphlens.
            **options: The other arguments of ``forward``.

        Returns:
            (output, ActivationCache). Masked attention scores are the lowest number of their dtype, as in TransformerLens 4;
            in compatibility mode minus infinity.

        Raises:
            UnknownHookPoint: For a name or filter that matches nothing.
            InputError: What ``HookedTransformer.run_with_cache`` raises.
        """
        picked = self._names.picked(names_filter, self.compatibility_mode)
        output, found = super().run_with_cache(
            input,
            return_type,
            names_filter=picked.filter,
            remove_batch_dim=remove_batch_dim,
            incl_bwd=incl_bwd,
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
            pos_slice=pos_slice,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            past_kv_cache=one_cache(past_key_values, past_kv_cache),
            **options,
        )
        named: dict[str, torch.Tensor] = {}
        for own, value in found.cache_dict.items():
            name = own.removesuffix("_grad")
            if is_scores(own) and not self.compatibility_mode:
                value = value.masked_fill(torch.isneginf(value), torch.finfo(value.dtype).min)
            named |= dict.fromkeys((other + own[len(name) :] for other in picked.names(name)), value)
        if not return_cache_object:
            return output, named
        cache = BridgeCache(named, self, found.has_batch_dim)
        cache.mask = found.mask
        return output, cache

    def run_with_hooks(  # type: ignore[override]
        self,
        input: Input[torch.Tensor],
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_type: str | None = "logits",
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
        remove_batch_dim: bool = False,
        **options: object,
    ) -> torch.Tensor | Output[torch.Tensor] | None:
        """Runs the model with hooks that are added for this run. TransformerLens 4: the same name.

        Args:
            input: See ``HookedTransformer.run_with_hooks``, as for what has no other description.
            fwd_hooks: See there; a function name -> bool is asked for TransformerLens 4's names and for those of 3.9.
            bwd_hooks: See there.
            reset_hooks_end: See there.
            clear_contexts: See there.
            return_type: See there.
            stop_at_layer: See there.
            start_at_layer: See there.
            remove_batch_dim: True hands hooks the activations of a batch of one without its axis.
            **options: The other arguments of ``forward``.

        Raises:
            UnknownHookPoint: For a name that is none.
            HookResultError: For what a hook returned; and whatever a hook raises.
        """
        if checked_number(remove_batch_dim, "remove_batch_dim", bool):
            fwd_hooks, bwd_hooks = (
                [(name, without_batch(function)) for name, function in pairs(hooks)] for hooks in (fwd_hooks, bwd_hooks)
            )
        if "past_key_values" in options:
            options["past_kv_cache"] = one_cache(options.pop("past_key_values"), options.get("past_kv_cache"))
        return super().run_with_hooks(
            input,
            return_type,
            fwd_hooks=fwd_hooks,
            bwd_hooks=bwd_hooks,
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
            stop_at_layer=stop_at_layer,
            start_at_layer=start_at_layer,
            **options,
        )

    def gradients(
        self,
        input: Input[torch.Tensor],
        metric: Metric | Differentiable[torch.Tensor],
        names: NamesFilter = None,
        **forward_options: object,
    ) -> Gradients[torch.Tensor]:
        """d(metric)/d(activation) for hook points, by TransformerLens 4's names; see ``HookedTransformer.gradients``.

        Args:
            input: See there, as for what follows.
            metric: See there.
            names: See there.
            **forward_options: See there.

        Raises:
            UnknownHookPoint: For a name that is none.
            InputError: For a metric without a derivative, and for hook points of integers.
        """
        chosen = self._names.picked(names, False).filter
        return super().gradients(input, metric, chosen, **forward_options).renamed(self._names.called)

    # Hook points

    def hook_points(self) -> HookPointInfo:
        """Every hook point by TransformerLens 4's name -> (shape, dtype). ``rich.print`` shows it as a table."""
        return HookPointInfo({self._names.called(own): info for own, info in super().hook_points().items()})

    def get_hook_point(self, hook_name: str) -> HookPoint | None:
        """The hook point of a name, None where there is none. TransformerLens 4: the same name.

        Args:
            hook_name: TransformerLens 4's name, or that of 3.9.
        """
        return self._names.find(hook_name)
