"""In the manner of a notebook about the IOI circuit: a data set, types of heads, path patching, and a circuit by mean ablation.

It has ``model`` and ``results`` from tests/scripts/run.py.
"""

from functools import partial

import torch
from transformer_lens import HookedTransformer, utils
from transformer_lens.evals import IOIDataset, induction_loss, ioi_eval, sanity_check
from transformer_lens.head_detector import detect_head
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import filter_dict_by_prefix, get_attention_mask, to_numpy

torch.set_grad_enabled(False)
assert isinstance(model, HookedTransformer)

# The data set: names in both orders, and the same prompts with other names
templates = ["When [A] and [B] went to the [PLACE], [B] gave a drink to [A]"]
data = IOIDataset(
    model.tokenizer,
    templates=templates,
    names=["John", "Mary", "Tom", "Anna"],
    nouns={"PLACE": ["store"]},
    num_samples=12,
    symmetric=True,
    seed=3,
)
results["prompts"] = torch.stack([item["prompt"] for item in data])
scores = ioi_eval(model, dataset=data, batch_size=5)
results["scores"] = [scores["Logit Difference"], scores["Accuracy"]]
results["sanity"] = sanity_check(model)

tokens = results["prompts"][:, :-1]
io = torch.stack([item["IO"][0] for item in data])
subject = torch.stack([item["S"][0] for item in data])
other = tokens.roll(1, 0)  # of each pair the prompt with its names exchanged, or of its neighbour
rows = torch.arange(len(tokens))


def logit_diff(logits):
    return (logits[rows, -1, io] - logits[rows, -1, subject]).mean()


clean_logits, clean = model.run_with_cache(tokens)
_, corrupted = model.run_with_cache(other, names_filter=lambda name: name.endswith(("hook_z", "resid_pre")))
results["clean"] = logit_diff(clean_logits)

# Types of heads
prompt = "When John and Mary went to the store, John gave a drink to Mary"
for kind in ("previous_token_head", "duplicate_token_head", "induction_head"):
    results[kind] = detect_head(model, prompt, kind, exclude_bos=True)
    results[f"{kind}_abs"] = detect_head(model, prompt, kind, error_measure="abs")
end_to_io = []
for layer in range(model.cfg.n_layers):
    pattern = clean["pattern", layer][:, :, -1]
    first = (tokens == io[:, None]).int().argmax(-1)
    end_to_io.append(pattern[rows, :, first].mean(0))
results["movers"] = torch.stack(end_to_io)


# Path patching: what a head sends straight to the end
def patch_head(z, hook: HookPoint, head, cache):
    z[:, :, head] = cache[hook.name][:, :, head]
    return z


def freeze(z, hook: HookPoint, cache):
    z[...] = cache[hook.name]
    return z


direct = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
final = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
for layer in range(model.cfg.n_layers):
    for head in range(model.cfg.n_heads):
        model.reset_hooks()
        model.add_hook(lambda name: name.endswith("hook_z"), partial(freeze, cache=clean))
        model.add_hook(utils.get_act_name("z", layer), partial(patch_head, head=head, cache=corrupted))
        _, sent = model.run_with_cache(tokens, names_filter=final)
        model.reset_hooks()
        patched = model.unembed(model.ln_final(sent[final]))
        direct[layer, head] = logit_diff(patched) - results["clean"]
results["direct"] = direct

# A circuit: all heads but a few give their mean
means = {name: value.mean(0, keepdim=True) for name, value in clean.items() if name.endswith("hook_z")}
keep = [divmod(index, model.cfg.n_heads) for index in direct.flatten().topk(4, largest=False).indices.tolist()]
results["kept"] = keep


def ablate(z, hook: HookPoint):
    out = means[hook.name].expand_as(z).clone()
    for head in (head for layer, head in keep if layer == hook.layer()):
        out[:, :, head] = z[:, :, head]
    return out


with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_z"), ablate)]):
    results["circuit"] = logit_diff(model(tokens))
    results["loss"] = model(tokens, return_type="loss")

# Helpers
weights = filter_dict_by_prefix(dict(model.named_parameters()), "blocks.1.attn")
results["W_O"] = to_numpy(weights["W_O"])
results["mask"] = get_attention_mask(model.tokenizer, tokens, prepend_bos=True)
torch.manual_seed(0)
results["sampled"] = utils.sample_logits(clean_logits[:, -1], top_k=5, temperature=0.7)
assert callable(induction_loss)
