"""Opening models the way TransformerLens's constructors are called."""

from __future__ import annotations

import os
from typing import Any, Self

from graphlens.errors import InputError
from graphlens.model.border import NumpyFace
from graphlens.runtime.providers import Providers

# TransformerLens's other arguments, with the value at which they ask for nothing.
_ASKS_NOTHING = {
    "checkpoint_index": None,
    "checkpoint_value": None,
    "checkpoint_label": None,
    "n_devices": 1,
    "move_to_device": True,
}


class Pretrained(NumpyFace):
    """The part of HookedTransformer that finds, exports, processes and opens a model."""

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        *,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
        hf_model: Any = None,
        tokenizer: Any = None,
        device: Any = None,
        dtype: Any = None,
        default_prepend_bos: bool | None = None,
        default_padding_side: str | None = None,
        first_n_layers: int | None = None,
        n_ctx: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        providers: Providers = None,
        **unsupported: Any,
    ) -> Self:
        """Opens a model by hub name, TransformerLens alias, checkpoint folder or hooked folder, its weights processed.

        The first time it is exported into the cache folder (``GRAPHLENS_CACHE``), which needs torch and transformers;
        afterwards it opens from there without them. The processing flags are TransformerLens's (see process_weights).
        What follows ``center_unembed`` is passed by name: TransformerLens's order is another there.
        ``hf_model`` is a transformers model in memory (a fine-tune) to use instead of the name's weights; ``tokenizer`` a
        transformers or tokenizers one. ``device`` is "cpu" or "cuda" (or give ``providers``); ``dtype`` "float32",
        "float64", "float16" or "bfloat16", also as a torch or NumPy dtype.
        ``default_padding_side`` None is the tokenizer's. ``first_n_layers`` keeps that many blocks,
        ``n_ctx`` lowers the longest input. ``cache_dir``, ``token`` and ``revision`` are huggingface_hub's.
        Raises ExportError, ModelFileError, and InputError for what ONNX Runtime cannot honour.
        """
        for name, value in unsupported.items():
            if name not in _ASKS_NOTHING or value not in (_ASKS_NOTHING[name], None):
                raise InputError(f"from_pretrained cannot honour {name}={value!r}.")
        from graphlens.pipelines.cache import cached_export

        processing = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        folder = cached_export(
            model_name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            dtype=_dtype_name(dtype),
            processing=tuple(name for name, on in processing.items() if on),
            first_n_layers=first_n_layers,
            hf_model=hf_model,
        )
        return cls.from_onnx(  # type: ignore[attr-defined,no-any-return]
            folder,
            _providers(device, providers),
            default_prepend_bos=default_prepend_bos,
            default_padding_side=default_padding_side,
            tokenizer=tokenizer,
            n_ctx=n_ctx,
        )

    @classmethod
    def from_pretrained_no_processing(
        cls,
        model_name: str | os.PathLike[str],
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        *,
        fold_value_biases: bool = False,
        refactor_factored_attn_matrices: bool = False,
        **options: Any,
    ) -> Self:
        """``from_pretrained`` with the checkpoint's weights exactly as they are."""
        return cls.from_pretrained(
            model_name,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            **options,
        )


DTYPES = ("float32", "float64", "float16", "bfloat16")
_SHORT = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16", "double": "float64"}


def _dtype_name(dtype: Any) -> str:
    """A dtype given as text, a torch dtype or a NumPy one -> its name. Raises InputError for one that is not run."""
    if dtype is None:
        return "float32"
    text = getattr(dtype, "__name__", None) if isinstance(dtype, type) else str(dtype)
    name = str(text).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        raise InputError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    return name


def _providers(device: Any, providers: Providers) -> Providers:
    if device is None:
        return providers
    if providers is not None:
        raise InputError("pass device or providers, not both.")
    kind, _, index = str(device).partition(":")
    if kind not in ("cpu", "cuda") or index not in ("", "0"):
        raise InputError(f"device {str(device)!r}: choose 'cpu' or 'cuda' (its first GPU).")
    return kind
