// The model in the page: its files, its tokenizer, and runs of it with edits.
import { PageError, gate } from "./edits.js";
import { importModule, openSession, runSession } from "./engine.js";

const LENS_BUDGET = 3e8; // multiplications for a lens at every token; beyond it only the selected token has one
const PATTERN_BUDGET = 2e6; // numbers of attention patterns for all layers at once; beyond it one layer is shown,
const HEADS_SHOWN = 64; // as of a model with more heads than these

/** Where the page's files come from: scripts of the page itself, or files beside it. */
export function openFiles(settings, progress) {
  const scripts = [...document.querySelectorAll("script[data-file]")];
  const names = new Set(scripts.map((script) => script.dataset.file));
  const embedded = async (name) => {
    const parts = scripts.filter((script) => script.dataset.file === name).map((script) => decoded(script.textContent));
    return new Uint8Array(await new Response(new Blob(parts).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
  };
  const fetched = async (name) => {
    let answer;
    try {
      answer = await fetch(name, { cache: "no-cache" }); // it asks whether the page was made again
    } catch (error) {
      throw new PageError(`${name} could not be read (${error.message}). Serve the whole folder: python -m http.server`);
    }
    if (!answer.ok) throw new PageError(`${name} could not be read (${answer.status}). Serve the whole folder: python -m http.server`);
    return received(answer, settings.sizes[name], (done) => progress(name, done));
  };
  const bytes = (name) => (names.has(name) ? embedded(name) : fetched(name));
  /** A module as what importModule takes: its text where the page holds it, its address elsewhere. */
  const source = async (name) => (names.has(name) ? embedded(name) : new URL(name, document.baseURI).href);
  const module = async (name) => importModule(await source(name));
  return { bytes, source, module, json: async (name) => JSON.parse(new TextDecoder().decode(await bytes(name))) };
}

function decoded(text) {
  const raw = atob(text.trim());
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** The body of an answer, its size being known: read into one array, so that large weights are in memory once. */
async function received(answer, size, progress) {
  const all = new Uint8Array(size);
  const reader = answer.body.getReader();
  let done = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (done + part.value.length > size) throw new PageError("A file of this page was changed: make the page again.");
    all.set(part.value, done);
    done += part.value.length;
    progress(done);
  }
  if (done < size) throw new PageError("A file of this page came incomplete: load the page again.");
  return all;
}

/** Opens the model. `progress(text)` is told what happens. */
export async function openModel(settings, progress) {
  if (typeof WebAssembly === "undefined") throw new PageError("This browser has no WebAssembly, which runs the model. Use another browser, or allow it in the settings.");
  const megabytes = (count) => (count / 1e6).toFixed(0);
  const files = openFiles(settings, (name, done) => {
    if (settings.sizes[name] > 5e6) progress(`Reading ${name.split("/").pop()}: ${megabytes(done)} of ${megabytes(settings.sizes[name])} MB`);
  });
  progress("Reading the tokenizer");
  let tokenizer = null;
  if (settings.tokenizer) {
    const { Tokenizer } = await files.module("runtime/tokenizers.min.mjs");
    tokenizer = new Tokenizer(await files.json("model/tokenizer.json"), await files.json("model/tokenizer_config.json"));
  }
  progress("Reading ONNX Runtime");
  const session = await openThread(files);
  const given = { wasm: await files.bytes("runtime/ort-wasm-simd-threaded.wasm"), graph: await files.bytes("model/model.onnx"), weights: [] };
  for (const path of settings.weights) given.weights.push({ path, data: await files.bytes(`model/${path}`) });
  const started = performance.now();
  const told = () => progress(`Opening the model: ${((performance.now() - started) / 1000).toFixed(0)} s`);
  const clock = setInterval(told, 500);
  if (session.inWorker) told();
  else progress("Opening the model: the page does not answer meanwhile");
  await new Promise((shown) => { setTimeout(shown, 50); }); // so that this is seen
  try {
    await session.open(given);
  } finally {
    clearInterval(clock);
  }
  return new Model(settings, session, tokenizer);
}

/** What opens and runs the session: a worker, or the page itself where the browser gives it none (as some do for files). */
async function openThread(files) {
  const name = "runtime/ort.wasm.bundle.min.mjs";
  try {
    const url = URL.createObjectURL(new Blob([WORKER], { type: "text/javascript" }));
    const thread = new Thread(new Worker(url));
    await thread.ask("load", await files.source(name));
    URL.revokeObjectURL(url);
    return thread;
  } catch {
    const ort = await files.module(name);
    let session = null;
    return {
      inWorker: false,
      open: async (given) => { session = await openSession(ort, given); },
      run: (feeds, outputs) => runSession(ort, session, feeds, outputs),
    };
  }
}

/** A session in a worker. */
class Thread {
  constructor(worker) {
    Object.assign(this, { worker, inWorker: true, asked: new Map(), last: 0 });
    worker.onmessage = ({ data: { id, found, error } }) => {
      const [done, failed] = this.asked.get(id);
      this.asked.delete(id);
      if (error === undefined) done(found);
      else failed(new Error(error));
    };
    worker.onerror = worker.onmessageerror = (event) => {
      event.preventDefault?.();
      for (const [, failed] of this.asked.values()) failed(new Error(event.message || "The thread that runs the model ended. Load the page again."));
      this.asked.clear();
    };
  }

  ask(job, given, sent = []) {
    return new Promise((done, failed) => {
      this.last += 1;
      this.asked.set(this.last, [done, failed]);
      this.worker.postMessage({ id: this.last, job, given }, sent);
    });
  }

  /** Hands the files over: they are not copied, and gone here. */
  open(given) {
    return this.ask("open", given, [given.wasm, given.graph, ...given.weights.map(({ data }) => data)].map(({ buffer }) => buffer));
  }

  run(feeds, outputs) {
    return this.ask("run", { feeds, outputs });
  }
}

export class Model {
  constructor(settings, session, tokenizer) {
    Object.assign(this, { settings, session, tokenizer });
    this.waiting = Promise.resolve();
    this.neutral = {};
    for (const name of Object.keys(settings.hooks)) {
      const ones = settings.hooks[name].axes.map(() => 1);
      this.neutral[`${name}/scale`] = { type: "float32", data: Float32Array.of(1), dims: ones };
      this.neutral[`${name}/add`] = { type: "float32", data: Float32Array.of(0), dims: ones };
      this.neutral[`${name}/where`] = { type: "bool", data: Uint8Array.of(0), dims: ones };
      this.neutral[`${name}/patch`] = { type: "float32", data: Float32Array.of(0), dims: ones };
    }
  }

  /** The token ids of a text; of a model without tokenizer, the ids that the text spells. */
  encode(text, bos = true) {
    const { settings } = this;
    let ids;
    if (this.tokenizer) {
      if (text.isWellFormed && !text.isWellFormed()) throw new PageError("The text holds half of a character.");
      ids = this.tokenizer.encode(text, { add_special_tokens: false }).ids.map(Number);
      if (bos && settings.bos !== null) ids = [settings.bos, ...ids];
    } else {
      if (text.trim() && !/^\s*\d+(?:[\s,]+\d+)*\s*$/.test(text)) throw new PageError("This model has no tokenizer: type token ids, with spaces between them.");
      ids = (text.match(/\d+/g) ?? []).map(Number);
    }
    const beyond = ids.find((id) => id >= settings.d_vocab);
    if (beyond !== undefined) throw new PageError(`There is no token ${beyond}: this model has ${settings.d_vocab} (0-${settings.d_vocab - 1}).`);
    return ids;
  }

  /** The ids of a prompt that can run. */
  tokens(text) {
    const ids = this.encode(text);
    if (!ids.length) throw new PageError("There are no tokens to run: type a prompt.");
    const most = this.settings.n_ctx;
    if (ids.length > most) throw new PageError(`The prompt has ${ids.length} tokens, and this model takes at most ${most}. Shorten it.`);
    return ids;
  }

  text(id) {
    if (!this.tokenizer) return String(id);
    return this.tokenizer.decode([id], { skip_special_tokens: false, clean_up_tokenization_spaces: false });
  }

  /** The positions that a lens looks at. */
  lensPositions(length, at) {
    const { lens, d_model, d_vocab } = this.settings;
    const every = lens && lens.length * length * d_model * d_vocab <= LENS_BUDGET;
    return every ? Array.from({ length }, (_, i) => i) : [at];
  }

  /** The layers whose attention patterns are read. */
  patternLayers(length, layer) {
    const { n_layers, n_heads, patterns } = this.settings;
    const layers = Array.from({ length: n_layers }, (_, i) => i).filter((i) => patterns[i] !== null);
    const heads = n_layers * n_heads;
    return heads <= HEADS_SHOWN && heads * length * length <= PATTERN_BUDGET ? layers : layers.filter((i) => i === layer);
  }

  /**
   * One run.
   *
   * ids: token ids. edits: what readEdits gives. wanted: {layers: of attention patterns, captures: hook points, lensAt: positions}.
   * Gives {ids, logits [n, d_vocab], patterns: {layer: [heads, n, n]}, captures: {hook: {sizes, data}}, lens, milliseconds}.
   */
  run(ids, edits = [], wanted = {}) {
    const found = this.waiting.then(() => this.runNow(ids, edits, wanted));
    this.waiting = found.catch(() => {}); // the caller is told; the next run is another's
    return found;
  }

  async runNow(ids, edits, { layers = [], captures = [], lensAt = [ids.length - 1] }) {
    const { settings } = this;
    const started = performance.now();
    const feeds = { input_ids: { type: "int64", data: BigInt64Array.from(ids, BigInt), dims: [1, ids.length] }, ...this.neutral };
    const byHook = Map.groupBy ? Map.groupBy(edits, (edit) => edit.hook) : grouped(edits);
    for (const [name, some] of byHook) {
      const { sizes, ...parts } = gate(some, settings.hooks[name], ids.length);
      for (const [part, data] of Object.entries(parts)) {
        if (data) feeds[`${name}/${part}`] = { type: part === "where" ? "bool" : "float32", data, dims: sizes };
      }
    }
    const outputs = ["logits"];
    for (const layer of layers) outputs.push(settings.outputs[settings.patterns[layer]]);
    for (const name of captures) outputs.push(settings.outputs[name]);
    if (settings.lens) {
      feeds["lens/positions"] = { type: "int64", data: BigInt64Array.from(lensAt, BigInt), dims: [lensAt.length] };
      outputs.push("lens/probabilities", "lens/tokens");
    }
    const results = await this.session.run(feeds, [...new Set(outputs)]);
    const values = (name) => results[settings.outputs[name]].data;
    const lens = settings.lens && {
      at: lensAt,
      count: results["lens/tokens"].dims[2],
      probabilities: results["lens/probabilities"].data,
      tokens: Array.from(results["lens/tokens"].data, Number),
    };
    return {
      ids,
      lens,
      logits: results.logits.data,
      patterns: Object.fromEntries(layers.map((layer) => [layer, values(settings.patterns[layer])])),
      captures: Object.fromEntries(captures.map((name) => [name, { sizes: results[settings.outputs[name]].dims, data: values(name) }])),
      milliseconds: performance.now() - started,
    };
  }

  /** The logits and probabilities of the token after position `at`. */
  next(run, at) {
    const size = this.settings.d_vocab_out;
    const logits = run.logits.subarray(at * size, (at + 1) * size);
    let most = -Infinity;
    for (const value of logits) if (value > most) most = value;
    const probabilities = Float64Array.from(logits, (value) => Math.exp(value - most));
    let sum = 0;
    for (const value of probabilities) sum += value;
    for (let i = 0; i < size; i++) probabilities[i] /= sum;
    return { logits, probabilities };
  }
}

function grouped(edits) {
  const found = new Map();
  for (const edit of edits) found.set(edit.hook, [...(found.get(edit.hook) ?? []), edit]);
  return found;
}

/** The indices of the `count` largest of some numbers, the largest first. */
export function largest(numbers, count) {
  const found = [];
  for (let index = 0; index < numbers.length; index++) {
    if (found.length === count && !(numbers[index] > numbers[found[count - 1]])) continue;
    let place = found.length;
    while (place > 0 && numbers[index] > numbers[found[place - 1]]) place--;
    found.splice(place, 0, index);
    if (found.length > count) found.pop();
  }
  return found;
}
