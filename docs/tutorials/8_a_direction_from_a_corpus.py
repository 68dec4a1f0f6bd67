# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Find a direction in a corpus, then steer with it
#
# A harvest is the activations of many texts, in a folder. Here it tells where a model keeps the answer "Mary": at which layer,
# and in which direction.
#
# ![The tokens of four documents, and the shards of a harvest that they are written to](../pictures/harvest.svg)

# %%
import numpy as np

from graphlens import HookedTransformer, Steer, harvest

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
# `direction` is the mean activation of the texts whose answer is Mary, less that of the others. How far a text lies along it says
# what the answer is, if the layer knows. The threshold is halfway between both means, and the test texts have names and places
# that the direction was not made of.

# %%
right = {}
for layer in range(model.cfg.n_layers):
    hook = f"blocks.{layer}.hook_resid_post"
    direction = train.direction(is_mary, hook)  # [d_model]
    along, test_along = train[hook][:] @ direction, test[hook][:] @ direction
    halfway = (along[is_mary].mean() + along[~is_mary].mean()) / 2
    right[layer] = float(((test_along > halfway) == test_is_mary).mean())
    print(f"after block {layer}: {right[layer]:.0%} of the test texts right, length {np.linalg.norm(direction):.2f}")

assert max(right[0], right[1]) < 0.8
assert min(right[2], right[3]) > 0.85

# %% [markdown]
# The last position knows the answer after block 2: that is where the head of [the circuit](2_circuit.py) copies the name. After
# block 0 three of four are right too, from a short direction: attention has seen how often Mary is named. What can be read
# need not be what the model uses, so the next step is to change it.
#
# ## Steer with it
#
# Mary gives, so the answer is Peter. Along the direction of block 2 it becomes Mary. Neither a random direction of the same
# length nor that of block 0 does this.

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

assert steered(2, direction, 0.0)[0] == " Peter"
assert steered(2, direction, 1.5)[0] == " Mary"
differences = [steered(2, direction, coefficient)[1] for coefficient in (0.0, 0.5, 1.0, 1.5)]
assert differences == sorted(differences)
assert steered(2, random, 1.5)[0] == " Peter"
assert steered(0, early, 1.5)[0] == " Peter"

# %% [markdown]
# ## Statistics instead of activations
#
# A large corpus need not lie on a disk. `reduce` computes on the way: here the mean, which is what mean ablation puts in, and
# the tokens at which each neuron is largest.

# %%
neurons = harvest(model, texts, "blocks.1.mlp.hook_post", "neurons", reduce=["mean", "top"])
found = neurons.reduced["blocks.1.mlp.hook_post"]
neuron = int(found["top_values"][0].argmax())
places = found["top_tokens"][:5, neuron]
print(f"neuron {neuron}:", [model.to_string([int(token)]) for token in neurons.tokens[places]])
assert found["mean"].shape == (512,)
assert np.all(np.diff(found["top_values"][:, neuron]) <= 0)

# %% [markdown]
# Reference: [harvests](../harvest.md).
