# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inspect the model that you deploy
#
# The file in production is rarely the checkpoint: an exporter wrote it, and a quantiser rounded it. `graphlens adopt` finds the
# hook points in that very file. Then one asks of it what one asks of any model, and which step's rounding costs the most.
#
# Here the embedded `tiny-llama` plays the deployed model: its plain file, without names, quantised to int8 by ONNX Runtime's own
# quantiser.

# %%
from pathlib import Path

import numpy as np
from onnxruntime.quantization import QuantType, quantize_dynamic

import graphlens
from graphlens import HookedTransformer
from graphlens.deploy import write_stripped

folder = graphlens.embedded_model("tiny-llama")
write_stripped(folder, "plain")  # as another exporter might write it: no hook points, no manifest
quantize_dynamic("plain/model.onnx", "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
size = sum(path.stat().st_size for path in Path("plain").iterdir() if path.suffix in (".onnx", ".safetensors"))
print(f"{size / 1e6:.1f} MB of floats, {Path('int8.onnx').stat().st_size / 1e6:.1f} MB quantised")
assert Path("int8.onnx").stat().st_size < size / 2

# %% [markdown]
# ## Adopt it
#
# In a terminal: `graphlens inspect int8.onnx`, then `graphlens adopt int8.onnx -o int8-hooked --tokenizer .`

# %%
report = graphlens.adopt("int8.onnx", "int8-hooked", tokenizer=folder)
print(len(report.hooks), "hook points,", len(report.identities), "identities between them hold")
graphlens.adopt("plain/model.onnx", "float-hooked", tokenizer=folder)

int8 = HookedTransformer.from_onnx("int8-hooked")
model = HookedTransformer.from_onnx("float-hooked")
assert set(report.hooks) == set(int8.hook_points())

# %% [markdown]
# Identities are arithmetic that must hold between hook points, for example that the pattern is the softmax of the scores. A hook
# point whose identity fails on probes gets no name.
#
# ## It is a hooked model like any other

# %%
prompt = "When John and Mary went to the store, John gave a drink to"
tokens = int8.to_tokens(prompt)
logits, cache = int8.run_with_cache(tokens)
mary, john = int8.to_single_token(" Mary"), int8.to_single_token(" John")


def difference(logits):
    return float(logits[0, -1, mary] - logits[0, -1, john])


print(f"Mary - John: float {difference(model(tokens)):+.2f}, int8 {difference(logits):+.2f}")
assert difference(logits) > 3
assert difference(model(tokens)) > 3


def ablate(z, hook):  # z: [batch, position, head, d_head]
    z[:, :, 2] = 0


ablated = int8.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", ablate)])
assert np.abs(ablated - logits).max() > 0.1

# %% [markdown]
# ## Which step's rounding hurts?
#
# `drift` compares both models hook point by hook point:
#
# - *relative*: how far an activation is from the float model's;
# - *fresh*: what its own step adds when it gets the float model's input;
# - *recovered*: how much of the logits' error goes away when the float model's activation is put in its place.

# %%
drift = graphlens.drift(model, int8, tokens, patch=True, top=5, verbose=False)
drift

# %%
worst = drift.worst(1)[0]
print(f"the logits are off by {drift.logits:.2%}")
print(
    f"worst step: {worst.hook}; with the float model's activation there, {worst.recovered:.0%} of the error goes away"
)
assert 0 < drift.logits < 0.2
assert worst.recovered > 0.1

# %% [markdown]
# ## Mend it
#
# `nodes_to_exclude` names the nodes of the file behind the worst hook points, in the quantiser's own words. Leave those in
# floating point, quantise again, and measure again.

# %%
nodes = drift.nodes_to_exclude(3)
quantize_dynamic(
    "plain/model.onnx", "mended.onnx", weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=nodes
)
mended = HookedTransformer.from_onnx("mended.onnx", adopt=True)
after = graphlens.drift(model, mended, tokens, verbose=False)
print(f"left in floating point: {nodes}")
print(f"off by {drift.logits:.2%} before, {after.logits:.2%} after; {Path('mended.onnx').stat().st_size / 1e6:.1f} MB")
assert after.logits < 0.7 * drift.logits
assert Path("mended.onnx").stat().st_size < 1.5 * Path("int8.onnx").stat().st_size

# %% [markdown]
# More: [adopting](../adopting.md), [drift](../drift.md), and [which files were tried](../adopted-files.md).
