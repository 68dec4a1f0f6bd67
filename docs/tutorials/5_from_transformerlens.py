# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Coming from TransformerLens 2, 3 or 4
#
# The names are the same, and the numbers are. This page runs TransformerLens 3.9 and graphlens side by side on one checkpoint. It
# needs `transformer-lens==3.9.0` and the extras `cpu` and `torch`.
#
# ## Two libraries, one checkpoint

# %%
import warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
import transformer_lens
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoTokenizer, GPT2LMHeadModel

import graphlens
from graphlens.torch import HookedTransformer

folder = str(graphlens.embedded_model())
prompt = "When John and Mary went to the store, John gave a drink to"
ours = HookedTransformer.from_pretrained("tiny-gpt2")

# TransformerLens opens hub names, not folders; so its model is put together from its parts.
checkpoint = GPT2LMHeadModel.from_pretrained(folder)
sizes = {
    name: getattr(ours.cfg, name) for name in ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab")
}
cfg = transformer_lens.HookedTransformerConfig(**sizes, act_fn="gelu_new", normalization_type="LN", device="cpu")
theirs = transformer_lens.HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder))
theirs.load_and_process_state_dict(convert_gpt2_weights(checkpoint, cfg), fold_value_biases=True)
print(sizes)

# %% [markdown]
# `from_pretrained` processes the weights in both (folds norms, centres), `from_pretrained_no_processing` in neither.
#
# ## Every activation

# %%
tokens = ours.to_tokens(prompt)
their_logits, their_cache = theirs.run_with_cache(tokens)
our_logits, our_cache = ours.run_with_cache(tokens)
shared = sorted(set(their_cache) & set(our_cache))
gaps = {name: float((their_cache[name] - our_cache[name]).nan_to_num(0, 0, 0).abs().max()) for name in shared}
worst = max(gaps, key=gaps.get)
print(f"{len(shared)} shared names, largest difference {gaps[worst]:.1e} at {worst}")
assert set(their_cache) <= set(our_cache)
assert gaps[worst] < 5e-5 * max(1, float(their_cache[worst].abs().max()))
assert torch.allclose(their_logits, our_logits, atol=1e-4)

# %% [markdown]
# ## A hook


# %%
def ablate(z, hook):  # z: [batch, pos, head, d_head]
    z[:, :, 0] = 0
    return z


hooks = [("blocks.1.attn.hook_z", ablate)]
there = theirs.run_with_hooks(tokens, fwd_hooks=hooks)
here = ours.run_with_hooks(tokens, fwd_hooks=hooks)
print(f"logits differ by at most {float((there - here).abs().max()):.1e}")
assert torch.allclose(there, here, atol=1e-4)
assert not torch.allclose(here, our_logits, atol=1)

# %% [markdown]
# ## A gradient, with `backward()`

# %%
mary, john = ours.to_single_token(" Mary"), ours.to_single_token(" John")
gradients = []
for model in (theirs, ours):
    kept = {}

    def keep(gradient, hook, kept=kept):
        kept[hook.name] = gradient.detach().clone()

    with model.hooks(bwd_hooks=[("blocks.2.attn.hook_z", keep)]):
        logits = model(tokens)
        (logits[0, -1, mary] - logits[0, -1, john]).backward()
    gradients.append(kept["blocks.2.attn.hook_z"])
print(f"gradients differ by at most {float((gradients[0] - gradients[1]).abs().max()):.1e}")
assert torch.allclose(*gradients, atol=1e-5)
assert float(gradients[0].abs().max()) > 0.01

# %% [markdown]
# ## A script as it is
#
# Without changing a script's imports: put these lines first. Every `import transformer_lens` after them gives graphlens.
#
# ```
# import graphlens.transformer_lens
# graphlens.transformer_lens.install()
# ```
#
# What differs, name by name, is in [the table](../transformerlens.md#the-api). The most common surprises:
#
# - A hook name that does not exist is an error, and so is a hook that would never fire.
# - Weights are not written into; `set_weights` replaces them.
# - A tensor that a hook returns must have the shape and dtype of what it got.
#
# ## TransformerLens 2
#
# Version 3 kept version 2's `HookedTransformer`, hook points and helpers, so a script for 2 runs in the same way. What is
# compared in the tests is 3.9.
#
# ## TransformerLens 4
#
# Version 4 has `TransformerBridge` and other names for hook points. graphlens has that class too. Old and new names mean the same
# tensors.
#
# ![The names of TransformerLens 3.9 and 4 for the same tensors](../pictures/transformerlens4.svg)

# %%
from graphlens.transformer_lens4 import TransformerBridge

bridge = TransformerBridge.boot_transformers("tiny-gpt2")
_, cache = bridge.run_with_cache(prompt)
for new, old in (
    ("blocks.1.attn.q.hook_out", "blocks.1.attn.hook_q"),
    ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
):
    print(f"{new:26} {old:26} {tuple(cache[new].shape)}")
    assert torch.equal(cache[new], cache[old])

plain = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
assert torch.equal(bridge(prompt), plain(prompt))

# %% [markdown]
# `boot_transformers` leaves weights as they are, as version 4 does. More: [TransformerLens 4](../transformerlens4.md), also for
# the other way round, a graphlens file behind TransformerLens 4's own `RemoteBridge`.
#
# ## Without torch
#
# The same model with NumPy arrays in and out; import `HookedTransformer` from `graphlens` instead.

# %%
numpy_model = graphlens.HookedTransformer.from_pretrained("tiny-gpt2")
array = numpy_model(prompt)
print(type(array).__name__, array.shape)
np.testing.assert_allclose(array, our_logits.detach().numpy(), atol=1e-5)
