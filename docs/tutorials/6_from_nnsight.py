# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Coming from nnsight
#
# nnsight traces a torch model: code inside a `with model.trace(...)` block reads and changes what modules pass on. graphlens
# reads and changes named values of an ONNX graph. This page does six things in both, on one checkpoint, and compares the numbers.
# It needs nnsight and the extra `cpu`.
#
# | | nnsight | graphlens |
# |---|---|---|
# | a place | a module's `.input` or `.output` | a hook point: `blocks.1.hook_resid_post` |
# | inside of attention | what the module computes as a tensor of its own | query, key, scores, pattern, z, by name |
# | reading | `.save()` in a trace | `run_with_cache` |
# | an edit | an assignment in a trace | a Python hook, or a record such as `Ablate` |
# | where it runs | torch | ONNX Runtime; also in Node, C++ and browsers |
#
# ![One layer and its hook points](../pictures/block.svg)

# %%
import warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
from nnsight import LanguageModel
from transformers import AutoTokenizer, GPT2LMHeadModel

from graphlens import Ablate, HookedTransformer, Patch, embedded_model
from graphlens.metrics import LogitDiff

folder = str(embedded_model())
checkpoint = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
theirs = LanguageModel(checkpoint, tokenizer=AutoTokenizer.from_pretrained(folder))
ours = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")

prompt = "When John and Mary went to the store, John gave a drink to"
tokens = ours.to_tokens(prompt)  # [1, 15]; begins with <|endoftext|>, which graphlens and TransformerLens put in front
ids = torch.tensor(tokens)


def close(a, b, atol=1e-4):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol)


# %% [markdown]
# ## 1. Read an activation
#
# The output of block 1 is `blocks.1.hook_resid_post`.

# %%
with torch.no_grad(), theirs.trace(ids):
    residual = theirs.transformer.h[1].output.save()
    logits = theirs.lm_head.output.save()

our_logits, cache = ours.run_with_cache(tokens)
there = residual[0] if isinstance(residual, tuple) else residual
close(there.reshape(1, 15, 128), cache["blocks.1.hook_resid_post"])
close(logits, our_logits)
print("equal: block 1's output and the logits")

# %% [markdown]
# ## 2. Look inside attention
#
# In nnsight the heads' outputs are the input of the output projection, all heads side by side. Here they are `hook_z`, with an
# axis of heads. The pattern has a name too; no module of the torch model passes scores on.

# %%
with torch.no_grad(), theirs.trace(ids):
    z = theirs.transformer.h[1].attn.c_proj.input.save()

close(z.reshape(1, 15, 4, 32), cache["blocks.1.attn.hook_z"])
print(*(cache[name, 1].shape for name in ("z", "pattern", "attn_scores")))

# %% [markdown]
# ## 3. Ablate a head

# %%
with torch.no_grad(), theirs.trace(ids):
    theirs.transformer.h[1].attn.c_proj.input[..., :32] = 0  # head 0 of 4
    without = theirs.lm_head.output.save()

ours_without = ours.run_with_interventions(tokens, [Ablate("blocks.1.attn.hook_z", heads=0)])
close(without, ours_without)
mary, john = ours.to_single_token(" Mary"), ours.to_single_token(" John")
print(f"Mary - John: {float(without[0, -1, mary] - without[0, -1, john]):+.2f} in both")
assert round(float(without[0, -1, mary] - without[0, -1, john]), 2) == 0.26

# %% [markdown]
# The same as a Python hook, for what no record says:


# %%
def ablate(z, hook):  # z: [batch, position, head, d_head]
    z[:, :, 0] = 0


close(ours.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", ablate)]), ours_without)

# %% [markdown]
# ## 4. Patch from another prompt
#
# nnsight runs one prompt after the other. Here `run_with_cache` reads one, and `Patch` puts it into the other.

# %%
other = ours.to_tokens(prompt.replace("John gave", "Mary gave"))
with torch.no_grad(), theirs.trace(torch.tensor(other)):
    source = theirs.transformer.h[1].output.save()
with torch.no_grad(), theirs.trace(ids):
    theirs.transformer.h[1].output[:, 10] = source[:, 10]
    patched = theirs.lm_head.output.save()

_, other_cache = ours.run_with_cache(other)
edit = Patch("blocks.1.hook_resid_post", other_cache["resid_post", 1][:, 10], positions=10)
close(patched, ours.run_with_interventions(tokens, [edit]))
print(f"Mary - John: {float(patched[0, -1, mary] - patched[0, -1, john]):+.2f} in both")

# %% [markdown]
# To patch every layer and position there is `sweep`, which computes only what each patch can change:
# [patching](../patching.md).
#
# ## 5. A gradient

# %%
with theirs.trace(ids):
    hidden = theirs.transformer.h[2].attn.c_proj.input
    hidden.requires_grad_(True)
    out = theirs.lm_head.output
    with (out[0, -1, mary] - out[0, -1, john]).backward():
        gradient = hidden.grad.save()

here = ours.gradients(tokens, LogitDiff(" Mary", " John"), ["blocks.2.attn.hook_z"])["blocks.2.attn.hook_z"]
close(gradient.reshape(1, 15, 4, 32), here, atol=1e-5)
print(f"largest gradient {float(np.abs(here).max()):.3f}, in both")

# %% [markdown]
# ## 6. Generate

# %%
with (
    torch.no_grad(),
    theirs.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None) as tracer,
):
    generated = tracer.result.save()

new = ours.generate(tokens, max_new_tokens=5, do_sample=False, verbose=False, stop_at_eos=False)
print(ours.to_string(new[0, 15:]), "in both")
np.testing.assert_array_equal(generated[:, :20], new)

# %% [markdown]
# ## What has no counterpart
#
# - nnsight reaches every tensor of any torch module. graphlens has the hook points of transformers, and `expose` for any value of
#   a file ([any value of any file](../adopting.md#any-value-of-any-file)).
# - nnsight runs models on NDIF's machines. graphlens runs where ONNX Runtime does.
# - An edit of graphlens can be [baked into the file](3_steering.py) and shipped.
