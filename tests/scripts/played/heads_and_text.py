"""Kinds of heads, text, generation, the parts of a model by themselves, and small utilities."""

import torch
from transformer_lens import HookedTransformer, utils
from transformer_lens.head_detector import detect_head
from transformer_lens.SVDInterpreter import SVDInterpreter

torch.set_grad_enabled(False)
model = HookedTransformer.from_pretrained("gpt2-small")
results = {}
text = "When Mary and John went to the store, John gave a drink to Mary. When Mary and John went to the park"
for kind in ("previous_token_head", "duplicate_token_head", "induction_head"):
    for measure in ("mul", "abs"):
        results[f"{kind} {measure}"] = detect_head(model, text, kind, error_measure=measure)
results["excluding"] = detect_head(model, text, "induction_head", exclude_bos=True, exclude_current_token=True)
size = model.to_tokens(text).shape[1]
results["own pattern"] = detect_head(model, text, torch.tril(torch.ones(size, size)).triu(-1), heads=[(0, 1), (2, 3)])

tokens = model.to_tokens(["When Mary", "When Mary and John went to"])
results["padded"] = tokens
results["left padded"] = model.to_tokens(["When Mary", "When Mary and John went to"], padding_side="left")
results["without BOS"] = model.to_tokens("When Mary", prepend_bos=False)
results["string"] = model.to_string(tokens)
results["pieces"] = model.to_str_tokens(tokens[1], prepend_bos=False)
results["single"] = [model.to_single_token(" John"), model.to_single_str_token(337)]
results["greedy"] = model.generate(tokens[1:], max_new_tokens=8, do_sample=False, verbose=False)
results["greedy, tokens back"] = model.generate(
    "When Mary", max_new_tokens=5, temperature=0.0, return_type="tokens", verbose=False
)
results["without a cache"] = model.generate(
    "When Tom", max_new_tokens=6, do_sample=False, use_past_kv_cache=False, verbose=False
)
results["batch"] = model.generate(
    ["When Mary", "When Tom and James went to"], max_new_tokens=5, do_sample=False, padding_side="left", verbose=False
)
with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda value, hook: value + 0.3)]):
    results["steered"] = model.generate("When Mary", max_new_tokens=6, do_sample=False, verbose=False)
results["tokenizer"] = [
    model.tokenizer.bos_token_id,
    model.tokenizer.encode(" John"),
    model.tokenizer.decode([337, 333]),
    model.tokenizer(["When Mary", "Tom"], padding=True, return_tensors="pt")["input_ids"].tolist(),
    model.tokenizer.convert_tokens_to_ids(model.tokenizer.tokenize(" Mary")),
    len(model.tokenizer),
]

residual, _, _, _ = model.input_to_embed(tokens[1:])
results["embedded"] = residual
results["embed"] = model.embed(tokens)
results["pos_embed"] = model.pos_embed(tokens)
results["a block"] = model.blocks[1](residual)
results["attention"] = model.blocks[0].attn(residual, residual, residual)
results["an MLP"] = model.blocks[0].mlp(residual)
results["a norm"] = model.blocks[2].ln1(residual)
results["the end"] = model.unembed(model.ln_final(residual))
results["from layer 2"] = model(residual, start_at_layer=2)

results["loss"] = utils.lm_cross_entropy_loss(model(tokens), tokens)
results["accuracy"] = utils.lm_accuracy(model(tokens), tokens)
results["names"] = [
    utils.get_act_name(*one) for one in (("k", 6, "a"), ("resid_pre", 2), ("scale", 4, "ln1"), ("pre", 2))
]
results["gelu"] = utils.gelu_new(torch.linspace(-3, 3, 9))
results["offset"] = (
    utils.get_offset_position_ids(0, torch.tensor([[0, 0, 1, 1]]))
    if hasattr(utils, "get_offset_position_ids")
    else torch.tensor([[0, 0, 0, 1]])
)
results["mask"] = utils.get_attention_mask(model.tokenizer, tokens, True)
results["corner"] = utils.get_corner(model.W_E, 3)
results["sampled greedily"] = utils.sample_logits(model(tokens)[:, -1], temperature=0.0)
results["filtered"] = sorted(utils.filter_dict_by_prefix({"a.b": 1, "a.c": 2, "b": 3}, "a"))
results["keys"] = utils.transpose(torch.arange(6).reshape(2, 3))
results["composition"] = model.all_composition_scores("V")
results["bias"] = model.accumulated_bias(3, mlp_input=True)
svd = SVDInterpreter(model)
for kind in ("OV", "w_in", "w_out"):
    vectors = svd.get_singular_vectors(kind, layer_index=1, num_vectors=3, head_index=2 if kind == "OV" else None)
    results[f"singular {kind}"] = vectors.abs().sum(0)
prompt = utils.test_prompt(
    "When Mary and John went to the store, John gave a drink to", " Mary", model, print_details=False
)
results["prompt"] = prompt is None
