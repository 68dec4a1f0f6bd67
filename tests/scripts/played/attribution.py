"""Attribution patching by backward hooks and by a cache of gradients, as its demonstration does."""

import torch
from transformer_lens import ActivationCache, HookedTransformer

model = HookedTransformer.from_pretrained("gpt2-small")
model.set_use_attn_result(True)
results = {}
prompts = [
    "When Mary and John went to the store, John gave a drink to",
    "When Tom and James went to the park, James gave a drink to",
]
others = [
    "When Mary and John went to the store, Mary gave a drink to",
    "When Tom and James went to the park, Tom gave a drink to",
]
answers = torch.tensor(
    [
        [model.to_single_token(" Mary"), model.to_single_token(" John")],
        [model.to_single_token(" Tom"), model.to_single_token(" James")],
    ]
)
clean, corrupted = model.to_tokens(prompts), model.to_tokens(others)


def difference(logits):
    last = logits[:, -1].gather(1, answers)
    return (last[:, 0] - last[:, 1]).mean()


clean_logits, corrupted_logits = model(clean), model(corrupted)
best, worst = difference(clean_logits).item(), difference(corrupted_logits).item()


def metric(logits):
    return (difference(logits) - worst) / (best - worst)


def kept(name):
    return not name.endswith(("_input", "attn_in", "mlp_in", "hook_tokens"))


def cache_both_ways(model, tokens, metric):
    model.reset_hooks()
    cache, gradients = {}, {}

    def forward(value, hook):
        cache[hook.name] = value.detach()

    def backward(value, hook):
        gradients[hook.name] = value.detach()

    model.add_hook(kept, forward, "fwd")
    model.add_hook(kept, backward, "bwd")
    value = metric(model(tokens))
    value.backward()
    model.reset_hooks()
    return value.item(), ActivationCache(cache, model), ActivationCache(gradients, model)


clean_value, clean_cache, clean_gradients = cache_both_ways(model, clean, metric)
corrupted_value, corrupted_cache, corrupted_gradients = cache_both_ways(model, corrupted, metric)
results["values"] = [clean_value, corrupted_value]
results["resid pre"] = torch.stack(
    [
        (
            corrupted_gradients["resid_pre", layer]
            * (clean_cache["resid_pre", layer] - corrupted_cache["resid_pre", layer])
        ).sum((0, 2))
        for layer in range(model.cfg.n_layers)
    ]
)
results["heads"] = torch.stack(
    [
        (corrupted_gradients["z", layer] * (clean_cache["z", layer] - corrupted_cache["z", layer])).sum((0, 1, 3))
        for layer in range(model.cfg.n_layers)
    ]
)
results["patterns"] = torch.stack(
    [clean_gradients["pattern", layer] * clean_cache["pattern", layer] for layer in range(4)]
)
results["results"] = corrupted_gradients["result", 3].sum((0, 1))
results["queries"] = corrupted_gradients["q", 2]

with torch.enable_grad():
    logits, with_gradients = model.run_with_cache(clean[:1], incl_bwd=False)
_, both = model.run_with_cache(clean[:1], return_type="loss", incl_bwd=True)
results["gradient names"] = sorted(name for name in both if name.endswith("_grad"))[:5]
results["loss gradient"] = both["blocks.1.hook_resid_post_grad"]

grads = {}
with model.hooks(bwd_hooks=[("blocks.2.hook_mlp_out", lambda value, hook: grads.update(one=value.clone()))]):
    model(clean, return_type="loss").backward()
results["one gradient"] = grads["one"]
