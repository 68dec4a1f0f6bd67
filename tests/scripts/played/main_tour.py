"""A first tour, as the field's main demonstration takes it: run, cache, hooks, patching, induction, weights, text."""

import numpy as np
import torch
from transformer_lens import FactoredMatrix, HookedTransformer, utils
from transformer_lens.hook_points import HookPoint

torch.set_grad_enabled(False)
model = HookedTransformer.from_pretrained("gpt2-small")
results = {}

text = "When Mary and John went to the store, John gave a drink to"
tokens = model.to_tokens(text)
logits, cache = model.run_with_cache(tokens, remove_batch_dim=True)
results["loss"] = model(text, return_type="loss")
results["logits"] = logits.log_softmax(-1)
results["pattern"] = cache["pattern", 0, "attn"]
results["names"] = list(cache.keys())
results["str tokens"] = model.to_str_tokens(text)
results["shapes"] = [list(cache[name].shape) for name in cache]


def ablate_head(value, hook: HookPoint):
    value[:, :, 2, :] = 0.0
    return value


results["ablated loss"] = model.run_with_hooks(
    tokens, return_type="loss", fwd_hooks=[(utils.get_act_name("v", 1), ablate_head)]
)

clean = "When Mary and John went to the store, John gave a drink to"
corrupted = "When Mary and John went to the store, Mary gave a drink to"
clean_tokens, corrupted_tokens = model.to_tokens(clean), model.to_tokens(corrupted)


def difference(logits, correct=" Mary", wrong=" John"):
    return logits[0, -1, model.to_single_token(correct)] - logits[0, -1, model.to_single_token(wrong)]


clean_logits, clean_cache = model.run_with_cache(clean_tokens)
results["clean difference"] = difference(clean_logits)
results["corrupted difference"] = difference(model(corrupted_tokens))


def patch_residual(value, hook, position, clean_cache):
    value[:, position, :] = clean_cache[hook.name][:, position, :]
    return value


from functools import partial  # noqa: E402 - where a notebook would have it

patched = torch.zeros(model.cfg.n_layers, clean_tokens.shape[1])
for layer in range(model.cfg.n_layers):
    for position in range(clean_tokens.shape[1]):
        hook = partial(patch_residual, position=position, clean_cache=clean_cache)
        patched[layer, position] = difference(
            model.run_with_hooks(corrupted_tokens, fwd_hooks=[(utils.get_act_name("resid_pre", layer), hook)])
        )
results["patched"] = patched

generator = torch.Generator().manual_seed(1)
random = torch.randint(100, 600, (2, 12), generator=generator)
repeated = torch.cat([torch.full((2, 1), model.tokenizer.bos_token_id), random, random], dim=1)
scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)


def induction(pattern, hook):
    stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - 12)
    scores[hook.layer()] = stripe.mean(dim=(0, 2))


model.run_with_hooks(repeated, return_type=None, fwd_hooks=[(lambda name: name.endswith("pattern"), induction)])
results["induction"] = scores
results["per token loss"] = model(repeated, return_type="loss", loss_per_token=True)

OV = FactoredMatrix(model.W_V[1, 0], model.W_O[1, 0])
results["eigenvalues"] = np.sort(np.abs(OV.eigenvalues.numpy()))
full_OV = model.W_E @ OV @ model.W_U
results["full OV norm"] = full_OV.norm()
results["full OV corner"] = full_OV[:5, :7].AB
results["OV of all heads"] = model.OV.norm()
results["QK of a layer"] = model.QK[2].norm()

results["heads"] = model.all_head_labels()
results["positions"] = model.get_token_position(" John", text)
results["text"] = model.generate("When Mary", max_new_tokens=12, do_sample=False, verbose=False)
results["weights"] = {
    name: float(value.double().norm())
    for name, value in model.state_dict().items()
    if "mask" not in name and "IGNORE" not in name
}.__len__() > 50
results["cfg"] = [
    model.cfg.n_layers,
    model.cfg.d_head,
    model.cfg.d_mlp,
    model.cfg.act_fn,
    model.cfg.n_ctx,
    model.cfg.normalization_type,
    model.cfg.d_vocab,
    model.cfg.model_name,
]

model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 0)
results["no first MLP"] = model(text, return_type="loss")
model.reset_hooks()
results["reset"] = model(text, return_type="loss")

kept = {}


def keep(value, hook):
    hook.ctx["norm"] = float(value.norm())


model.run_with_hooks(text, fwd_hooks=[("ln_final.hook_normalized", keep)])
results["ctx"] = model.hook_dict["ln_final.hook_normalized"].ctx["norm"]
from transformer_lens import ActivationCache  # noqa: E402

results["is a cache"] = isinstance(cache, ActivationCache)
results["stopped"] = model(text, stop_at_layer=2)
results["slice"] = utils.Slice((2, 5)).apply(clean_cache["resid_pre", 1], dim=1)
