# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Read a model: tokens, attention, logit lens
#
# You need `pip install "graphlens-onnx[cpu]"` and nothing else. The model, `tiny-gpt2`, comes with the package. It has 4 layers
# of 4 heads and was trained to finish sentences such as the one below.
#
# ## Open it and ask it something

# %%
import numpy as np

from graphlens import HookedTransformer, views

model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
prompt = "When John and Mary went to the store, John gave a drink to"
logits, cache = model.run_with_cache(prompt)
print(logits.shape)

# %% [markdown]
# The logits have the axes [batch, position, vocabulary]. There is one prompt, it has 15 tokens, and the vocabulary has 800. The
# row at position -1 says what comes next.

# %%
assert logits.shape == (1, 15, 800)


def likeliest(row, n=3):  # row: [vocabulary]
    probabilities = np.exp(row - row.max())
    probabilities /= probabilities.sum()
    return [(model.to_string([int(i)]), round(float(probabilities[i]), 3)) for i in np.argsort(-row)[:n]]


print(likeliest(logits[0, -1]))
assert likeliest(logits[0, -1], 1) == [(" Mary", 0.994)]

# %% [markdown]
# It says " Mary", and is sure.
#
# ## Tokens have positions
#
# Everything inside the model is per token, so look at the tokens first. Position 0 is a token that begins every text. John is at
# positions 2 and 10, Mary at 4.

# %%
words = model.to_str_tokens(prompt)
print(list(enumerate(words)))
assert (words[2], words[4], words[10], words[14]) == (" John", " Mary", " John", " to")

# %% [markdown]
# ## Every step has a name
#
# `cache` holds every activation of that run under the name of its hook point. A hook point is a named place in the model's
# computation. [Start here](../start.md) explains the names.

# %%
print(len(cache), "activations")
for name in ("hook_embed", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"):
    print(f"{name:28} {cache[name].shape}")
assert len(cache) == 74

# %% [markdown]
# Long names have short forms: `cache["pattern", 1]` is `cache["blocks.1.attn.hook_pattern"]`.
#
# ## Where a head looks
#
# A head's pattern has the axes [batch, head, query, key]: how much the query position reads from the key position. Each row sums
# to 1. Here is where each head of layer 1 looks from the last token.

# %%
pattern = cache["pattern", 1][0]  # [head, query, key]
np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
for head in range(model.cfg.n_heads):
    place = int(pattern[head, -1].argmax())
    print(f"head 1.{head} looks at {words[place]!r}, position {place}: {pattern[head, -1, place]:.3f}")

# %% [markdown]
# Head 1.0 looks at Mary, and head 1.2 at the first John. Both give all their attention to one token.

# %%
assert pattern[0, -1, 4] > 0.99
assert pattern[2, -1, 2] > 0.99

# %% [markdown]
# A notebook shows all heads at once. Pick one; hover a token to see what it looks at.

# %%
views.attention(cache, model.to_tokens(prompt)[0])

# %% [markdown]
# ## What the model would say so far: the logit lens
#
# The residual stream carries the answer from layer to layer. The logit lens applies the last norm and the unembedding to it
# early, and so reads what the model would say if it stopped there.

# %%
for layer in range(model.cfg.n_layers):
    lens = model.unembed(model.ln_final(cache["resid_post", layer]))  # [batch, position, vocabulary]
    print(f"after layer {layer}: {likeliest(lens[0, -1])}")

# %% [markdown]
# After layer 1 both names are there, John nearly as likely as Mary. After layer 2 John is gone. What happened in between is the
# subject of [the next tutorial](2_circuit.py).

# %%
after = [dict(likeliest(model.unembed(model.ln_final(cache["resid_post", layer]))[0, -1])) for layer in range(4)]
assert {" Mary", " John"} <= set(after[1])
assert after[2][" Mary"] > 0.9
assert " John" not in after[2]
np.testing.assert_allclose(model.unembed(model.ln_final(cache["resid_post", 3])), logits, atol=1e-4)

# %% [markdown]
# The last line checks that the lens after the last layer is the model's own output.
#
# The lens at every position, not only the last; hover a cell for its list:

# %%
views.lens(cache, model.to_tokens(prompt)[0], answer=" Mary")

# %% [markdown]
# ## Read less
#
# `names_filter` keeps some activations: a name, a list of names, or a function of the name.

# %%
_, small = model.run_with_cache(prompt, names_filter=lambda name: name.endswith("hook_pattern"))
print(list(small))
assert len(small) == 4

# %% [markdown]
# ## On a model of your own
#
# `HookedTransformer.from_pretrained_no_processing("gpt2")` exports a model from the Hugging Face hub the first time (this needs
# the extra `export`) and opens it from the cache afterwards. A file that another tool exported is
# [adopted](7_the_model_you_deploy.py).
