// The files in Node: baked and drivable ones in onnxruntime-node, text generation in transformers.js.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { test } from "node:test";

import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";
import * as ort from "onnxruntime-node";
import * as web from "onnxruntime-web";

import { assertClose, assertSameRuns, example, expected, made } from "./expected.js";

const { tokens, head, logits } = expected;
const [batch, length] = [tokens.length, tokens[0].length];
const input_ids = new ort.Tensor("int64", BigInt64Array.from(tokens.flat(), BigInt), [batch, length]);

const open = (folder) => ort.InferenceSession.create(`${made}/${folder}/model.onnx`, { logSeverityLevel: 3 });
const floats = (values, dims) => new ort.Tensor("float32", Float32Array.from(values), dims);

/** 1 in all heads but one, where it is 0. */
function oneHeadOff() {
  const scale = new Float32Array(head.n_heads).fill(1);
  scale[head.index] = 0;
  return floats(scale, [1, 1, head.n_heads, 1]);
}

/** true at positions 3 and 4 of the second sequence. */
function twoPlaces() {
  const where = new Uint8Array(batch * length);
  where[length + 3] = where[length + 4] = 1;
  return new ort.Tensor("bool", where, [batch, length, 1, 1]);
}

/** What leaves required gates without effect. */
function neutral(session) {
  const required = session.inputMetadata.filter(({ name }) => name.includes("/"));
  const value = (name) => (name.endsWith("/scale") ? 1 : 0);
  return Object.fromEntries(
    required.map(({ name, type, shape }) => [name, new ort.Tensor(type, [value(name)], shape.map(() => 1))]),
  );
}

const gates = {
  plain: {},
  scale: { [`${head.hook}/scale`]: oneHeadOff() },
  add: { [`${head.hook}/add`]: floats(expected.add, [1, 1, head.n_heads, head.d_head]) },
  where: {
    [`${head.hook}/where`]: twoPlaces(),
    [`${head.hook}/patch`]: floats(expected.patch, [1, length, head.n_heads, head.d_head]),
  },
  scores: { [`${expected.scores}/scale`]: floats([0], [1, 1, 1, 1]) }, // even attention, but none to what comes later
};

test("the baked file gives Python's logits", async (t) => {
  const session = await open("baked");
  assert.deepEqual(session.outputNames, ["logits"]);
  assertClose(t, (await session.run({ input_ids })).logits.data, logits.baked);
});

for (const [name, edits] of Object.entries(gates)) {
  test(`the drivable file gives Python's logits: ${name}`, async (t) => {
    const session = await open("tiny-js");
    const found = await session.run({ input_ids, ...neutral(session), ...edits });
    assertClose(t, found.logits.data, logits[name]);
  });
}

test("an exposed file of another program gives values of several types", async (t) => {
  const { exposed } = expected;
  const [rows, columns] = [exposed.tokens.length, exposed.tokens[0].length];
  const session = await open("exposed");
  assert.deepEqual(session.outputNames, ["logits", "places", "seen", "h.1.pattern"]);
  const ids = new ort.Tensor("int64", BigInt64Array.from(exposed.tokens.flat(), BigInt), [rows, columns]);
  const found = await session.run({ input_ids: ids });
  assertClose(t, found["h.1.pattern"].data, exposed.pattern);
  assert.deepEqual(Array.from(found.places.data, Number), exposed.places);
  assert.deepEqual(Array.from(found.seen.data, Boolean), exposed.seen);
});

test("a file with an SAE inside gives Python's logits, its features baked or as inputs", async (t) => {
  const { post, scale, add, logits: edited } = expected.sae;
  const baked = await open("sae-baked");
  assert.deepEqual(baked.outputNames, ["logits"]);
  assertClose(t, (await baked.run({ input_ids })).logits.data, edited);
  const drivable = await open("sae-drivable");
  const whole = { ...neutral(drivable) };
  assertClose(t, (await drivable.run({ input_ids, ...whole })).logits.data, logits.plain); // with its error term
  const features = { [`${post}/scale`]: floats(scale, [1, 1, scale.length]), [`${post}/add`]: floats(add, [1, 1, add.length]) };
  assertClose(t, (await drivable.run({ input_ids, ...whole, ...features })).logits.data, edited);
});

// Why JavaScript gets required gates. Where one of these fails, docs/drivable.md can be simpler.
test("onnxruntime-node drops an optional gate without a word", async (t) => {
  const session = await open("tiny-drivable");
  assert.deepEqual(session.inputNames, ["input_ids"]);
  assertClose(t, (await session.run({ input_ids, ...gates.scale })).logits.data, logits.plain);
});

test("onnxruntime-web refuses an optional gate", async () => {
  const read = (name) => readFileSync(`${made}/tiny-drivable/${name}`);
  const externalData = [{ path: "model.safetensors", data: read("model.safetensors") }];
  const session = await web.InferenceSession.create(read("model.onnx"), { externalData, logSeverityLevel: 3 });
  await assert.rejects(session.run({ input_ids, ...gates.scale }), /invalid input/);
});

const generated = {
  "baked-transformersjs": expected,
  "baked-transformersjs-large": expected,
  "llama-transformersjs": expected.llama,
};
for (const [folder, python] of Object.entries(generated)) {
  test(`transformers.js generates Python's tokens from local files: ${folder}`, async () => {
    Object.assign(env, { allowRemoteModels: false, useFSCache: false, localModelPath: made });
    const tokenizer = await AutoTokenizer.from_pretrained(folder);
    const inputs = tokenizer(`<|endoftext|>${expected.prompt}`);
    assert.deepEqual(Array.from(inputs.input_ids.data, Number), python.prompt_tokens);
    const model = await AutoModelForCausalLM.from_pretrained(folder);
    const max_new_tokens = python.generated.length - python.prompt_tokens.length;
    const found = await model.generate({ ...inputs, do_sample: false, max_new_tokens });
    assert.deepEqual(Array.from(found.data, Number), python.generated);
  });
}

test("the Node example of docs/drivable.md prints Python's figures", (t) => {
  writeFileSync(`${made}/example.mjs`, example("js"));
  const printed = execFileSync(process.execPath, ["example.mjs"], { cwd: made, encoding: "utf8" });
  assertSameRuns(t, JSON.parse(printed));
});
