# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Find a circuit: who gets the drink?
#
# "When John and Mary went to the store, John gave a drink to" ends in " Mary": the one who did not act. The task is called
# indirect object identification (Wang et al. 2022). This tutorial finds the heads of `tiny-gpt2` that solve it, with three tools
# that answer different questions:
#
# - **patching**: what carries the difference between two prompts?
# - **ablation**: what is needed at all?
# - **attribution**: what would patching find, estimated from one gradient?

# %%
import numpy as np

from graphlens import Ablate, HookedTransformer, views
from graphlens.attribution import (
    attribution_patch,
    circuit,
    compare_with_sweep,
    direct_logit_attribution,
    edge_attribution,
    faithfulness,
)
from graphlens.metrics import LogitDiff
from graphlens.patching import get_act_patch_resid_pre, grid, path_patch, sweep

np.set_printoptions(precision=2, suppress=True)
model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
clean = "When John and Mary went to the store, John gave a drink to"
corrupted = "When John and Mary went to the store, Mary gave a drink to"

# %% [markdown]
# ## One number for the question
#
# The two prompts differ in one token, who acts. The metric is the logit of " Mary" minus that of " John" at the last position.

# %%
metric = LogitDiff(" Mary", " John")
clean_logits, clean_cache = model.run_with_cache(clean)
mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")


def difference(logits):
    return float(logits[0, -1, mary] - logits[0, -1, john])


print(f"clean {difference(clean_logits):+.2f}, corrupted {difference(model(corrupted)):+.2f}")
assert round(difference(clean_logits), 2) == 10.11
assert round(difference(model(corrupted)), 2) == -8.41

# %% [markdown]
# `metric.normalised()` is 0 for the corrupted prompt and 1 for the clean one, so that values read as "share restored".
#
# ## Where is the information? Patch the residual stream
#
# Run the corrupted prompt, and put the clean run's residual stream in at one layer and one position. What comes back of the
# answer? Each row is a layer, each column a position.

# %%
words = model.to_str_tokens(clean)
restored = get_act_patch_resid_pre(model, model.to_tokens(corrupted), clean_cache, metric.normalised())
print(restored)

# %% [markdown]
# Before layers 0, 1 and 2 everything is at position 10, the name that acts. Before layer 3 everything is at position 14, the last
# token. So something in layer 2 moves it.

# %%
assert np.allclose(restored[:3, 10], 1, atol=0.02)
assert restored[3, 14] > 0.98
assert abs(restored[3, 10]) < 0.02

# %% [markdown]
# ## Which head moves it? Patch every head

# %%
heads = grid("z", ("layer", "head"), {"layer": range(model.cfg.n_layers), "head": range(model.cfg.n_heads)})
patched = sweep(model, corrupted, heads, clean_cache, metric.normalised(), verbose=False)
patched

# %% [markdown]
# One head does: 2.2, head 2 of layer 2. It restores all of the answer, and no other head restores more than 5 %.

# %%
print(patched.values)
best = np.unravel_index(np.abs(patched.values).argmax(), patched.shape)
assert best == (2, 2)
assert patched.values[2, 2] > 1
assert np.sort(np.abs(patched.values).ravel())[-2] < 0.05

# %% [markdown]
# ## The same from one gradient
#
# Attribution patching estimates all 16 patches at once: the difference between the two runs times the gradient. On a large model
# this is the cheap first look. Here it finds the same head, and 86 % of its effect.

# %%
estimated = attribution_patch(model, corrupted, heads, clean_cache, metric.normalised())
print(compare_with_sweep(estimated, patched, n=3))
share = float(estimated.values[2, 2] / patched.values[2, 2])
assert np.unravel_index(np.abs(estimated.values).argmax(), estimated.shape) == (2, 2)
assert round(share, 2) == 0.86

# %% [markdown]
# ## What is needed at all? Ablate every head
#
# Patching shows what differs between two prompts. Both contain the same two names in the same places, so a head that fetches a
# name does the same in both and stays invisible. Ablation asks the other question: set a head's output to zero in the clean run.

# %%
ablated = sweep(model, clean, heads, "zero", metric, verbose=False)
ablated

# %%
print(ablated.values)
needed = [(int(layer), int(head)) for layer, head in np.argwhere(ablated.values < 1)]
print("the answer is lost without", needed)
assert needed == [(0, 2), (1, 0), (2, 2)]
raised = np.unravel_index(ablated.values.argmax(), ablated.shape)
assert raised == (1, 2)

# %% [markdown]
# Without 0.2, 1.0 or 2.2 the answer is lost. Without 1.2 it becomes *clearer*: that head works for the other name.
#
# ## What each head writes
#
# Direct logit attribution splits the metric into what each component writes into the logits. The parts add up to the whole.

# %%
direct = direct_logit_attribution(model, clean, metric)
parts = dict(zip(direct.labels["component"], direct.values, strict=True))
assert abs(sum(parts.values()) - difference(clean_logits)) < 1e-3
for name, value in sorted(parts.items(), key=lambda item: -abs(item[1]))[:6]:
    print(f"{name:10} {value:+.2f}")
direct

# %% [markdown]
# Three heads stand out: 1.0 writes +4.89, 2.2 writes +4.48, and 1.2 writes -4.40. See where they look from the last token:

# %%
assert [round(float(parts[name]), 2) for name in ("L1H0", "L2H2", "L1H2")] == [4.89, 4.48, -4.4]
for layer, head in ((1, 0), (1, 2), (2, 2)):
    row = clean_cache["pattern", layer][0, head, -1]
    place = int(row.argmax())
    print(f"{layer}.{head} looks at {words[place]!r}, position {place}: {row[place]:.2f}")
places = [int(clean_cache["pattern", layer][0, head, -1].argmax()) for layer, head in ((1, 0), (1, 2), (2, 2))]
assert places == [4, 2, 10]

# %% [markdown]
# Now the mechanism can be read off:
#
# 1. Head 1.0 looks at the second name and writes it: Mary.
# 2. Head 1.2 looks at the first name and writes it: John.
# 3. Head 2.2 looks at the name that acts and takes it away. That was what the two prompts differ in.
#
# A hypothesis is worth what it predicts. If it is true, then without 2.2 both names must be equally likely, and without 1.2 the
# logit of John must fall while Mary's stays.

# %%
without_22 = model.run_with_interventions(clean, [Ablate("blocks.2.attn.hook_z", heads=2)])
without_12 = model.run_with_interventions(clean, [Ablate("blocks.1.attn.hook_z", heads=2)])
for name, logits in (("intact", clean_logits), ("without 2.2", without_22), ("without 1.2", without_12)):
    print(f"{name:12} Mary {logits[0, -1, mary]:6.2f}   John {logits[0, -1, john]:6.2f}")
assert abs(difference(without_22)) < 0.05
assert without_12[0, -1, john] < clean_logits[0, -1, john] - 7
assert abs(without_12[0, -1, mary] - clean_logits[0, -1, mary]) < 1.5

# %% [markdown]
# It holds.
#
# ## Directly, or through later layers?
#
# Path patching changes what a head sends along one path only. Along the direct path to the logits 2.2 restores half; the rest
# goes through the MLPs of layers 2 and 3, which make the answer sharper.

# %%
to_logits = path_patch(model, corrupted, clean_cache, metric.normalised(), verbose=False)
print(f"2.2 straight to the logits: {to_logits.values[2, 2]:.0%}")
assert round(float(to_logits.values[2, 2]), 2) == 0.51

# %% [markdown]
# ## The circuit as a graph
#
# Edge attribution scores all 479 edges between components. The best ten, alone, give back the whole difference between the
# two prompts: every edge outside carries what the corrupted run sent.

# %%
scores = edge_attribution(model, corrupted, clean_cache, metric)
circuits = {n: circuit(scores, n) for n in (5, 10, 20, 479)}
curve = faithfulness(model, corrupted, clean_cache, metric.normalised(), circuits)
for n, share in zip(circuits, curve.values, strict=True):
    print(f"{n:3} edges: {share:.0%}")
print(circuits[10])
assert len(scores.values) == 479
assert 0.7 < curve.values[0] < 0.8
assert curve.values[1] > 1
assert abs(curve.values[-1] - 1) < 1e-4

# %%
views.circuit(scores, edges=12)

# %% [markdown]
# The edge that matters most, `L0MLP->L2H2.v`, is the acting name on its way into head 2.2's values.

# %%
assert circuits[10][0] == "L0MLP->L2H2.v"

# %% [markdown]
# ## The same in the terminal
#
# ```
# graphlens demo
# graphlens patch tiny-gpt2 --clean "When John and Mary went to the store, John gave a drink to" \
#     --corrupted "When John and Mary went to the store, Mary gave a drink to" --answer " Mary" --wrong " John" \
#     --sites attn_head_out_all_pos -o out
# graphlens report tiny-gpt2 --clean "When John and Mary went to the store, John gave a drink to" \
#     --corrupted "When John and Mary went to the store, Mary gave a drink to" --answer " Mary" --wrong " John" -o report.html
# ```
#
# More: [patching and sweeps](../patching.md), [gradients and attribution](../attribution.md).
