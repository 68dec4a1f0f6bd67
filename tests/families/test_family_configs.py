"""Which config.json files are taken: those of the hub, with all that they hold besides, and none that computes otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from graphlens.errors import ExportError
from graphlens.export.checkpoint import supported_family
from graphlens.export.families import Spec
from tests.families.variants import VARIANTS

# Variant -> what config.json files of that architecture on the hub hold besides what transformers writes today. "-" takes
# a key away.
ON_THE_HUB: dict[str, dict[str, Any]] = {
    "gpt2": {
        "_num_labels": 1, "n_ctx": 64, "gradient_checkpointing": False, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "reorder_and_upcast_attn": True,
    },
    "llama": {
        "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0, "rope_parameters": "-", "is_llama_config": True,
        "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "neox": {
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_parameters": "-", "classifier_dropout": 0.1,
        "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0,
    },
    "mistral": {"rope_theta": 10000.0, "rope_parameters": "-", "attention_dropout": 0.0},
    "mixtral": {"rope_theta": 1000000.0, "rope_parameters": "-", "output_router_logits": False, "router_aux_loss_coef": 0.02},
    "qwen2": {
        "rope_theta": 10000.0, "rope_parameters": "-", "max_window_layers": 21, "use_sliding_window": False,
        "sliding_window": 32768, "use_mrope": False,
    },
    "gemma": {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "rope_scaling": None, "rope_theta": 10000.0},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window_size": 4096},
    "phi": {
        "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": "-", "embd_pdrop": 0.0,
        "resid_pdrop": 0.1, "auto_map": {"AutoConfig": "configuration_phi.PhiConfig"},
    },
    "phi3": {
        "original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0, "rope_parameters": "-",
        "attention_bias": False, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "full_attn_mod": 1,
        "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
    },
    "gptj": {
        "rotary": True, "scale_attn_weights": True, "gradient_checkpointing": False, "summary_first_dropout": 0.1,
        "tokenizer_class": "GPT2Tokenizer", "model_parallel": False,
    },
    "gpt-neo": {"gradient_checkpointing": False, "summary_activation": None, "summary_type": "cls_index"},
    "opt": {"prefix": "</s>", "activation_dropout": 0.0, "_remove_final_layer_norm": False, "init_std": 0.02},
    "olmo": {"rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": "-", "attention_bias": False},
    "bloom": {
        "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "masked_softmax_fusion": True, "n_inner": None,
        "offset_alibi": 100, "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False,
        "slow_but_exact": False, "unk_token_id": 0,
    },
    "falcon-7b": {
        "apply_residual_connection_post_layernorm": False, "rope_theta": 10000.0, "rope_parameters": "-",
        "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    },
    "stablelm": {"partial_rotary_factor": 0.25, "rope_theta": 10000, "rope_parameters": "-", "norm_eps": 1e-5},
    "smollm3": {"max_window_layers": 28, "pretraining_tp": 2, "rope_scaling": None, "transformers.js_config": {}},
    "granite": {"rope_scaling": None, "rope_theta": 10000.0, "rope_parameters": "-", "attention_bias": False},
}  # fmt: skip
# Variant, what its config.json sets -> what the refusal says.
REFUSED = [
    ("opt", {"do_layer_norm_before": "late"}, "do_layer_norm_before='late'"),
    ("opt", {"word_embed_proj_dim": -24}, "word_embed_proj_dim=-24"),
    ("falcon-7b", {"n_head": 6, "n_layer": 3}, "that of Falcon's first code"),
    ("falcon-7b", {"alibi": True}, "alibi=True"),
    ("falcon-40b", {"parallel_attn": False}, "parallel_attn=False"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("llama", {"sliding_window": 4}, "sliding_window=4"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
    ("olmo", {"sliding_window": 4}, "sliding_window=4"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias=True"),
    ("mistral", {"attention_multiplier": 0.5}, "attention_multiplier=0.5"),
    ("granite", {"attention_multiplier": 0}, "attention_multiplier=0"),
    ("gemma2", {"layer_types": ["sliding_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
]


def spec_of(folder: Path, settings: dict[str, Any]) -> Spec:
    """What the model of a config.json computes, asked as an export does."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    family = supported_family(settings, "tiny")
    return family.spec_of(transformers.AutoConfig.from_pretrained(folder), "tiny")


@pytest.fixture
def settings_of(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    def settings(name: str) -> dict[str, Any]:
        variant = VARIANTS[name]
        config = getattr(transformers, variant.config)(**variant.arguments)
        config.save_pretrained(tmp_path / name)
        found: dict[str, Any] = json.loads((tmp_path / name / "config.json").read_text())
        return found

    return settings


@pytest.mark.parametrize("name", list(ON_THE_HUB))
def test_what_else_a_config_on_the_hub_holds_changes_nothing(name: str, settings_of: Any, tmp_path: Path) -> None:
    plain = settings_of(name)
    more = plain | ON_THE_HUB[name]
    asked = {key: value for key, value in more.items() if value != "-"}
    found, expected = spec_of(tmp_path, asked), spec_of(tmp_path, plain)
    if "rope_theta" in asked and asked["rope_theta"] != 10000:
        assert found.attention.rotary is not None
        assert found.attention.rotary.base == asked["rope_theta"]
    else:
        assert found == expected


@pytest.mark.parametrize(("name", "changed", "said"), REFUSED)
def test_what_would_compute_otherwise_is_refused(
    name: str, changed: dict[str, Any], said: str, settings_of: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said):
        spec_of(tmp_path, settings_of(name) | changed)
