"""Models from a configuration, as courses and papers build them: attention only, one layer without norms, a classifier."""

import torch
from transformer_lens import FactoredMatrix, HookedTransformer, HookedTransformerConfig

results = {}


def filled(model, seed=0):
    """The same values in both libraries, whatever each draws."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.3
        if value.is_floating_point() and "IGNORE" not in name
        else value
        for name, value in sorted(model.state_dict().items())
        if "mask" not in name and "rotary" not in name
    }
    model.load_state_dict(state, strict=False)
    return model


# Two layers of attention alone, with shortformer positions, as the paper on circuits has them.
cfg = HookedTransformerConfig(
    d_model=24,
    d_head=6,
    n_heads=4,
    n_layers=2,
    n_ctx=19,
    d_vocab=37,
    attention_dir="causal",
    attn_only=True,
    seed=398,
    use_attn_result=True,
    normalization_type=None,
    positional_embedding_type="shortformer",
)
results["cfg"] = [cfg.n_params, cfg.d_mlp, cfg.d_vocab_out, cfg.act_fn, float(cfg.initializer_range), cfg.n_heads]
model = filled(HookedTransformer(cfg))
tokens = torch.arange(15)[None] % 37
logits, cache = model.run_with_cache(tokens, remove_batch_dim=True)
results["attention only"] = logits
results["its names"] = list(cache.keys())
results["its result"] = cache["result", 1]
results["composition"] = torch.stack([model.all_composition_scores(mode) for mode in ("Q", "K", "V")])
W_QK = FactoredMatrix(model.W_Q[0, 1], model.W_K[0, 1].T)
results["positions"] = (model.W_pos @ W_QK @ model.W_pos.T).AB
results["direct"] = (model.W_E @ model.W_U)[:4, :4]
stack, labels = cache.stack_head_results(return_labels=True)
results["labels"], results["stack"] = labels, stack
results["attributed"] = cache.logit_attrs(stack, tokens[0], has_batch_dim=False) if False else stack.sum(0)

# One layer that adds modulo a prime.
cfg = HookedTransformerConfig(
    n_layers=1,
    n_heads=4,
    d_model=20,
    d_head=5,
    d_mlp=40,
    act_fn="relu",
    normalization_type=None,
    d_vocab=14,
    d_vocab_out=13,
    n_ctx=3,
    init_weights=True,
    device="cpu",
    seed=999,
)
model = filled(HookedTransformer(cfg), 1)
for name, parameter in model.named_parameters():
    if "b_" in name:
        parameter.requires_grad = False
pairs = torch.cartesian_prod(torch.arange(13), torch.arange(13), torch.tensor([13]))
logits, cache = model.run_with_cache(pairs)
results["modular"] = logits[:, -1]
results["neurons"] = cache["post", 0][:, -1]
results["its pattern"] = cache["pattern", 0][:, :, -1]
results["loss of modular"] = model.run_with_hooks(
    pairs, fwd_hooks=[("blocks.0.mlp.hook_post", lambda value, hook: value - value.mean(0))]
)[:, -1]

# Three layers with norms and biases that classify brackets.
cfg = HookedTransformerConfig(
    n_ctx=14,
    d_model=16,
    d_head=8,
    n_heads=2,
    d_mlp=16,
    n_layers=3,
    attention_dir="causal",
    act_fn="relu",
    d_vocab=5,
    d_vocab_out=2,
    use_attn_result=True,
    device="cpu",
    use_hook_tokens=True,
)
model = filled(HookedTransformer(cfg), 2)
brackets = torch.tensor([[0, 3, 4, 3, 4, 2, 1], [0, 3, 3, 4, 4, 2, 1]])
logits, cache = model.run_with_cache(brackets)
results["brackets"] = logits[:, 0]
results["ln_final"] = cache["ln_final.hook_normalized"]
results["parts"] = cache.decompose_resid(mode="all", apply_ln=True)

# Rotary positions, RMS norms, gated MLPs, grouped keys.
cfg = HookedTransformerConfig(
    n_layers=2,
    d_model=24,
    n_ctx=16,
    d_head=6,
    n_heads=4,
    n_key_value_heads=2,
    d_mlp=30,
    d_vocab=31,
    act_fn="silu",
    normalization_type="RMS",
    positional_embedding_type="rotary",
    rotary_dim=6,
    gated_mlp=True,
    final_rms=True,
)
model = filled(HookedTransformer(cfg), 3)
logits, cache = model.run_with_cache(tokens % 31)
results["llama-like"] = logits
results["llama-like names"] = list(cache.keys())
results["rotated"] = cache["blocks.1.attn.hook_rot_q"]

# SoLU with its own norm, parallel blocks.
cfg = HookedTransformerConfig(
    n_layers=2,
    d_model=18,
    n_ctx=16,
    d_head=6,
    n_heads=3,
    d_vocab=31,
    act_fn="solu_ln",
    normalization_type="LN",
    parallel_attn_mlp=False,
)
model = filled(HookedTransformer(cfg), 4)
logits, cache = model.run_with_cache(tokens % 31)
results["solu"] = logits
results["solu names"] = list(cache.keys())
model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
results["solu, processed"] = model(tokens % 31)

# The same seed gives the same model again.
first, second = HookedTransformer(cfg), HookedTransformer(cfg)
results["drawn"] = [float(first.W_E.std()) > 0.01, bool(first.W_Q.abs().sum() > 0), float(first.b_Q.abs().sum())]
cfg = HookedTransformerConfig(n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=9, attn_only=True, seed=5)
results["same seed"] = bool(torch.equal(HookedTransformer(cfg).W_E, HookedTransformer(cfg).W_E))
results["config as a dict"] = sorted(
    key for key in cfg.to_dict() if key in ("n_layers", "d_model", "n_ctx", "d_head", "seed", "attn_only", "n_heads")
)
