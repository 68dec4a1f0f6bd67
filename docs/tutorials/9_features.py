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
# An SAE describes an activation as a few of many features. Put into the model's graph, its features are hook points: they are
# read, edited, baked into a file, and clamped in a browser. Here one of them says "Rose comes next".
#
# ![The live page: a feature of the SAE is set to a number, and Rose is the answer](../pictures/features.png)

# %%
from pathlib import Path

import numpy as np
import onnxruntime

import graphlens
from graphlens import Ablate, HookedTransformer, Patch, Sae, Steer, embedded_model, interventions
from graphlens.deploy import write_drivable
from graphlens.edits.spliced_sae import SplicedSae

model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
sae = Sae.from_pretrained("tiny-gpt2-saes", "blocks.2.hook_resid_post")
acts = "blocks.2.hook_resid_post.hook_sae_acts_post"
print(sae)
assert sae.cfg.k == 8

# %% [markdown]
# ## The SAE in the model
#
# `add_sae` attaches it, and `run_with_saes` does so for one run. With the error term, what it does not reconstruct is added
# again, so that the model computes what it did. Without it the model goes on from the reconstruction alone.

# %%
prompt = "When John and Rose went to the store, John gave a drink to"
tokens = model.to_tokens(prompt)
rose, john, peter = (model.to_single_token(name) for name in (" Rose", " John", " Peter"))


def difference(logits, other=john):
    return float(logits[0, -1, rose] - logits[0, -1, other])


plain, rebuilt = model(tokens), model.run_with_saes(tokens, saes=sae)
model.add_sae(sae, use_error_term=True)
logits, cache = model.run_with_cache(tokens)
print(
    f"Rose - John: {difference(plain):.2f}, with error term {difference(logits):.2f}, without {difference(rebuilt):.2f}"
)
print(cache[acts].shape, "of which at the last token", int((cache[acts][0, -1] > 0).sum()), "are active")
assert np.abs(logits - plain).max() < 1e-4
assert difference(rebuilt) > 5
assert cache[acts].shape == (1, 15, sae.cfg.d_sae)

# %% [markdown]
# ## Which feature is it?
#
# The one that is active at the last token where the answer is Rose, and not where it is somebody else. Two texts each differ
# only in who gives.

# %%
FRIENDS = [
    "Anna",
    "Lucy",
    "Emma",
    "Kate",
    "Mary",
    "Jane",
    "Alice",
    "Laura",
    "John",
    "Tom",
    "James",
    "Dan",
    "Martin",
    "Paul",
]
texts, is_rose = [], []
for friend in FRIENDS:
    for first, second in (("Rose", friend), (friend, "Rose")):
        for giver in (friend, "Rose"):
            texts.append(f"When {first} and {second} went to the park, {giver} gave a book to")
            is_rose.append(giver == friend)
is_rose = np.array(is_rose)
_, found = model.run_with_cache(model.to_tokens(texts), names_filter=acts)
last = found[acts][:, -1]  # [text, feature]
yes, no = last[is_rose].mean(axis=0), last[~is_rose].mean(axis=0)
feature = int((yes - no).argmax())
right = ((last[:, feature] > last[:, feature].max() / 2) == is_rose).mean()
print(f"feature {feature}: {yes[feature]:.1f} where the answer is Rose, {no[feature]:.1f} elsewhere")
print(f"more than half of its largest: right of {right:.0%} of {len(texts)} texts")
assert right > 0.95
assert yes[feature] > 3 * no[feature]

# %% [markdown]
# What does it write? Its decoder row, through the final norm's weight and the unembedding, raises these tokens most.

# %%
raised = sae.W_dec[feature] * model.weights["ln_final.w"] @ model.weights["unembed.W_U"]
print([model.to_string([int(token)]) for token in np.argsort(-raised)[:3]])
assert raised.argmax() == rose

# %% [markdown]
# ## Without it
#
# Ablating one feature of the eight at the last token takes most of Rose's lead away. The others change the answer less.

# %%
active = [int(each) for each in np.flatnonzero(cache[acts][0, -1])]
left = {each: difference(model.run_with_interventions(tokens, Ablate(acts, dims=each))) for each in active}
for each, value in sorted(left.items(), key=lambda pair: pair[1]):
    print(f"without feature {each:3}: Rose - John {value:+.2f}")
assert min(left, key=left.get) == feature
assert left[feature] < difference(plain) / 2

# %% [markdown]
# ## Steer with it
#
# Rose gives here, so the answer is Peter. `Patch` sets the feature to a number, at the last token. (`Steer` would add to it,
# and `Scale` multiply it.)

# %%
other = model.to_tokens("When Peter and Rose went to the beach, Rose gave a drink to")
steered = {}
for value in (0.0, 10.0, 20.0, 30.0):
    edit = Patch(acts, value, dims=feature, positions=-1)
    logits = model.run_with_interventions(other, edit)
    steered[value] = difference(logits, peter)
    print(
        f"set to {value:4}: Rose - Peter {steered[value]:+6.2f}, next {model.to_string([int(logits[0, -1].argmax())])!r}"
    )
assert list(steered.values()) == sorted(steered.values())
assert steered[0.0] < -5
assert logits[0, -1].argmax() == rose

# %% [markdown]
# ## Bake it
#
# The file has the SAE inside, and its weights beside the model's. Any ONNX Runtime runs it.

# %%
model.reset_saes()
inside = SplicedSae.of(sae, error_term=True)
interventions.save(edit, "edits.json")
graphlens.bake_model(embedded_model(), edit, "baked", saes=inside)
print(sorted(path.name for path in Path("baked").iterdir()))
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # errors only: it warns of every optional input
(baked,) = onnxruntime.InferenceSession("baked/model.onnx", options).run(["logits"], {"input_ids": other})
print(f"largest difference between baked and steered logits: {np.abs(baked - logits).max():.1e}")
assert np.abs(baked - logits).max() < 1e-4

# %% [markdown]
# On a terminal: `graphlens bake tiny-gpt2 edits.json --sae tiny-gpt2-saes/blocks.2.hook_resid_post --error-term -o baked`.
#
# Where the features themselves need not be read, a plain `Steer` along the feature's decoder row is enough, and needs no SAE in
# the file.

# %%
row = Steer("blocks.2.hook_resid_post", 30.0 * sae.W_dec[feature], positions=-1)
along = model.run_with_interventions(other, row)
print(f"along the row: Rose - Peter {difference(along, peter):+.2f}")
assert abs(difference(along, peter) - steered[30.0]) < 3
assert along[0, -1].argmax() == rose

# %% [markdown]
# ## In a browser
#
# A drivable file has inputs for its features, which JavaScript feeds in the same way ([drivable files](../drivable.md)). They
# are tried here from Python.

# %%
write_drivable(embedded_model(), acts, "driven", kinds=["patch"], saes=inside)
session = onnxruntime.InferenceSession("driven/model.onnx", options)
where = np.zeros((1, other.shape[1], sae.cfg.d_sae), bool)
where[0, -1, feature] = True
for value in (0.0, 30.0):
    feeds = {"input_ids": other, f"{acts}/where": where, f"{acts}/patch": np.full((1, 1, 1), value, np.float32)}
    (driven,) = session.run(["logits"], feeds)
    print(f"driven to {value:4}: Rose - Peter {difference(driven, peter):+6.2f}")
    assert abs(difference(driven, peter) - steered[value]) < 1e-4

# %% [markdown]
# A page to play with is ready-made:
#
# ```bash
# graphlens page tiny-gpt2 --sae tiny-gpt2-saes/blocks.2.hook_resid_post -o site
# python -m http.server -d site
# ```
#
# It lists the features at the chosen token with the tokens that they write for. Choose the one that writes for Rose, set it to
# 30, and see the answer change; *Copy edits as JSON* gives the file that `graphlens bake` took above. The picture at the top
# shows it.
# ([The live page](../live-page.md))
