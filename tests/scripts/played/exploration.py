"""Exploring a circuit as the field's exploratory demonstration does: attribution of the logit difference, then patching."""

from functools import partial

import einops
import torch
import transformer_lens.patching as patching
import transformer_lens.utils as utils
from transformer_lens import ActivationCache, HookedTransformer

torch.set_grad_enabled(False)
model = HookedTransformer.from_pretrained(
    "gpt2-small", center_unembed=True, center_writing_weights=True, fold_ln=True, refactor_factored_attn_matrices=False
)
results = {}
prompts, answers = [], []
frames = ["When{} and{} went to the store,{} gave a drink to", "When{} and{} went to the park,{} gave a drink to"]
names = [(" Mary", " John"), (" Tom", " James")]
for frame, (first, second) in zip(frames, names, strict=True):
    for subject, other in ((second, first), (first, second)):
        prompts.append(frame.format(first, second, subject))
        answers.append((other, subject))
answer_tokens = torch.tensor([[model.to_single_token(word) for word in pair] for pair in answers])
tokens = model.to_tokens(prompts, prepend_bos=True)
original_logits, cache = model.run_with_cache(tokens)


def logits_to_difference(logits, answer_tokens, per_prompt=False):
    last = logits[:, -1, :]
    both = last.gather(dim=-1, index=answer_tokens)
    difference = both[:, 0] - both[:, 1]
    return difference if per_prompt else difference.mean()


results["difference"] = logits_to_difference(original_logits, answer_tokens, per_prompt=True)
original = logits_to_difference(original_logits, answer_tokens)

directions = model.tokens_to_residual_directions(answer_tokens)
difference_directions = directions[:, 0] - directions[:, 1]
results["directions"] = difference_directions
final = cache["resid_post", -1]
results["scaled"] = cache.apply_ln_to_stack(final[:, -1, :], layer=-1, pos_slice=-1)
results["from the residual stream"] = einops.einsum(
    results["scaled"], difference_directions, "batch d_model, batch d_model ->"
) / len(prompts)


def stack_to_difference(stack, cache: ActivationCache):
    scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
    return einops.einsum(scaled, difference_directions, "... batch d_model, batch d_model -> ...") / len(prompts)


accumulated, labels = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1, return_labels=True)
results["logit lens"], results["lens labels"] = stack_to_difference(accumulated, cache), labels
per_layer, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
results["layers"], results["layer labels"] = stack_to_difference(per_layer, cache), labels
per_head, labels = cache.stack_head_results(layer=-1, pos_slice=-1, return_labels=True)
per_head = stack_to_difference(per_head, cache)
results["heads"], results["head labels"] = per_head.reshape(model.cfg.n_layers, model.cfg.n_heads), labels
results["by heads apart"] = cache.logit_attrs(
    cache.stack_head_results(layer=-1, pos_slice=-1),
    answer_tokens[:, 0],
    incorrect_tokens=answer_tokens[:, 1],
    pos_slice=-1,
)
results["neurons"] = cache.stack_neuron_results(layer=2, pos_slice=-1, neuron_slice=(3, 9))
results["all parts"] = cache.get_full_resid_decomposition(layer=2, pos_slice=-1, expand_neurons=False)

corrupted = [prompts[index + (1 if index % 2 == 0 else -1)] for index in range(len(prompts))]
corrupted_tokens = model.to_tokens(corrupted, prepend_bos=True)
corrupted_logits, corrupted_cache = model.run_with_cache(corrupted_tokens, return_type="logits")
base = logits_to_difference(corrupted_logits, answer_tokens)


def patch_residual_component(component, hook, pos, clean_cache):
    component[:, pos, :] = clean_cache[hook.name][:, pos, :]
    return component


def normalize(difference):
    return (difference - base) / (original - base)


by_hand = torch.zeros(model.cfg.n_layers, tokens.shape[1])
for layer in range(model.cfg.n_layers):
    for position in range(tokens.shape[1]):
        hook_fn = partial(patch_residual_component, pos=position, clean_cache=cache)
        logits = model.run_with_hooks(
            corrupted_tokens, fwd_hooks=[(utils.get_act_name("attn_out", layer), hook_fn)], return_type="logits"
        )
        by_hand[layer, position] = normalize(logits_to_difference(logits, answer_tokens))
results["attention out, by hand"] = by_hand


def metric(logits):
    return normalize(logits_to_difference(logits, answer_tokens))


results["attention out"] = patching.get_act_patch_attn_out(model, corrupted_tokens, cache, metric)
results["resid pre"] = patching.get_act_patch_resid_pre(model, corrupted_tokens, cache, metric)
results["mlp out"] = patching.get_act_patch_mlp_out(model, corrupted_tokens, cache, metric)
results["head out"] = patching.get_act_patch_attn_head_out_all_pos(model, corrupted_tokens, cache, metric)
results["head every"] = patching.get_act_patch_attn_head_all_pos_every(model, corrupted_tokens, cache, metric)
results["pattern"] = patching.get_act_patch_attn_head_pattern_all_pos(model, corrupted_tokens, cache, metric)
generic, frame = patching.generic_activation_patch(
    model,
    corrupted_tokens,
    cache,
    metric,
    patching.layer_pos_patch_setter,
    "resid_mid",
    index_axis_names=("layer", "pos"),
    return_index_df=True,
)
results["generic"], results["frame"] = generic, frame.to_numpy()

results["value-weighted"] = (cache["pattern", 2] * cache["v", 2].norm(dim=-1).permute(0, 2, 1)[:, :, None, :]).amax(
    dim=(0, 2)
)
results["unembedded"] = model.unembed(model.ln_final(final[:, -1:, :]))
