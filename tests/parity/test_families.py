"""What a family makes of config.json files as the hub has them, and that a key which nobody knows is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphlens.errors import ExportError
from graphlens.export.checkpoint import family_of, hf_config_of
from graphlens.export.families import Spec
from graphlens.export.families.family import ACTIVATIONS
from graphlens.file.manifest import ModelConfig

# The whole content of files on the hub, from memory: their keys matter here, old and odd ones among them.
GPT2: dict[str, Any] = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip
LLAMA2: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
LLAMA32: dict[str, Any] = LLAMA2 | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
SMOLLM2: dict[str, Any] = LLAMA2 | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "rope_interleaved": False, "rope_theta": 100000, "vocab_size": 49152,
    "tie_word_embeddings": True, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}  # fmt: skip
PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "classifier_dropout": 0.1, "eos_token_id": 0,
    "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8,
    "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True,
    "vocab_size": 50304,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN25: dict[str, Any] = QWEN3 | {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "sliding_window": 32768, "use_mrope": False, "head_dim": None,
}  # fmt: skip
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "_sliding_window_pattern": 6, "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640, "initializer_range": 0.02, "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": False, "use_cache": True,
    "vocab_size": 262144,
}  # fmt: skip
GEMMA3_1B: dict[str, Any] = {
    key: value for key, value in GEMMA3.items() if key not in ("layer_types", "_sliding_window_pattern")
} | {"sliding_window_pattern": 6, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
MISTRAL: dict[str, Any] = LLAMA2 | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0,
    "num_key_value_heads": 8, "max_position_embeddings": 32768,
}  # fmt: skip
REAL: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "distilgpt2": GPT2
    | {"_num_labels": 1, "n_layer": 6, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pruned_heads": {}},
    "Llama-2-7b": LLAMA2,
    "Llama-1, converted by hand": {
        key: value for key, value in LLAMA2.items() if key not in ("num_key_value_heads", "rope_scaling")
    }
    | {"max_sequence_length": 2048, "max_position_embeddings": 2048, "rms_norm_eps": 1e-06, "pad_token_id": -1},
    "Llama-3.2-1B": LLAMA32,
    "Llama-3.2-1B, by unsloth": LLAMA32 | {"unsloth_fixed": True, "unsloth_version": "2025.1", "pad_token_id": 128004},
    "SmolLM2-135M": SMOLLM2,
    "pythia-70m": PYTHIA,
    "Qwen3-0.6B": QWEN3,
    "Qwen2.5-0.5B": QWEN25,
    "gemma-3-270m": GEMMA3,
    "gemma-3-1b-it": GEMMA3_1B,
    "Mistral-7B": MISTRAL,
}


def read(settings: dict[str, Any], folder: Path) -> tuple[Spec, ModelConfig]:
    """What graphlens makes of a config.json."""
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    family = family_of(folder, "mine")
    spec = family.spec_of(hf_config_of(folder, "mine"), "mine")
    return spec, family.model_config(spec, "mine", "float32")


@pytest.mark.parametrize("name", REAL)
def test_a_config_of_the_hub_is_read(name: str, tmp_path: Path) -> None:
    settings = REAL[name]
    spec, config = read(settings, tmp_path)
    assert config.n_layers == settings.get("n_layer", settings.get("num_hidden_layers"))
    assert config.n_heads == settings.get("n_head", settings.get("num_attention_heads"))
    assert config.n_key_value_heads == settings.get("num_key_value_heads", config.n_heads)
    assert config.d_head == settings.get("head_dim") or config.d_head * config.n_heads == config.d_model
    assert config.d_vocab == settings["vocab_size"]
    assert config.n_ctx == min(2048, spec.n_ctx)
    assert spec.n_ctx == settings.get("n_positions", settings.get("max_position_embeddings"))
    if "rope_theta" in settings or "rotary_emb_base" in settings:
        assert config.rotary_base == settings.get("rope_theta", settings.get("rotary_emb_base"))
    assert config.rotary_dim == {"gpt2": None, "gpt_neox": config.d_head // 4}.get(
        settings["model_type"], config.d_head
    )


def test_windows_are_read_where_they_are_heeded(tmp_path: Path) -> None:
    pattern = ("local",) * 5 + ("global",)
    for settings, types in ((GEMMA3, pattern * 3), (GEMMA3_1B, (pattern * 5)[:26])):
        config = read(settings, tmp_path)[1]
        assert (config.window_size, config.attn_types) == (512, types)
    assert read(MISTRAL, tmp_path)[1].attn_types == ("local",) * 32
    # Qwen ships a window and switches it off.
    assert read(QWEN25, tmp_path)[1].window_size is None
    config = read(QWEN25 | {"use_sliding_window": True, "max_window_layers": 20}, tmp_path)[1]
    assert (config.window_size, config.attn_types) == (32768, ("global",) * 20 + ("local",) * 4)


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"scale_attn_by_head": 2.0}, "scale_attn_by_head=2.0"),
        (GPT2, {"n_embd": 7}, "12 heads"),
        (LLAMA2, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (LLAMA2, {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        (LLAMA2, {"sliding_window": 4096}, "sliding_window=4096"),
        (LLAMA2, {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        (LLAMA2, {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA2, {"use_qk_norm": True}, "use_qk_norm=True"),
        (LLAMA2, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (LLAMA2, {"hidden_act": "xielu"}, "activation function 'xielu'"),
        (LLAMA2, {"num_key_value_heads": 5}, "keys and values"),
        (LLAMA2, {"hidden_size": 0}, "hidden_size=0"),
        (LLAMA2, {"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        (LLAMA2, {"head_dim": -8}, "head_dim=-8"),
        (PYTHIA, {"attention_type": "linear"}, "attention_type='linear'"),
        (PYTHIA, {"use_gated_mlp": True}, "use_gated_mlp=True"),
        (QWEN3, {"num_experts": 8}, "num_experts=8"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA3, {"layer_types": ["chunked_attention"] * 18}, "chunked_attention"),
        (GEMMA3, {"altup_num_inputs": 4}, "altup_num_inputs=4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_computed_is_refused_by_its_name(
    settings: dict[str, Any], change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=rf"^mine: .*{said}"):
        read(settings | change, tmp_path)


def test_the_activation_functions_are_those_that_are_traced() -> None:
    from graphlens.export.operations import ACTIVATIONS as FUNCTIONS

    assert set(ACTIVATIONS) == set(FUNCTIONS)


def test_the_constants_of_an_architecture_are_in_its_config(tmp_path: Path) -> None:
    config = read(LLAMA32, tmp_path)[1]
    assert (config.normalization_type, config.positional_embedding_type) == ("RMS", "rotary")
    assert (config.gated_mlp, config.parallel_attn_mlp, config.attn_only) == (True, False, False)
    assert config.n_params == 16 * (2 * 2048 * 64 * (32 + 8) + 3 * 2048 * 8192)
    assert (config.n_ctx, config.n_ctx_trained) == (2048, 131072)
    assert read(GPT2 | {"n_inner": None}, tmp_path)[1].d_mlp == 3072
    assert read(PYTHIA, tmp_path)[1].parallel_attn_mlp
