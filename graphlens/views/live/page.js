// What the reader sees and does. Text of the reader, of tokens and of files reaches the page through textContent alone.
import { PageError, besideOf, label, readEdit, readEdits, readNpy, readSafetensors, writeEdits } from "./edits.js";
import { largest, openModel } from "./model.js";

const settings = JSON.parse(document.getElementById("settings").textContent);
const $ = (id) => document.getElementById(id);
const SITES = [
  ["attn.hook_z", "a head"],
  ["hook_attn_out", "attention's output"],
  ["hook_mlp_out", "the MLP's output"],
  ["hook_resid_pre", "the residual stream before a layer"],
  ["hook_resid_mid", "the residual stream between attention and MLP"],
  ["hook_resid_post", "the residual stream after a layer"],
];
const TOP = 10; // tokens in the table of predictions
const FOUND = 20; // features in the table of what an SAE finds
const LOOKED = 12; // tokens in the table of what a head looks at
const PAUSE = 250; // milliseconds without a key before the model runs

const state = { edits: [], at: null, shownAt: null, from: null, layer: 0, head: [0, 0], sae: 0, vectors: new Map(), intact: null, edited: null, other: null };
let model = null;
let busy = 0; // actions that are waited for
let asked = 0; // the newest run that was asked for: results of earlier ones are dropped

// Small helpers for the DOM

function element(tag, properties = {}, ...children) {
  const found = Object.assign(document.createElement(tag), properties);
  found.append(...children);
  return found;
}

function shown(text) {
  const visible = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return visible.length > 60 ? `${visible.slice(0, 57)}…` : visible || "∅";
}

function tell(error) {
  $("error").hidden = error === null;
  $("error").textContent = error === null ? "" : error instanceof PageError ? error.message : `Something went wrong in this page: ${error?.message ?? error}`;
}

function said(text) {
  $("said").textContent = text;
}

const hookAt = (layer, name) => `blocks.${layer}.${name}`;
const has = (name) => Object.hasOwn(settings.hooks, name);
const features = () => settings.features[state.sae]?.hook ?? null; // the hook point of those that are shown
const ofFeatures = (hook) => settings.features.some((each) => each.hook === hook);
const active = () => state.edits.filter((entry) => entry.on).map((entry) => entry.edit);

/** Runs an action of the reader; what it refuses is shown. */
function act(action) {
  return async (event) => {
    event?.preventDefault?.();
    busy += 1;
    try {
      said("");
      await action(event);
    } catch (error) {
      tell(error);
    } finally {
      busy -= 1;
    }
  };
}

/** Runs an action once there was no further event for a while. */
function later(action) {
  let timer = null;
  return () => {
    if (timer === null) busy += 1;
    clearTimeout(timer);
    timer = setTimeout(() => { timer = null; busy -= 1; action(); }, PAUSE);
  };
}

// Edits

function made(record, note = "") {
  return { edit: readEdit(record, settings.hooks, {}, "This edit"), on: true, note };
}

/** The edit that a switch stands for, if it is there. */
function switched(hook, head) {
  return state.edits.find(({ edit }) => {
    const whole = edit.positions === null && edit.dims === null && edit.batch === null;
    return edit.hook === hook && edit.kind === "ablate" && edit.heads === head && whole && edit.operand.shape.length === 0 && edit.operand.data[0] === 0;
  });
}

function flip(hook, head) {
  const found = switched(hook, head);
  if (!found) state.edits.push(made({ kind: "ablate", hook, value: 0, ...(head === null ? {} : { heads: head }) }));
  else if (found.on) state.edits.splice(state.edits.indexOf(found), 1);
  else found.on = true;
}

async function addEdit() {
  const layer = Number($("make-layer").value);
  const hook = hookAt(layer, $("make-site").value);
  if (!has(hook)) throw new PageError(`There is no ${hook} to edit: layers go from 0 to ${settings.n_layers - 1}.`);
  const record = { hook };
  const heads = settings.hooks[hook].axes.some((axis) => axis.endsWith("head_index"));
  if (heads && $("make-head").value !== "all") record.heads = Number($("make-head").value);
  if ($("make-positions").value === "one") record.positions = state.at;
  const kind = $("make-kind").value;
  let note = "";
  if (kind === "off") Object.assign(record, { kind: "ablate", value: 0 });
  if (kind === "scale") Object.assign(record, { kind: "scale", factor: Number($("make-factor").value) });
  if (kind === "steer") {
    const vector = state.vectors.get($("make-vector").value);
    if (!vector) throw new PageError("There is no vector yet: open a .npy or .safetensors file that holds one.");
    Object.assign(record, { kind: "steer", vector: nested(vector), coefficient: Number($("make-coefficient").value) });
    note = $("make-vector").value;
  }
  if (kind === "patch") [record.kind, record.value, note] = ["patch", ...(await patchFrom(hook, record))];
  state.edits.push(made(record, note));
}

/** The edit that the form for features stands for. */
function addClamp() {
  const [hook, feature, kind] = [features(), Number($("feature").value), $("clamp-kind").value];
  const record = { kind, hook, dims: feature, [{ patch: "value", steer: "vector", scale: "factor" }[kind]]: Number($("clamp-value").value) };
  if ($("clamp-positions").value === "one") record.positions = state.at;
  state.edits.push(made(record));
}

/** What the second prompt has at a hook point, for the selected part; and where it came from, for people. */
async function patchFrom(hook, record) {
  const ids = model.tokens($("other").value);
  const run = await model.run(ids, [], { captures: [hook] });
  const { sizes, data } = run.captures[hook];
  const width = sizes.slice(2).reduce((a, b) => a * b, 1);
  const inner = sizes.slice(2);
  const takeHead = (row) => {
    if (record.heads === undefined) return { shape: inner, data: row };
    const size = inner[1];
    return { shape: [size], data: row.slice(record.heads * size, (record.heads + 1) * size) };
  };
  const rowAt = (position) => takeHead(Array.from(data.subarray(position * width, (position + 1) * width)));
  if (record.positions !== undefined) {
    const from = Math.min(state.from ?? ids.length - 1, ids.length - 1);
    return [nested(rowAt(from)), `token ${from} ${shown(model.text(ids[from]))} of “${shown($("other").value)}”`];
  }
  const now = model.tokens($("prompt").value).length;
  if (ids.length !== now) {
    throw new PageError(`The second prompt has ${ids.length} tokens and the prompt ${now}: patch at the chosen token, or give both the same length.`);
  }
  return [Array.from({ length: now }, (_, position) => nested(rowAt(position))), `all of “${shown($("other").value)}”`];
}

function nested({ shape, data }) {
  if (shape.length === 0) return data[0];
  if (shape.length === 1) return Array.from(data);
  const step = data.length / shape[0];
  return Array.from({ length: shape[0] }, (_, i) => nested({ shape: shape.slice(1), data: data.slice(i * step, (i + 1) * step) }));
}

function describe({ edit, note }) {
  const parts = { ablate: "off", patch: "patched", steer: "steered", scale: "scaled" };
  const number = edit.operand.shape.length === 0 ? Number(edit.operand.data[0].toPrecision(6)) : null;
  let what = parts[edit.kind];
  if (edit.kind === "scale") what = `× ${number ?? "an array"}`;
  if (edit.kind === "ablate" && number !== 0) what = number === null ? "replaced" : `= ${number}`;
  if (edit.kind === "steer" && edit.coefficient !== 1) what = `steered × ${edit.coefficient}`;
  const feature = ofFeatures(edit.hook);
  if (feature && number !== null && edit.kind === "patch") what = `set to ${number}`;
  if (feature && number !== null && edit.kind === "steer") what = `+ ${Number((number * edit.coefficient).toPrecision(6))}`;
  const one = feature && Number.isInteger(edit.dims);
  const at = one ? `feature ${edit.dims} at ${settings.features.find((each) => each.hook === edit.hook).at}` : edit.hook;
  const where = ["heads", "positions", "dims", "batch"].filter((field) => edit[field] !== null && !(one && field === "dims"));
  const told = (value) => JSON.stringify(Object.hasOwn(Object(value), "slice") ? value.slice : value);
  return [`${at} ${what}`, ...where.map((field) => `${feature && field === "dims" ? "features" : field} ${told(edit[field])}`), ...(note ? [`from ${note}`] : [])].join(", ");
}

/** Reads the files that the reader chose: edits, or vectors. */
async function openChosen(files) {
  const read = async (file) => [file.name, new Uint8Array(await file.arrayBuffer())];
  const all = await Promise.all([...files].map(read));
  const named = (ending) => all.filter(([name]) => name.toLowerCase().endsWith(ending));
  const texts = named(".json");
  if (texts.length) {
    const opened = [];
    for (const [name, bytes] of texts) {
      const text = new TextDecoder().decode(bytes);
      const beside = await besideOf(name, text, named(".safetensors"), texts.length - 1);
      const edits = readEdits(text, settings.hooks, beside === null ? {} : readSafetensors(beside[1], beside[0]));
      opened.push(...edits.map((edit) => ({ edit, on: true, note: name })));
    }
    state.edits.push(...opened);
    return said(`${opened.length} edits opened.`);
  }
  const arrays = named(".safetensors").map(([name, bytes]) => [name, readSafetensors(bytes, name)]);
  const vectors = [
    ...named(".npy").map(([name, bytes]) => [name, readNpy(bytes, name)]),
    ...arrays.flatMap(([name, found]) => Object.entries(found).map(([key, array]) => [`${name}: ${key}`, array])),
  ];
  if (!vectors.length) throw new PageError("Open edits as .json, or vectors as .npy or .safetensors.");
  for (const [name, vector] of vectors) state.vectors.set(name, vector);
  $("make-kind").value = "steer";
  fillMaker();
  $("make-vector").value = vectors[0][0];
  return said(`${vectors.length === 1 ? "The vector is" : `${vectors.length} vectors are`} ready: choose where to add it, then Add edit.`);
}

// Runs

async function refresh() {
  const mine = ++asked;
  tell(null);
  drawEdits();
  let ids;
  try {
    ids = model.tokens($("prompt").value);
    if (state.at === null || state.at >= ids.length || state.follows) state.at = ids.length - 1;
    drawTokens("tokens", ids, state.at, (at) => { state.at = at; state.follows = at === ids.length - 1; return refresh(); });
    const wanted = { layers: model.patternLayers(ids.length, state.layer), lensAt: model.lensPositions(ids.length, state.at), captures: features() === null ? [] : [features()] };
    const key = JSON.stringify([ids, wanted]);
    $("status").textContent = "Running";
    const edits = active();
    const intact = state.intact?.key === key ? state.intact : { key, ...(await model.run(ids, [], wanted)) };
    if (mine !== asked) return;
    const edited = edits.length ? await model.run(ids, edits, wanted) : intact;
    if (mine !== asked) return;
    Object.assign(state, { intact, edited, shownAt: state.at }); // together: what is drawn is of one prompt and one token
    draw();
    $("page").classList.remove("failed");
    $("status").textContent = `${ids.length} token${ids.length === 1 ? "" : "s"}, ${edited.milliseconds.toFixed(0)} ms`;
  } catch (error) {
    if (mine !== asked) return;
    state.edited = null; // numbers of another prompt or of other edits must not stand below these
    $("page").classList.add("failed");
    $("status").textContent = "Not run";
    tell(error);
  }
}

function drawTokens(id, ids, at, choose) {
  const focused = [...$(id).children].indexOf(document.activeElement);
  $(id).replaceChildren(...ids.map((token, place) => {
    const button = element("button", { type: "button", textContent: shown(model.text(token)), title: `token ${place}, id ${token}` });
    button.setAttribute("aria-pressed", String(place === at));
    button.addEventListener("click", act(() => choose(place)));
    return button;
  }));
  if (focused >= 0) $(id).children[Math.min(focused, ids.length - 1)].focus();
}

function drawOther() {
  const text = $("other").value;
  if (!text) return $("other-tokens").replaceChildren();
  const ids = model.tokens(text);
  if (state.from === null || state.from >= ids.length) state.from = ids.length - 1;
  return drawTokens("other-tokens", ids, state.from, (at) => { state.from = at; drawOther(); });
}

function drawEdits() {
  for (const button of document.querySelectorAll("#switches button")) {
    const { hook, head } = button.dataset;
    const found = switched(hook, head === undefined ? null : Number(head));
    button.setAttribute("aria-pressed", String(Boolean(found?.on)));
  }
  $("edits").replaceChildren(...state.edits.map((entry) => {
    const box = element("input", { type: "checkbox", checked: entry.on });
    box.addEventListener("change", act(() => { entry.on = box.checked; return refresh(); }));
    const remove = element("button", { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove ${describe(entry)}`);
    remove.addEventListener("click", act(() => { state.edits = state.edits.filter((other) => other !== entry); return refresh(); }));
    return element("li", {}, element("label", {}, box, element("span", { className: "tok", textContent: describe(entry) })), remove);
  }));
  $("json").value = writeEdits(active());
}

function draw() {
  drawNext();
  drawFeatures();
  drawAttention();
  drawLens();
}

const percent = (p) => (p >= 1e-4 || p === 0 ? p.toFixed(4) : p.toExponential(1));

function signed(change) {
  const text = Math.abs(change).toFixed(4);
  return text === "0.0000" ? text : `${change > 0 ? "+" : "−"}${text}`;
}

function drawNext() {
  const [intact, edited] = [model.next(state.intact, state.shownAt), model.next(state.edited, state.shownAt)];
  $("next-after").textContent = shown(model.text(state.intact.ids[state.shownAt]));
  const followed = model.encode($("follow").value, false);
  const top = [...new Set([...largest(edited.logits, TOP), ...largest(intact.logits, TOP)])];
  top.sort((a, b) => edited.logits[b] - edited.logits[a]);
  const rows = [...new Set(followed)].concat(top.filter((token) => !followed.includes(token)));
  $("next").tBodies[0].replaceChildren(...rows.map((token) => {
    const [before, after] = [intact.probabilities[token], edited.probabilities[token]];
    const cells = [percent(before), percent(after), signed(after - before), intact.logits[token].toFixed(4), edited.logits[token].toFixed(4)];
    const row = element("tr", { className: Math.abs(after - before) < 5e-5 ? "" : after > before ? "up" : "down" });
    if (followed.includes(token)) row.classList.add("followed");
    row.dataset.token = token;
    row.append(element("th", { scope: "row", className: "tok", textContent: shown(model.text(token)) }), ...cells.map((textContent) => element("td", { textContent })));
    return row;
  }));
}

function drawFeatures() {
  if (features() === null) return;
  const { hook, tokens } = settings.features[state.sae];
  const count = settings.hooks[hook].sizes.at(-1);
  const row = (run) => run.captures[hook].data.subarray(state.shownAt * count, (state.shownAt + 1) * count);
  const [intact, edited] = [row(state.intact), row(state.edited)];
  $("features-of").textContent = shown(model.text(state.intact.ids[state.shownAt]));
  const size = intact.map((value, i) => Math.max(Math.abs(value), Math.abs(edited[i])));
  const most = largest(size, FOUND).filter((feature) => size[feature] > 0);
  const focused = document.activeElement?.dataset?.feature;
  $("found-none").hidden = most.length > 0;
  $("found").tBodies[0].replaceChildren(...most.map((feature) => {
    const button = element("button", { type: "button", textContent: feature });
    button.dataset.feature = feature;
    button.setAttribute("aria-label", `Choose feature ${feature}`);
    button.addEventListener("click", act(() => {
      $("feature").value = feature;
      $("clamp-value").focus();
    }));
    const change = edited[feature] - intact[feature];
    const found = element("tr", { className: Math.abs(change) < 5e-5 ? "" : change > 0 ? "up" : "down" }, element("th", { scope: "row" }, button));
    found.dataset.feature = feature;
    found.append(...[intact[feature].toFixed(4), edited[feature].toFixed(4), signed(change)].map((textContent) => element("td", { textContent })));
    found.append(element("td", { className: "tok", textContent: (tokens?.[feature] ?? []).map((token) => shown(model.text(token))).join(" ") }));
    return found;
  }));
  if (focused !== undefined) $("found").querySelector(`button[data-feature="${focused}"]`)?.focus();
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(" ").map(Number);
}

function drawAttention() {
  const layers = Object.keys(state.intact.patterns).map(Number);
  $("attention").hidden = !layers.length;
  if (!layers.length) return;
  $("layer-label").hidden = layers.length > 1 || settings.n_layers === 1;
  if (!layers.includes(state.head[0])) state.head = [layers[0], 0];
  const length = state.intact.ids.length;
  const ink = colour("--cool");
  const off = (layer, head) => switched(hookAt(layer, "attn.hook_z"), head)?.on;
  const pictures = layers.flatMap((layer) => Array.from({ length: settings.n_heads }, (_, head) => {
    const name = `${layer}.${head}`;
    const button = element("button", { type: "button" }, element("span", { textContent: `${name}${off(layer, head) ? " off" : ""}` }));
    for (const run of [state.intact, state.edited]) button.append(painted(run.patterns[layer], head, length, ink));
    button.dataset.head = name;
    button.setAttribute("aria-label", `Attention of head ${name}`);
    button.setAttribute("aria-pressed", String(layer === state.head[0] && head === state.head[1]));
    button.addEventListener("click", act(() => { state.head = [layer, head]; drawAttention(); }));
    return button;
  }));
  const focused = document.activeElement?.dataset?.head;
  $("heads").replaceChildren(...pictures);
  pictures.find((button) => button.dataset.head === focused)?.focus();
  drawLook();
}

function painted(pattern, head, length, ink) {
  const canvas = element("canvas", { width: length, height: length });
  const context = canvas.getContext("2d");
  const image = context.createImageData(length, length);
  for (let i = 0; i < length * length; i++) image.data.set([...ink, 255 * pattern[head * length * length + i]], 4 * i);
  context.putImageData(image, 0, 0);
  return canvas;
}

function drawLook() {
  const [layer, head] = state.head;
  const { ids } = state.intact;
  const row = (run) => run.patterns[layer].subarray((head * ids.length + state.shownAt) * ids.length, (head * ids.length + state.shownAt + 1) * ids.length);
  const [intact, edited] = [row(state.intact), row(state.edited)];
  $("look-title").textContent = `Head ${layer}.${head}: where “${shown(model.text(ids[state.shownAt]))}” looks`;
  const most = largest(intact.map((value, i) => Math.max(value, edited[i])), LOOKED);
  $("look").tBodies[0].replaceChildren(...most.map((key) => {
    const found = element("tr", {}, element("th", { scope: "row", className: "tok", textContent: `${key} ${shown(model.text(ids[key]))}` }));
    found.append(...[intact, edited].map((values) => element("td", { textContent: percent(values[key]) })));
    return found;
  }));
}

function drawLens() {
  $("lens").hidden = !settings.lens;
  if (!settings.lens) return;
  $("lenses").replaceChildren(...[["Intact", state.intact, null], ["Edited", state.edited, state.intact]].map(([name, run, before]) => {
    const { at, count, probabilities, tokens } = run.lens;
    const table = element("table", { className: "cells" }, element("caption", { textContent: name }));
    table.dataset.run = name.toLowerCase();
    const head = table.createTHead().insertRow();
    const one = at.length === 1; // of a large model: the chosen token alone, with its likeliest next tokens side by side
    const titles = one ? Array.from({ length: count }, (_, i) => String(i + 1)) : at.map((place) => shown(model.text(run.ids[place])));
    head.append(...["after", ...titles].map((textContent) => element("th", { scope: "col", textContent })));
    const body = table.createTBody();
    for (let layer = settings.lens.length - 1; layer >= 0; layer--) {
      const row = body.insertRow();
      row.append(element("th", { scope: "row", textContent: layer ? `layer ${layer - 1}` : "embedding" }));
      for (let column = 0; column < titles.length; column++) {
        const first = one ? layer * count + column : (layer * at.length + column) * count;
        const told = (index) => `${shown(model.text(tokens[index]))} ${percent(probabilities[index])}`;
        const cell = element("td", one ? { textContent: told(first) } : {
          textContent: shown(model.text(tokens[first])),
          title: Array.from({ length: count }, (_, i) => told(first + i)).join("\n"),
        });
        cell.style.background = `rgb(var(--cool) / ${(0.4 * probabilities[first]).toFixed(3)})`;
        cell.classList.toggle("chosen", !one && at[column] === state.shownAt);
        cell.classList.toggle("changed", before !== null && before.lens.tokens[first] !== tokens[first]);
        row.append(cell);
      }
    }
    return element("div", { className: "scroll" }, table);
  }));
}

// What is made once

function drawSwitches() {
  const columns = [
    ...Array.from({ length: settings.n_heads }, (_, head) => ["attn.hook_z", head, String(head)]),
    ["hook_attn_out", null, "attn"],
    ["hook_mlp_out", null, "MLP"],
  ].filter(([name]) => has(hookAt(0, name)));
  const top = element("tr", {}, element("th", { scope: "col", textContent: "layer" }));
  top.append(...columns.map(([, , name]) => element("th", { scope: "col", textContent: name })));
  $("switches").tHead.replaceChildren(top);
  $("switches").tBodies[0].replaceChildren(...Array.from({ length: settings.n_layers }, (_, layer) => {
    const row = element("tr", {}, element("th", { scope: "row", textContent: layer }));
    for (const [name, head, shortly] of columns) {
      const hook = hookAt(layer, name);
      if (!has(hook)) { row.append(element("td")); continue; }
      const button = element("button", { type: "button", textContent: head === null ? shortly : `${layer}.${head}` });
      button.dataset.hook = hook;
      if (head !== null) button.dataset.head = head;
      button.setAttribute("aria-label", `Switch off ${head === null ? `${shortly} of layer ${layer}` : `head ${layer}.${head}`}`);
      button.addEventListener("click", act(() => { flip(hook, head); return refresh(); }));
      row.append(element("td", {}, button));
    }
    return row;
  }));
}

function drawSaes() {
  $("features").hidden = !settings.features.length;
  if (!settings.features.length) return;
  $("sae").append(...settings.features.map(({ at }, value) => element("option", { value, textContent: at })));
  $("sae-label").hidden = settings.features.length === 1;
  fillClamp();
  $("bake").textContent = "graphlens bake MODEL edits.json --sae SAE --error-term -o OUT";
}

function fillClamp() {
  $("feature").max = settings.hooks[features()].sizes.at(-1) - 1;
}

function fillMaker() {
  const sites = SITES.filter(([name]) => Object.keys(settings.hooks).some((hook) => hook.endsWith(`.${name}`)));
  if (!$("make-site").options.length) {
    $("make-site").append(...sites.map(([value, textContent]) => element("option", { value, textContent })));
    $("make-head").append(...["all", ...Array(settings.n_heads).keys()].map((value) => element("option", { value, textContent: value })));
    $("make-layer").max = settings.n_layers - 1;
    $("layer").append(...Array.from({ length: settings.n_layers }, (_, i) => element("option", { value: i, textContent: i })));
  }
  const kept = $("make-vector").value;
  $("make-vector").replaceChildren(...[...state.vectors.keys()].map((value) => element("option", { value, textContent: shown(value) })));
  if (!state.vectors.size) $("make-vector").append(element("option", { value: "", textContent: "open a file first" }));
  if (state.vectors.has(kept)) $("make-vector").value = kept;
  const kind = $("make-kind").value;
  $("make-head-label").hidden = $("make-site").value !== "attn.hook_z";
  $("make-factor-label").hidden = kind !== "scale";
  $("make-vector-label").hidden = $("make-coefficient-label").hidden = kind !== "steer";
  $("second").hidden = kind !== "patch";
}

function listen() {
  state.follows = true;
  $("prompt").addEventListener("input", later(act(() => { state.follows = true; return refresh(); })));
  $("other").addEventListener("input", later(act(() => { tell(null); drawOther(); })));
  $("follow").addEventListener("input", later(act(() => { if (state.edited) drawNext(); })));
  $("make").addEventListener("change", fillMaker);
  $("make").addEventListener("submit", act(async () => { await addEdit(); await refresh(); }));
  $("clamp").addEventListener("submit", act(async () => { addClamp(); await refresh(); }));
  $("sae").addEventListener("change", act(() => { state.sae = Number($("sae").value); fillClamp(); return refresh(); }));
  $("layer").addEventListener("change", act(() => { state.layer = Number($("layer").value); return refresh(); }));
  $("clear").addEventListener("click", act(() => { state.edits = []; return refresh(); }));
  $("open").addEventListener("change", act(async () => { try { await openChosen($("open").files); } finally { $("open").value = ""; } await refresh(); }));
  $("save").addEventListener("click", act(() => {
    const url = URL.createObjectURL(new Blob([writeEdits(active())], { type: "application/json" }));
    element("a", { href: url, download: "edits.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }));
  $("copy").addEventListener("click", act(async () => {
    try {
      await navigator.clipboard.writeText(writeEdits(active()));
      said("Copied.");
    } catch { // a page from a file, or without the right to: the text can be copied by hand
      $("json").closest("details").open = true;
      $("json").focus();
      $("json").select();
      said("This browser does not let the page copy: the text is selected, press Ctrl+C.");
    }
  }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.edited && drawAttention());
}

/** Compares this browser's tokens and numbers with those that Python had for the same text. */
async function selfCheck() {
  for (const { text, ids } of settings.probes) {
    const found = model.encode(text);
    if (JSON.stringify(found) !== JSON.stringify(ids)) {
      throw new PageError(`The tokenizer in this page reads ${JSON.stringify(text)} as ${JSON.stringify(found)}, and Python as ${JSON.stringify(ids)}: do not trust it for this model.`);
    }
  }
  const { ids, top } = settings.check;
  const { logits } = model.next(await model.run(ids), ids.length - 1);
  const size = Math.max(1, ...top.map(([, logit]) => Math.abs(logit)));
  const worst = Math.max(...top.map(([token, logit]) => Math.abs(logits[token] - logit)));
  if (!(worst <= 1e-3 * size)) throw new PageError(`The logits in this browser are off by ${worst.toPrecision(2)} from those in Python: do not trust this page's numbers.`);
  const texts = settings.probes.length ? `the tokens of ${settings.probes.length} texts are Python's, and ` : "";
  const prompt = shown(ids.map((id) => model.text(id)).join(model.tokenizer ? "" : " "));
  $("checked").textContent = `Checked when it opened: ${texts}the largest logits of “${prompt}” are off by at most ${worst.toExponential(1)} from those in Python.`;
  return worst;
}

async function start() {
  const started = performance.now();
  try {
    model = await openModel(settings, (text) => { $("status").textContent = text; });
  } catch (error) {
    $("status").textContent = "The model did not open.";
    tell(error);
    throw error;
  }
  const opened = performance.now() - started;
  fillMaker();
  drawSwitches();
  drawSaes();
  listen();
  state.edits = readEdits(JSON.stringify(settings.edits), settings.hooks).map((edit) => ({ edit, on: true, note: "" }));
  $("prompt").value = settings.prompt;
  $("page").hidden = false;
  await refresh();
  let worst = null;
  let distrust = null;
  try {
    worst = await selfCheck();
  } catch (error) {
    distrust = error instanceof PageError ? error.message : String(error);
    $("checked").textContent = distrust;
    tell(error);
  }
  return { opened, milliseconds: performance.now() - started, worst, distrust };
}

/** For scripts: `await graphlens.ready`, then `await graphlens.run(prompt or ids, edits as JSON text or [])`. */
window.graphlens = {
  ready: start(),
  settings,
  label,
  get inWorker() { return model.session.inWorker; },
  get busy() { return busy > 0; },
  get edits() { return writeEdits(active()); },
  async run(prompt, edits = [], wanted = {}) {
    const ids = typeof prompt === "string" ? model.tokens(prompt) : prompt;
    return model.run(ids, typeof edits === "string" ? readEdits(edits, settings.hooks) : edits, wanted);
  },
};
window.graphlens.ready.catch(() => {}); // shown already
