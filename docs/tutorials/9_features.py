# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Find the feature that carries a name, and steer with it
#
# An SAE describes an activation as a few of many features. Put into the model's graph, its features are hook points: they are read,
# edited, baked into a file, and clamped in a browser. Here one of them says "Mary comes next".
#
# ![The live page: a feature of the SAE is set to a number, and Mary is the answer](../pictures/features.png)

# %%
import json
from pathlib import Path

import numpy as np
import onnxruntime

from graphlens import Ablate, HookedTransformer, Patch, Sae, Steer, interventions

model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
sae = Sae.from_pretrained("tiny-gpt2-saes", "blocks.2.hook_resid_post")
acts = "blocks.2.hook_resid_post.hook_sae_acts_post"
print(sae)
assert sae.cfg.d_sae == 512

# %% [markdown]
# ## The SAE in the model
#
# `saes` attaches it. With the error term, what it does not reconstruct is added again, so the model computes what it did.
# Without it the model goes on from the reconstruction alone.

# %%
prompt = "When John and Mary went to the store, John gave a drink to"
tokens = model.to_tokens(prompt)
mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")


def difference(logits):
    return float(logits[0, -1, mary] - logits[0, -1, john])


plain = model(tokens)
logits, cache = model.run_with_cache_with_saes(tokens, saes=sae, use_error_term=True)
rebuilt = model.run_with_saes(tokens, saes=sae)
print(f"Mary - John: plain {difference(plain):.2f}, with error term {difference(logits):.2f}, without {difference(rebuilt):.2f}")
print(cache[acts].shape, "of which at the last token", int((cache[acts][0, -1] > 0).sum()), "are active")
assert np.abs(logits - plain).max() < 1e-4
assert difference(rebuilt) > 5

# %% [markdown]
# ## Which feature is it?
#
# The one that is active at the last token where the answer is Mary, and not where it is somebody else. Each pair of prompts differs
# in who gives.

# %%
FRIENDS = ["Anna", "Lucy", "Emma", "Kate", "Rose", "Jane", "Alice", "Laura", "John", "Tom", "James", "Dan", "Martin", "Paul"]
texts, is_mary = [], []
for friend in FRIENDS:
    for first, second in (("Mary", friend), (friend, "Mary")):
        for giver in (friend, "Mary"):
            texts.append(f"When {first} and {second} went to the park, {giver} gave a book to")
            is_mary.append(giver == friend)
is_mary = np.array(is_mary)
with model.saes(sae, use_error_term=True):
    _, found = model.run_with_cache(model.to_tokens(texts), names_filter=acts)
last = found[acts][:, -1]  # [text, feature]
contrast = last[is_mary].mean(axis=0) - last[~is_mary].mean(axis=0)
feature = int(contrast.argmax())
right = ((last[:, feature] > last[:, feature].max() / 2) == is_mary).mean()
print(f"feature {feature}: {last[is_mary, feature].mean():.2f} where the answer is Mary, {last[~is_mary, feature].mean():.2f} elsewhere")
print(f"it tells {right:.0%} of {len(texts)} texts right")
