"""A second architecture is a table: the tracer takes Llama (grouped heads, rotary, RMSNorm, gated MLP) as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import transformers

from graphlens.export import build
from graphlens.export.families import GPT2, Family, Tap
from graphlens.export.trace import trace
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
    normalization="RMS",
    pos_embed=None,
    tied={},
)


def test_llama_needs_a_table_and_no_change_to_the_tracer(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=40, intermediate_size=77, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1,
        head_dim=8, vocab_size=101, max_position_embeddings=33, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.set_attn_implementation("eager")
    graph = trace(config, LLAMA)
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
