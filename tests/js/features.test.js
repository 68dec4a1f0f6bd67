// A drivable file in Node whose gates are the features of an SAE and of a transcoder: each edit gives the API's logits.
import { test } from "node:test";

import * as ort from "onnxruntime-node";

import { assertClose, expected, made } from "./expected.js";

const { tokens, hooks, strongest, widths, logits } = expected.features;
const input_ids = new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]);
const open = (folder) => ort.InferenceSession.create(`${made}/${folder}/model.onnx`, { logSeverityLevel: 3 });

/** What leaves required gates without effect. */
function neutral(session) {
  const required = session.inputMetadata.filter(({ name }) => name.includes("/"));
  return Object.fromEntries(
    required.map(({ name, type, shape }) => [name, new ort.Tensor(type, [name.endsWith("/scale") ? 1 : 0], shape.map(() => 1))]),
  );
}

/** One number for the strongest feature of an SAE, another for all others: at every token, or at some. */
function one(sae, value, others, positions = null) {
  const length = positions === null ? 1 : tokens.length;
  const found = Array(length * widths[sae]).fill(others);
  for (const place of positions ?? [0]) found[place * widths[sae] + strongest[sae]] = value;
  return [found, [1, length, widths[sae]]];
}

const floats = ([values, dims]) => new ort.Tensor("float32", Float32Array.from(values), dims);
const bools = ([values, dims]) => new ort.Tensor("bool", Uint8Array.from(values), dims);
const scale = { [`${hooks[0]}/scale`]: floats(one(0, 3, 1)) };
const add = { [`${hooks[1]}/add`]: floats(one(1, 2.5, 0)) };
const places = [3, tokens.length - 1];
const where = { [`${hooks[0]}/where`]: bools(one(0, 1, 0, places)), [`${hooks[0]}/patch`]: floats([[6], [1, 1, 1]]) };

for (const [name, edits] of Object.entries({ plain: {}, scale, add, where, all: { ...scale, ...add } })) {
  test(`features driven in Node give the API's logits: ${name}`, async (t) => {
    const session = await open("features-js");
    const found = await session.run({ input_ids, ...neutral(session), ...edits });
    assertClose(t, found.logits.data, logits[name]);
  });
}

test("a file with edits of features baked in gives the API's logits", async (t) => {
  assertClose(t, (await (await open("features-baked")).run({ input_ids })).logits.data, logits.all);
});
