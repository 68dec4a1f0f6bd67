"""A second architecture is a table: the tracer takes Llama (grouped heads, rotary, RMSNorm, gated MLP) as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from graphlens.errors import ExportError
from graphlens.export import build
from graphlens.export.families import Family, Tap
from graphlens.export.families.gpt2 import GPT2
from graphlens.export.trace import hooked_attention, trace
from graphlens.runtime import open_session
from graphlens.surgery.graph import values_by_name

LLAMA: Family = replace(
    GPT2,
    architecture="LlamaForCausalLM",
    model_types=("llama",),
    blocks="model.layers",
    top={
        "model.embed_tokens": Tap(after="hook_embed"),
        "lm_head": Tap(before="unembed.hook_in", after="unembed.hook_out"),
    },
    block={
        "": Tap(before="hook_resid_pre", after="hook_resid_post"),
        "self_attn": Tap(after="hook_attn_out"),
        "post_attention_layernorm": Tap(before="hook_resid_mid"),
        "mlp.gate_proj": Tap(after="mlp.hook_pre"),
        "mlp.up_proj": Tap(after="mlp.hook_pre_linear"),
        "mlp.down_proj": Tap(before="mlp.hook_post", after="hook_mlp_out"),
    },
    norms={"input_layernorm": "ln1", "post_attention_layernorm": "ln2"},
    final_norm="model.norm",
    pos_embed=None,
    config={
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_key_value_heads": "num_key_value_heads",
        "d_model": "hidden_size",
        "d_head": "head_dim",
        "d_mlp": "intermediate_size",
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "act_fn": "hidden_act",
        "eps": "rms_norm_eps",
    },
    constants={"normalization_type": "RMS", "positional_embedding_type": "rotary", "gated_mlp": True},
    tied={},
    aliases={},
)
LLAMA_CONFIG = transformers.LlamaConfig(
    hidden_size=40, intermediate_size=77, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1,
    head_dim=8, vocab_size=101, max_position_embeddings=33, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def test_llama_needs_a_table_and_no_change_to_the_tracer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(LLAMA_CONFIG).eval()
    reference.set_attn_implementation("eager")
    graph = trace(LLAMA_CONFIG, LLAMA)
    build.optimise(graph)
    hooks = build.name_hook_points(graph, 2)
    build.tidy(graph)
    weights = reference.state_dict()
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(weights[name].numpy(), name=name)
    wanted = {entry.value for entry in hooks.values()}
    graph.graph.outputs[:] = [value for name, value in values_by_name(graph).items() if name in wanted]
    path = tmp_path / "llama.onnx"
    ir.save(graph, path)
    session = open_session(path, "cpu")
    tokens = np.random.default_rng(0).integers(0, 101, (2, 9))
    feeds = {
        "input_ids": tokens,
        "positions": np.arange(9)[None].repeat(2, 0),
        "mask": np.tril(np.ones((9, 9), bool))[None, None].repeat(2, 0),
        "token_mask": np.ones((2, 9), bool),
    }
    found = dict(zip(session.outputs, session.run(session.outputs, feeds), strict=True))
    with torch.no_grad():
        out = reference(torch.from_numpy(tokens), output_hidden_states=True, output_attentions=True)
    expected = {
        "logits": out.logits,
        "blocks.0.hook_resid_pre": out.hidden_states[0],
        "blocks.0.hook_resid_post": out.hidden_states[1],
        "blocks.0.attn.hook_pattern": out.attentions[0],
        "blocks.1.attn.hook_pattern": out.attentions[1],
    }

    def carried(name: str) -> str:
        return hooks[name].value if name in hooks else name  # the embedding is the first residual

    for name, value in expected.items():
        assert np.abs(found[carried(name)] - value.numpy()).max() <= 1e-4 * max(1, value.abs().max()), name
    assert found["blocks.1.attn.hook_k"].shape == (2, 9, 1, 8)
    assert found["blocks.1.attn.hook_q"].shape == (2, 9, 5, 8)
    assert {"blocks.0.mlp.hook_pre_linear", "blocks.0.ln1.hook_scale", "blocks.0.hook_resid_pre"} <= set(hooks)


def test_the_architectures_constants_come_from_the_family_and_the_config() -> None:
    config = LLAMA.model_config(LLAMA_CONFIG, "small-llama", "float32")
    assert (config.model_name, config.original_architecture) == ("small-llama", "LlamaForCausalLM")
    assert (config.normalization_type, config.positional_embedding_type) == ("RMS", "rotary")
    assert (config.n_heads, config.n_key_value_heads, config.d_head, config.d_mlp) == (5, 1, 8, 77)
    assert (config.gated_mlp, config.parallel_attn_mlp, config.attn_only) == (True, False, False)
    assert config.n_params == 2 * (2 * 40 * 8 * (5 + 1) + 3 * 40 * 77)
    gpt2 = GPT2.model_config(transformers.GPT2Config(n_embd=40, n_head=5, n_inner=None), "small", "float32")
    assert (gpt2.d_mlp, gpt2.d_head, gpt2.gated_mlp, gpt2.default_prepend_bos) == (160, 8, False, True)


@pytest.mark.parametrize("option", ["sliding_window", "s_aux"])
def test_a_kind_of_attention_that_is_not_computed_is_refused(option: str) -> None:
    heads, mask = torch.zeros(1, 2, 3, 8), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ExportError, match=rf"uses {option}, which graphlens cannot export"):
        hooked_attention(torch.nn.Module(), heads, heads, heads, mask, **{option: 4})
