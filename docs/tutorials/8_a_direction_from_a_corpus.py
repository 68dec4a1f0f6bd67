# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Find a direction in a corpus, probe it, steer with it, bake it
#
# A harvest is the activations of many texts, in a folder. Here it tells where a model keeps the answer "Mary": at which layer,
# and in which direction. A probe says how sure that is, steering whether the model uses it, and baking puts it into a file.
#
# ![The tokens of four documents, and the shards of a harvest that they are written to](../pictures/harvest.svg)

# %%
from pathlib import Path

import numpy as np
import onnxruntime
from rich import print as show

from graphlens import HookedTransformer, LogitDiff, Steer, harvest, sweep
from graphlens.patching import HarvestMean, grid

model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")

# %% [markdown]
# ## A corpus with labels
#
# In each text Mary meets somebody, in either order, and one of the two gives something away. The next word is the other's name.
# The label says whether it is Mary. Five names and five places are kept for the test.

# %%
FRIENDS = ["Anna", "Lucy", "Emma", "Kate", "Rose", "Jane", "Sarah", "Alice", "Amy", "Laura", "Lily", "Nina"]
FRIENDS += ["John", "Tom", "James", "Dan", "Sid", "Martin"]
OTHERS = ["Paul", "Sam", "Ben", "Jack", "Peter"]


def corpus(friends, places):
    texts, labels = [], []
    for friend in friends:
        for place in places:
            for first, second in (("Mary", friend), (friend, "Mary")):
                for giver in (friend, "Mary"):
                    texts.append(f"When {first} and {second} went to the {place}, {giver} gave a drink to")
                    labels.append(giver == friend)
    return texts, np.array(labels)


texts, is_mary = corpus(FRIENDS, ("store", "park", "school"))
test_texts, test_is_mary = corpus(OTHERS, ("beach", "lake", "farm", "river", "zoo"))
print(len(texts), "texts,", len(test_texts), "to test with")
print(texts[0], is_mary[0])
assert (len(texts), len(test_texts)) == (216, 100)

# %% [markdown]
# ## The harvest
#
# The residual stream after each block, at the last token of each text. The graph that runs ends after the last block: no logits
# are computed. A run that is stopped here goes on with `resume=True`.

# %%
names = "*.hook_resid_post"
train = harvest(model, texts, names, "acts", positions="last")
test = harvest(model, test_texts, names, "test", positions="last")
print(train)
print(train["blocks.2.hook_resid_post"].shape, train["blocks.2.hook_resid_post"].dtype)
assert train["blocks.2.hook_resid_post"].shape == (216, 128)
assert model.to_string(train.tokens[:3]) == " to to to"

# %% [markdown]
# ## The direction, layer by layer
#
# `direction` is the mean activation of the texts whose answer is Mary, less that of the others. A probe of kind "mean" goes along
# it: what lies beyond halfway between both means is Mary. `score` tries it on the test texts, whose names and places it was not
# made of, with a 95 % interval that counts texts.

# %%
right = {}
for layer in range(model.cfg.n_layers):
    hook = f"blocks.{layer}.hook_resid_post"
    tried = train.probe(is_mary, hook, kind="mean").score(test, test_is_mary)
    right[layer] = tried.accuracy
    low, high = tried.accuracy_interval
    length = np.linalg.norm(train.direction(is_mary, hook))
    print(
        f"after block {layer}: {tried.accuracy:.0%} right ({low:.0%} to {high:.0%}), length of the direction {length:.2f}"
    )

assert max(right[0], right[1]) < 0.8
assert min(right[2], right[3]) > 0.85

# %% [markdown]
# The last position knows the answer after block 2: that is where the head of [the circuit](2_circuit.py) copies the name. After
# block 0 three of four are right too, from a short direction: attention has seen how often Mary is named.
#
# ## A probe
#
# The difference of means is the simplest probe. Logistic regression looks for the best plane between both kinds instead. It holds
# out whole documents, a fifth of each kind; `groups` keeps all texts of one friend on the same side, since a probe that has seen
# Paul's texts knows Paul.

# %%
friend_of = [friend for friend in FRIENDS for _ in range(3 * 2 * 2)]
probe = train.probe(is_mary, "blocks.2.hook_resid_post", groups=friend_of)
show(probe)
elsewhere = probe.score(test, test_is_mary)
low, high = elsewhere.accuracy_interval
print(f"other names and places: {elsewhere.accuracy:.0%} ({low:.0%} to {high:.0%})")

assert probe.accuracy == 1
assert elsewhere.accuracy > 0.9
assert [probe.test_documents[at : at + 12].mean() for at in range(0, 216, 12)].count(
    1
) == 4  # all twelve of four friends

# %% [markdown]
# All 48 texts that were held out are right, and still the interval begins at a half: they are of four friends, and four are few.
#
# What can be read need not be what the model uses, so the next step is to change it.
#
# ## Steer with it
#
# Mary gives, so the answer is Peter. Along the direction of block 2 it becomes Mary. Neither a random direction of the same
# length nor that of block 0 does this. The probe's own direction moves it less: it was made to tell texts apart, and
# not to say where they are.

# %%
prompt = "When Peter and Mary went to the beach, Mary gave a drink to"
mary, peter = model.to_single_token(" Mary"), model.to_single_token(" Peter")


def steered(layer, vector, coefficient):
    edit = Steer(f"blocks.{layer}.hook_resid_post", vector, coefficient=coefficient, positions=-1)
    logits = model.run_with_interventions(prompt, [edit])[0, -1]
    return model.to_string([int(logits.argmax())]), float(logits[mary] - logits[peter])


direction = train.direction(is_mary, "blocks.2.hook_resid_post")
early = train.direction(is_mary, "blocks.0.hook_resid_post")
random = np.random.default_rng(0).standard_normal(128).astype(np.float32)
random *= np.linalg.norm(direction) / np.linalg.norm(random)
for coefficient in (0.0, 0.5, 1.0, 1.5):
    print(coefficient, steered(2, direction, coefficient))
print("random", steered(2, random, 1.5))
print("block 0", steered(0, early, 1.5))
length = np.linalg.norm(direction)
along = probe.direction * (length / np.linalg.norm(probe.direction))
print("probe", steered(2, along, 1.5), f"cosine {direction @ along / length**2:.2f}")

assert steered(2, direction, 0.0)[0] == " Peter"
assert steered(2, direction, 1.5)[0] == " Mary"
differences = [steered(2, direction, coefficient)[1] for coefficient in (0.0, 0.5, 1.0, 1.5)]
assert differences == sorted(differences)
assert steered(2, random, 1.5)[0] == " Peter"
assert steered(0, early, 1.5)[0] == " Peter"
assert steered(2, random, 1.5)[1] < steered(2, along, 1.5)[1] < steered(2, direction, 1.5)[1]

# %% [markdown]
# ## Bake it
#
# The edit becomes part of an ONNX file, which plain ONNX Runtime runs. All 50 test texts whose
# answer is not Mary now end in Mary.

# %%
edit = Steer("blocks.2.hook_resid_post", direction, coefficient=2.0, positions=-1)
model.bake([edit], "says-mary")
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # errors only: it warns of every optional input
session = onnxruntime.InferenceSession("says-mary/model.onnx", options)


def answer(text):
    (logits,) = session.run(["logits"], {"input_ids": model.to_tokens(text)})
    return logits


changed = [int(answer(text)[0, -1].argmax()) == mary for text in np.array(test_texts)[~test_is_mary]]
print(sum(changed), "of", len(changed), "say Mary;", sorted(path.name for path in Path("says-mary").iterdir()))
np.testing.assert_allclose(answer(prompt), model.run_with_interventions(prompt, [edit]), atol=1e-4)
assert sum(changed) == 50

# %% [markdown]
# ## Means for ablation
#
# The same harvest gives means to ablate with. A head that is set to zero loses also what it does in every text; with its mean at
# each position in its place, it loses only what tells this text from others. (These texts have a word in each place alike, so
# that a position means the same in all.)

# %%
z = harvest(model, texts, "*.attn.hook_z", "z")
heads = grid("z", ("layer", "head"), {"layer": range(model.cfg.n_layers), "head": range(model.cfg.n_heads)})
metric = LogitDiff(" Peter", " Mary")
zero = sweep(model, prompt, heads, "zero", metric, verbose=False)
mean = sweep(model, prompt, heads, HarvestMean(z, by="position"), metric, verbose=False)
print(f"Peter less Mary: {mean.baselines['corrupted']:.1f}")
print("heads to zero:", zero.values.round(1), "heads to their mean:", mean.values.round(1), sep="\n")

answered = float(mean.baselines["corrupted"])
assert np.abs(mean.values[[0, 3]] - answered).max() < 0.5
assert zero.values[0, 2] < 1
assert [tuple(site) for site in np.argwhere(mean.values < 2).tolist()] == [(1, 2), (2, 2)]

# %% [markdown]
# Head 0.2 looked necessary when it was zeroed. Its mean serves as well, so what it does is the same in all texts; no head of
# layers 0 and 3 tells these texts apart. What 1.2 and 2.2 say of this text is necessary: without it the answer is lost, or most
# of it.
#
# ## Statistics instead of activations
#
# A large corpus need not lie on a disk. `reduce` computes on the way: here the tokens at which each neuron is largest, and the
# mean, which `HarvestMean` takes too.

# %%
neurons = harvest(model, texts, "blocks.1.mlp.hook_post", "neurons", reduce=["mean", "top"])
found = neurons.reduced["blocks.1.mlp.hook_post"]
neuron = int(found["top_values"][0].argmax())
places = found["top_tokens"][:5, neuron]
print(f"neuron {neuron}:", [model.to_string([int(token)]) for token in neurons.tokens[places]])
assert found["mean"].shape == (512,)
assert np.all(np.diff(found["top_values"][:, neuron]) <= 0)

# %% [markdown]
# Reference: [harvests](../harvest.md), [sweeps](../patching.md), [what an edit is](../interventions.md).
