"""A notebook on indirect objects: a dataset class, attribution, path patching by hooks, kinds of heads, a minimal circuit."""

from functools import partial

import einops
import torch
from transformer_lens import ActivationCache, HookedTransformer, utils

torch.set_grad_enabled(False)
model = HookedTransformer.from_pretrained(
    "gpt2-small", center_unembed=True, center_writing_weights=True, fold_ln=True, refactor_factored_attn_matrices=True
)
model.set_use_split_qkv_input(True)
model.set_use_attn_result(True)
results = {}
NAMES = [" Mary", " John", " Tom", " James", " Dan", " Anna", " Paul", " Emma", " Kate", " Sarah"]


class IOIDataset:
    """Prompts of one frame in both orders of names, with where each word is."""

    def __init__(self, size, seed, flipped=False):
        generator = torch.Generator().manual_seed(seed)
        self.sentences, self.io, self.s = [], [], []
        for index in range(size):
            first, second, third = (NAMES[i] for i in torch.randperm(len(NAMES), generator=generator)[:3].tolist())
            subject, other = (first, second) if index % 2 else (second, first)
            said = third if flipped else subject
            self.sentences.append(f"When{first} and{second} went to the store,{said} gave a drink to")
            self.io.append(model.to_single_token(other))
            self.s.append(model.to_single_token(subject))
        self.tokens = model.to_tokens(self.sentences)
        self.io, self.s = torch.tensor(self.io), torch.tensor(self.s)
        self.end = torch.full((size,), self.tokens.shape[1] - 1)

    def __len__(self):
        return len(self.sentences)


ioi, abc = IOIDataset(8, seed=0), IOIDataset(8, seed=0, flipped=True)


def difference(logits, data=ioi, per_prompt=False):
    rows = torch.arange(len(data))
    value = logits[rows, data.end, data.io] - logits[rows, data.end, data.s]
    return value if per_prompt else value.mean()


ioi_logits, ioi_cache = model.run_with_cache(ioi.tokens)
abc_logits, abc_cache = model.run_with_cache(abc.tokens)
results["ioi"], results["abc"] = difference(ioi_logits, per_prompt=True), difference(abc_logits, per_prompt=True)
ioi_average, abc_average = difference(ioi_logits), difference(abc_logits)


def score(logits):
    return (difference(logits) - ioi_average) / (ioi_average - abc_average)


def patch_or_freeze(value, hook, new_cache, orig_cache, head):
    value[...] = orig_cache[hook.name][...]
    if head[0] == hook.layer():
        value[:, :, head[1]] = new_cache[hook.name][:, :, head[1]]
    return value


def path_patch_to_end(model, new_cache, orig_cache):
    """From each head to the final residual stream, with every other head frozen."""
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            hook_fn = partial(patch_or_freeze, new_cache=new_cache, orig_cache=orig_cache, head=(layer, head))
            _, patched = model.run_with_cache(
                ioi.tokens,
                names_filter=lambda name: name == utils.get_act_name("resid_post", model.cfg.n_layers - 1),
                return_type=None,
            )
            model.reset_hooks()
            model.add_hook(lambda name: name.endswith("hook_z"), hook_fn)
            _, patched = model.run_with_cache(
                ioi.tokens,
                names_filter=lambda name: name == utils.get_act_name("resid_post", model.cfg.n_layers - 1),
                return_type=None,
            )
            model.reset_hooks()
            final = patched[utils.get_act_name("resid_post", model.cfg.n_layers - 1)]
            scores[layer, head] = score(model.unembed(model.ln_final(final)))
    return scores


results["paths to the end"] = path_patch_to_end(model, abc_cache, ioi_cache)


def patch_input(value, hook, patched_cache, heads):
    for layer, head in heads:
        if layer == hook.layer():
            value[:, :, head] = patched_cache[hook.name][:, :, head]
    return value


def path_patch_to_heads(receivers, receiver_input="q"):
    """From each earlier head to an input of some heads: three runs, the last of them on the receivers alone."""
    layers = {layer for layer, _ in receivers}
    wanted = [utils.get_act_name(receiver_input, layer) for layer in layers]
    scores = torch.zeros(max(layers), model.cfg.n_heads)
    for layer in range(max(layers)):
        for head in range(model.cfg.n_heads):
            hook_fn = partial(patch_or_freeze, new_cache=abc_cache, orig_cache=ioi_cache, head=(layer, head))
            with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_z"), hook_fn)]):
                _, patched = model.run_with_cache(
                    ioi.tokens, names_filter=lambda name: name in wanted, return_type=None
                )
            hook_fn = partial(patch_input, patched_cache=patched, heads=receivers)
            logits = model.run_with_hooks(
                ioi.tokens, fwd_hooks=[(lambda name: name in wanted, hook_fn)], return_type="logits"
            )
            scores[layer, head] = score(logits)
    return scores


results["paths to queries"] = path_patch_to_heads([(3, 0), (3, 2), (2, 1)], "q")
results["paths to values"] = path_patch_to_heads([(3, 0), (2, 3)], "v")
results["paths to keys"] = path_patch_to_heads([(3, 1)], "k")

# Copying scores: what a head's OV circuit makes of a name in the first layer's output.
first = ioi_cache["resid_post", 0][torch.arange(len(ioi)), 2]
written = einops.einsum(model.ln_final(first), model.W_V[3], "b d, h d k -> h b k")
copied = model.unembed(model.ln_final(einops.einsum(written, model.W_O[3], "h b k, h k d -> h b d")))
results["copying"] = copied.log_softmax(-1)[..., 300:310]

# Kinds of heads by where they look, on repeated random tokens.
generator = torch.Generator().manual_seed(3)
half = torch.randint(100, 600, (1, 10), generator=generator)
twice = torch.cat([model.to_tokens(""), half, half], dim=1)
_, twice_cache = model.run_with_cache(twice, names_filter=lambda name: name.endswith("pattern"))
previous = torch.stack(
    [twice_cache["pattern", layer][0].diagonal(-1, dim1=-2, dim2=-1).mean(-1) for layer in range(model.cfg.n_layers)]
)
induction = torch.stack(
    [twice_cache["pattern", layer][0].diagonal(-9, dim1=-2, dim2=-1).mean(-1) for layer in range(model.cfg.n_layers)]
)
results["previous"], results["induction"] = previous, induction

# A circuit: every head outside it is held at its mean over the other dataset.
_, means_cache = model.run_with_cache(abc.tokens, names_filter=lambda name: name.endswith("hook_z"), return_type=None)


def hold_at_mean(value, hook, circuit):
    mean = means_cache[hook.name].mean(0, keepdim=True)
    keep = torch.zeros(model.cfg.n_heads, dtype=torch.bool)
    for layer, head in circuit:
        if layer == hook.layer():
            keep[head] = True
    return torch.where(keep[:, None], value, mean)


best = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads) if (layer + head) % 3]
model.add_hook(lambda name: name.endswith("hook_z"), partial(hold_at_mean, circuit=best), is_permanent=True)
results["circuit"] = difference(model(ioi.tokens), per_prompt=True)
model.reset_hooks()
results["still held"] = difference(model(ioi.tokens), per_prompt=True)
model.reset_hooks(including_permanent=True)
results["whole"] = difference(model(ioi.tokens), per_prompt=True)

results["result"] = ioi_cache["result", 2][:2, -1]
results["split inputs"] = list(ioi_cache["blocks.1.hook_q_input"].shape)
cache_of_one = ActivationCache({name: ioi_cache[name][:1] for name in ioi_cache}, model)
results["of one"] = cache_of_one["resid_post", -1][0, -1]
