"""In the manner of the exploratory demo: where in the model the indirect object comes from.

It has ``model`` and ``results`` from tests/scripts/run.py.
"""
# processed

import einops
import torch
import transformer_lens
import transformer_lens.patching as patching
import transformer_lens.utils as utils
from transformer_lens import ActivationCache, HookedTransformer

torch.set_grad_enabled(False)
assert isinstance(model, HookedTransformer)

# A prompt, and what the model makes of it
results["tokens"] = model.to_tokens("When John and Mary went to the store, John gave a drink to")
utils.test_prompt("When John and Mary went to the store, John gave a drink to", " Mary", model, print_details=False)

pairs = [("John", "Mary"), ("Mary", "John"), ("Tom", "Anna"), ("Anna", "Tom")]
prompts = [f"When {first} and {second} went to the store, {first} gave a drink to" for first, second in pairs]
answers = torch.tensor(
    [[model.to_single_token(f" {second}"), model.to_single_token(f" {first}")] for first, second in pairs]
)
tokens = model.to_tokens(prompts, prepend_bos=True)
logits, cache = model.run_with_cache(tokens)
assert isinstance(cache, ActivationCache)


def logits_to_ave_logit_diff(logits, answer_tokens=answers, per_prompt=False):
    final = logits[:, -1, :]
    picked = final.gather(dim=-1, index=answer_tokens)
    difference = picked[:, 0] - picked[:, 1]
    return difference if per_prompt else difference.mean()


results["per_prompt"] = logits_to_ave_logit_diff(logits, per_prompt=True)
baseline = logits_to_ave_logit_diff(logits)

# Direct logit attribution
directions = model.tokens_to_residual_directions(answers)
difference_direction = directions[:, 0] - directions[:, 1]
final_residual = cache["resid_post", -1][:, -1, :]
scaled = cache.apply_ln_to_stack(final_residual, layer=-1, pos_slice=-1)
results["by_hand"] = einops.einsum(scaled, difference_direction, "batch d_model, batch d_model ->") / len(prompts)
torch.testing.assert_close(results["by_hand"], baseline, rtol=0, atol=1e-3)


def residual_stack_to_logit_diff(stack, cache):
    scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    return einops.einsum(scaled, difference_direction, "... batch d_model, batch d_model -> ...") / len(prompts)


accumulated, labels = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1, return_labels=True)
results["logit_lens"] = residual_stack_to_logit_diff(accumulated, cache)
per_layer, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
results["layers"] = residual_stack_to_logit_diff(per_layer, cache)
assert labels[:2] == ["embed", "pos_embed"]
per_head, labels = cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
results["heads"] = einops.rearrange(
    residual_stack_to_logit_diff(per_head, cache), "(layer head) -> layer head", layer=model.cfg.n_layers
)

# Attention
top = torch.topk(results["heads"].flatten(), k=3).indices.tolist()
results["top_heads"] = top
results["patterns"] = torch.stack(
    [cache["pattern", index // model.cfg.n_heads][:, index % model.cfg.n_heads] for index in top]
)

# Activation patching
corrupted_prompts = [prompt for pair in zip(prompts[1::2], prompts[::2], strict=True) for prompt in pair]
corrupted_tokens = model.to_tokens(corrupted_prompts, prepend_bos=True)
corrupted_logits, corrupted_cache = model.run_with_cache(corrupted_tokens, return_type="logits")
corrupted_baseline = logits_to_ave_logit_diff(corrupted_logits)


def normalise(logits):
    return (logits_to_ave_logit_diff(logits) - corrupted_baseline) / (baseline - corrupted_baseline)


def patch_residual_component(corrupted_component, hook, pos, clean_cache):
    corrupted_component[:, pos, :] = clean_cache[hook.name][:, pos, :]
    return corrupted_component


by_hand = torch.zeros(model.cfg.n_layers, tokens.shape[1])
for layer in range(model.cfg.n_layers):
    for position in range(tokens.shape[1]):

        def hook_fn(value, hook, position=position):
            return patch_residual_component(value, hook, position, cache)

        patched = model.run_with_hooks(
            corrupted_tokens, fwd_hooks=[(utils.get_act_name("resid_pre", layer), hook_fn)], return_type="logits"
        )
        by_hand[layer, position] = normalise(patched)
results["resid_pre_by_hand"] = by_hand
results["resid_pre"] = patching.get_act_patch_resid_pre(model, corrupted_tokens, cache, normalise)
results["head_out"] = patching.get_act_patch_attn_head_out_all_pos(model, corrupted_tokens, cache, normalise)

# Hooks that stay, contexts, the weights
model.add_hook("blocks.1.hook_resid_post", lambda value, hook: hook.ctx.update(mean=value.mean()))
model(tokens)
results["mean"] = model.hook_dict["blocks.1.hook_resid_post"].ctx["mean"]
model.reset_hooks()
results["composition"] = model.all_composition_scores("Q")
results["ov_norms"] = model.OV.norm()
results["corner"] = utils.get_corner(model.W_QK if hasattr(model, "W_QK") else model.QK[0, 0].AB, 4)
results["greedy"] = model.generate(tokens[:1], max_new_tokens=6, do_sample=False, verbose=False)
assert transformer_lens.utils.get_act_name("k", 3) == "blocks.3.attn.hook_k"
