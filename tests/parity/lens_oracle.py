"""TransformerLens 3.9's HookedTransformer over a checkpoint folder, offline: what graphlens must reproduce."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformer_lens
    from transformer_lens import loading_from_pretrained as loading

PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def oracle(
    folder: Path | str, tokenizer: Any = None, dtype: torch.dtype = torch.float32, **processing: bool
) -> transformer_lens.HookedTransformer:
    """The checkpoint in ``folder`` as a TransformerLens model on the CPU, unprocessed unless ``processing`` says else.

    ``processing``: fold_ln, center_writing_weights, center_unembed, fold_value_biases,
    refactor_factored_attn_matrices; ``from_pretrained`` sets the first four. ``tokenizer``: a transformers tokenizer,
    or True for the folder's own; without one, pass tokens. HookedTransformer.from_pretrained refuses folders and
    takes d_mlp for 4 d_model, so this follows its steps from their parts.
    """
    unknown = set(processing) - {*PROCESSING, "refactor_factored_attn_matrices"}
    if unknown:
        raise TypeError(f"no such processing: {sorted(unknown)}")
    folder = str(folder)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    if tokenizer is True:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    flags = {**dict.fromkeys(PROCESSING, False), "refactor_factored_attn_matrices": False, **processing}
    facts = hf_model.config
    facts.n_ctx = facts.max_position_embeddings  # read for every GPT-2, and only the hub's old config files have it
    with warnings.catch_warnings(), patch.object(loading.AutoConfig, "from_pretrained", return_value=facts):
        warnings.simplefilter("ignore")
        config = loading.get_pretrained_model_config(
            folder, hf_cfg=facts.to_dict(), fold_ln=flags["fold_ln"], device="cpu", dtype=dtype
        )
        config.d_mlp = getattr(facts, "n_inner", None) or config.d_mlp
        config.tokenizer_name = None
        state = loading.get_pretrained_state_dict(folder, config, hf_model, dtype=dtype)
        model = transformer_lens.HookedTransformer(config, tokenizer, move_to_device=False)
        model.load_and_process_state_dict(state, **flags)
    return model.eval().requires_grad_(False)
