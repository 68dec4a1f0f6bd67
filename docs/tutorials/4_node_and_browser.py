# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # An edited file in Node and in a browser
#
# A hooked model is an ONNX file, so an edit that was found in Python can run where the model runs. There are two ways:
#
# - **bake**: the edit is inside the file, for good;
# - **drive**: the file has inputs that edit it, and the program says at each run what to change.
#
# This page does the first in Node and the second in a browser, and compares both with Python. It needs Node, npm and Chromium.

# %%
import functools
import http.server
import json
import os
import subprocess
import threading
from pathlib import Path

from graphlens import Ablate, HookedTransformer, embedded_model, write_drivable

model = HookedTransformer.from_pretrained_no_processing("tiny-gpt2")
prompt = "When John and Mary went to the store, John gave a drink to"
tokens = model.to_tokens(prompt)
edit = Ablate("blocks.1.attn.hook_z", heads=0)  # the head that fetches Mary
mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")


def difference(logits):
    return float(logits[0, -1, mary] - logits[0, -1, john])


plain, edited = difference(model(tokens)), difference(model.run_with_interventions(tokens, [edit]))
print(f"Mary - John: {plain:+.5f}, with head 1.0 off {edited:+.5f}")
assert round(plain, 2) == 10.11
assert round(edited, 2) == 0.26

# %% [markdown]
# ## The packages
#
# `--ignore-scripts` keeps packages from running programs of their own when they are installed.

# %%
packages = ["onnxruntime-node", "onnxruntime-web", "@huggingface/tokenizers"]
if installed := os.environ.get("NODE_MODULES"):  # a folder of them that is there already
    Path("node_modules").symlink_to(installed)
else:
    subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages], check=True)

# %% [markdown]
# ## Baked, in Node

# %%
model.bake([edit], "baked")  # the same: graphlens bake tiny-gpt2 edits.json -o baked

Path("baked.mjs").write_text(
    """
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const read = (name) => JSON.parse(readFileSync(`baked/${name}`, "utf8"));
const tokenizer = new Tokenizer(read("tokenizer.json"), read("tokenizer_config.json"));
const { ids } = tokenizer.encode("<|endoftext|>" + process.argv[2]);
const [mary, john] = [" Mary", " John"].map((name) => tokenizer.encode(name).ids[0]);

const session = await ort.InferenceSession.create("baked/model.onnx", { logSeverityLevel: 3 });
const input_ids = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
const { logits } = await session.run({ input_ids });
const last = logits.data.subarray(-logits.dims[2]);
console.log(JSON.stringify({ tokens: ids, difference: last[mary] - last[john] }));
"""
)
printed = subprocess.run(["node", "baked.mjs", prompt], capture_output=True, text=True, check=True).stdout
in_node = json.loads(printed)
print(f"Python {edited:+.5f}, Node {in_node['difference']:+.5f}")
assert in_node["tokens"] == tokens[0].tolist()
assert abs(in_node["difference"] - edited) < 1e-4

# %% [markdown]
# Node's tokenizer gave the same tokens, and the baked file the same number.
#
# ## Driven, in a browser
#
# `write_drivable` makes gates: inputs that scale a head, add a vector or replace a value. JavaScript needs them to be required
# ([why](../drivable.md#inputs)), so each run feeds all of them. Here there is one gate with one kind, a factor for each head.
#
# ![A gate in the graph: the inputs scale, add, where and patch change what the hook point computes](../pictures/drivable.svg)

# %%
write_drivable(embedded_model(), "blocks.1.attn.hook_z", "driven", kinds=["scale"], required=True)

Path("index.html").write_text(
    """<!doctype html>
<meta charset="utf-8">
<title>working</title>
<table><thead><tr><th>head 1.0<th>Mary - John</thead><tbody></tbody></table>
<script type="module">
  import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
  import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
  ort.env.wasm.numThreads = 1;

  const read = async (name) => (await fetch(`driven/${name}`)).json();
  const tokenizer = new Tokenizer(await read("tokenizer.json"), await read("tokenizer_config.json"));
  const { ids } = tokenizer.encode("<|endoftext|>When John and Mary went to the store, John gave a drink to");
  const [mary, john] = [" Mary", " John"].map((name) => tokenizer.encode(name).ids[0]);
  const weights = { path: "model.safetensors", data: "driven/model.safetensors" };
  const session = await ort.InferenceSession.create("driven/model.onnx", { externalData: [weights] });

  for (const factor of [1, 0.5, 0]) {
    const input_ids = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
    const scale = new ort.Tensor("float32", [factor, 1, 1, 1], [1, 1, 4, 1]); // batch, position, head, d_head
    const { logits } = await session.run({ input_ids, "blocks.1.attn.hook_z/scale": scale });
    const last = logits.data.subarray(-logits.dims[2]);
    const row = document.querySelector("tbody").insertRow();
    row.insertCell().textContent = factor;
    row.insertCell().textContent = (last[mary] - last[john]).toFixed(5);
  }
  document.title = "done";
</script>
"""
)


# %% [markdown]
# A browser fetches, so the folder must be served. Your own browser shows the page at http://127.0.0.1 and the port below; here
# headless Chromium opens it and prints what it then holds.


# %%
class Quiet(http.server.SimpleHTTPRequestHandler):
    def guess_type(self, path):
        return "text/javascript" if str(path).endswith(".mjs") else super().guess_type(path)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory="."))
threading.Thread(target=server.serve_forever, daemon=True).start()
browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"]
address = f"http://127.0.0.1:{server.server_port}/"
page = subprocess.run([*browser, address], capture_output=True, text=True, check=True, timeout=80).stdout
server.shutdown()

# %%
import re

assert "<title>done</title>" in page
shown = {float(factor): float(value) for factor, value in re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page)}
print(shown)
assert abs(shown[1.0] - plain) < 1e-4
assert abs(shown[0.0] - edited) < 1e-4

# %% [markdown]
# The browser's numbers are Python's: with the head as it is, and with the head off. In between the answer fades.

# %%
from graphlens import Scale

half = difference(model.run_with_interventions(tokens, [Scale("blocks.1.attn.hook_z", 0.5, heads=0)]))
assert abs(shown[0.5] - half) < 1e-4
assert shown[1.0] > shown[0.5] > shown[0.0]

# %% [markdown]
# To edit a model in a browser without writing a page: `graphlens page tiny-gpt2 -o site` ([the live page](../live-page.md)).
#
# Other languages drive such a file in the same way: [drivable files](../drivable.md) has C++, and steering vectors as files of
# their own.
