# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Steer a model, then bake the edit into its file
#
# An edit here is a record: a hook point, a part of it, and what happens to it. The same record runs now, is saved as JSON,
# and is baked into an ONNX file that runs anywhere without graphlens.

# %%
import json
from pathlib import Path

import numpy as np
import onnxruntime

from graphlens import Ablate, HookedTransformer, Scale, Steer, embedded_model, interventions, views
from graphlens.deploy import write_stripped

model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")


def next_words(logits, n=3):
    row = logits[0, -1]
    return [(model.to_string([int(i)]), round(float(row[i]), 1)) for i in np.argsort(-row)[:n]]


# %% [markdown]
# ## A direction
#
# A steering vector is the difference between two activations. This one is the difference at the acting name's position of
# two prompts that differ in it: "Mary instead of John".

# %%
clean = "When John and Mary went to the store, John gave a drink to"
other = clean.replace("John gave", "Mary gave")
_, cache = model.run_with_cache(clean)
_, other_cache = model.run_with_cache(other)
vector = other_cache["resid_pre", 1][0, 10] - cache["resid_pre", 1][0, 10]  # [d_model]
print(vector.shape, f"length {np.linalg.norm(vector):.1f}")
assert vector.shape == (128,)

# %% [markdown]
# ## Add it, more and more
#
# `Steer` adds `coefficient` times the vector at the places that you select. Coefficient 0 changes nothing. Coefficient 1 puts the
# other prompt's activation there, so the answer must nearly be the other prompt's. (Nearly: layer 0 has already carried a
# little of the name elsewhere.)

# %%
mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")


def difference(logits):
    return float(logits[0, -1, mary] - logits[0, -1, john])


steered = {}
for coefficient in (0.0, 0.25, 0.5, 0.75, 1.0):
    edit = Steer("blocks.1.hook_resid_pre", vector, coefficient=coefficient, positions=10)
    logits = model.run_with_interventions(clean, [edit])
    steered[coefficient] = difference(logits)
    print(f"{coefficient:4}: Mary - John {steered[coefficient]:+6.2f}, next {next_words(logits, 1)[0][0]!r}")

assert abs(steered[0.0] - difference(model(clean))) < 1e-4
assert abs(steered[1.0] - difference(model(other))) < 0.02 * 8.41
assert list(steered.values()) == sorted(steered.values(), reverse=True)
assert steered[0.0] > 10
assert steered[1.0] < -8

# %% [markdown]
# The more of it is added, the more the answer turns. Half of it leaves the two names nearly equal.
#
# ## Several edits, one list
#
# The four kinds are `Ablate`, `Patch`, `Steer` and `Scale`. They run together, in order. Head 1.2 writes the first name (see
# [the circuit](2_circuit.py)), so without it John must become less likely.

# %%
edits = [Ablate("blocks.1.attn.hook_z", heads=2), Scale("blocks.2.attn.hook_z", 1.5, heads=2)]
edited = model.run_with_interventions(clean, edits)
print(f"intact {difference(model(clean)):+.2f}, edited {difference(edited):+.2f}")
print(next_words(edited))
assert difference(edited) > difference(model(clean)) + 5
assert next_words(edited, 1)[0][0] == " Mary"

# %% [markdown]
# The logit lens of the edited run shows where the answer is decided: each row is a layer, each column a position.

# %%
_, edited_cache = model.run_with_interventions(clean, edits, names_filter=lambda name: True)
views.lens(edited_cache, model.to_tokens(clean)[0], answer=" Mary", title="Logit lens, with both edits")

# %% [markdown]
# ## While generating
#
# Inside `intervene` every run has the edits, generation too.

# %%
with model.intervene(edits):
    inside = difference(model(clean))
    text = model.generate(clean, max_new_tokens=4, do_sample=False, verbose=False)
print(text)
assert abs(inside - difference(edited)) < 1e-4
assert text.startswith(clean + " Mary")

# %% [markdown]
# ## Save the edits
#
# The file is JSON; arrays lie beside it in safetensors. `interventions.load` and `graphlens bake` read it.

# %%
interventions.save(edits, "edits.json")
print(json.dumps(json.loads(Path("edits.json").read_text()), indent=1))
assert interventions.load("edits.json") == edits

# %% [markdown]
# ## Bake them
#
# `bake` writes a folder whose `model.onnx` has the edits inside. Plain ONNX Runtime runs it.

# %%
model.bake(edits, "edited")  # the same: graphlens bake tiny-gpt2 edits.json -o edited
print(sorted(path.name for path in Path("edited").iterdir()))
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # errors only: it warns of every optional input
session = onnxruntime.InferenceSession("edited/model.onnx", options)
(baked,) = session.run(["logits"], {"input_ids": model.to_tokens(clean)})
print(f"largest difference between baked and edited logits: {np.abs(baked - edited).max():.1e}")
assert np.abs(baked - edited).max() < 1e-4

# %% [markdown]
# These two edits are the same at every position, so they went into the weights. The baked graph has as many nodes as the model
# without hook points, and costs nothing more to run.

# %%
import onnx

write_stripped(embedded_model(), "plain")
nodes = {
    name: len(onnx.load(f"{name}/model.onnx", load_external_data=False).graph.node) for name in ("plain", "edited")
}
print(nodes)
assert nodes["plain"] == nodes["edited"]

# %% [markdown]
# Next: [run that file in Node and in a browser](4_node_and_browser.py). Reference: [interventions](../interventions.md).
