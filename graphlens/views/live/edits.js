// Edits as data, as graphlens.interventions writes them, and what they come to at a hook point: the inputs of its gate.
// Nothing here knows the page or the model: tests run it in Node.

export const FORMAT = "graphlens.interventions";
export const VERSION = 1;
const OPERANDS = { ablate: "value", patch: "value", steer: "vector", scale: "factor" };
const FIELDS = ["heads", "positions", "dims", "batch"];
const KNOWN = ["kind", "hook", ...FIELDS, "strict", "allow_nonfinite"];

/** What a user did wrong, in one sentence. */
export class PageError extends Error {}

/** Nested lists of numbers, or one number, as {shape, data}. */
export function toArray(value, what) {
  const shape = [];
  for (let level = value; Array.isArray(level); level = level[0]) shape.push(level.length);
  const data = [];
  const walk = (level, depth) => {
    if (depth < shape.length) {
      if (!Array.isArray(level) || level.length !== shape[depth]) throw new PageError(`${what} is ragged: its rows have different lengths.`);
      for (const entry of level) walk(entry, depth + 1);
    } else if (typeof level === "number") data.push(level);
    else if (typeof level === "boolean") data.push(Number(level));
    else throw new PageError(`${what} must be a number or an array of numbers.`);
  };
  walk(value, 0);
  if (!data.length) throw new PageError(`${what} is an empty array: it must hold a number at least.`);
  return { shape, data };
}

/** An array {shape, data} as nested lists with nine digits: as many as tell float32 numbers apart. */
export function toLists({ shape, data }) {
  const build = (depth, start, step) => {
    if (depth === shape.length) return Number(data[start].toPrecision(9));
    const inner = step / shape[depth];
    return Array.from({ length: shape[depth] }, (_, i) => build(depth + 1, start + i * inner, inner));
  };
  return build(0, 0, data.length);
}

/** The edits in a JSON text, checked against the hook points of the page. `tensors` has the arrays that the text names. */
export function readEdits(text, hooks, tensors = {}) {
  let data;
  try {
    data = JSON.parse(text);
  } catch (error) {
    throw new PageError(`This is no file of edits: it is no JSON (${error.message}).`);
  }
  if (data?.format !== FORMAT) throw new PageError(`This is no file of edits: its format is not ${JSON.stringify(FORMAT)}.`);
  if (data.version !== VERSION) throw new PageError(`These edits have the version ${JSON.stringify(data.version)}; this page reads ${VERSION}.`);
  if (!Array.isArray(data.interventions)) throw new PageError("This is no file of edits: it has no list of interventions.");
  return data.interventions.map((record, index) => readEdit(record, hooks, tensors, `Edit ${index + 1}`));
}

/** One edit of a file. */
export function readEdit(record, hooks, tensors, where) {
  const operand = Object.hasOwn(OPERANDS, record?.kind) ? OPERANDS[record.kind] : undefined;
  if (!operand) throw new PageError(`${where}: its kind is ${JSON.stringify(record?.kind)}; there is ${Object.keys(OPERANDS).join(", ")}.`);
  if (!Object.hasOwn(hooks, record.hook)) {
    throw new PageError(`${where}: this page has no gate at ${JSON.stringify(record.hook)}; it has some at ${examples(hooks)}.`);
  }
  const known = [...KNOWN, operand, ...(record.kind === "steer" ? ["coefficient"] : [])];
  const unknown = Object.keys(record).find((name) => !known.includes(name));
  if (unknown) throw new PageError(`${where}: ${record.kind} has no ${JSON.stringify(unknown)}.`);
  let value = record[operand];
  if (value === undefined && record.kind === "ablate") value = 0;
  if (value === undefined) throw new PageError(`${where}: ${record.kind} needs ${JSON.stringify(operand)}.`);
  const coefficient = number(record.coefficient ?? 1);
  if (typeof coefficient !== "number") throw new PageError(`${where}: its coefficient must be one number.`);
  const edit = {
    kind: record.kind,
    hook: record.hook,
    operand: value?.tensor === undefined ? toArray(number(value), `${where}: its ${operand}`) : named(tensors, value.tensor, where),
    coefficient,
    strict: record.strict ?? true,
    allow_nonfinite: record.allow_nonfinite ?? false,
  };
  for (const field of FIELDS) edit[field] = record[field] ?? null;
  const finite = Number.isFinite(coefficient) && edit.operand.data.every(Number.isFinite);
  if (!finite && !edit.allow_nonfinite) throw new PageError(`${where}: its ${operand} holds NaN or infinities.`);
  gate([edit], hooks[edit.hook], null); // what can be seen to be wrong before there is a run
  return edit;
}

function number(value) {
  const named = { nan: NaN, inf: Infinity, "-inf": -Infinity };
  return typeof value?.number === "string" && Object.hasOwn(named, value.number) ? named[value.number] : value;
}

function named(tensors, name, where) {
  if (!Object.hasOwn(tensors, name)) {
    throw new PageError(`${where}: its array ${JSON.stringify(name)} lies in the .safetensors file beside it. Choose both files together.`);
  }
  return tensors[name];
}

function examples(hooks) {
  const names = Object.keys(hooks).filter((name) => name.startsWith("blocks.0."));
  return names.join(", ");
}

/** Edits as the JSON text that `graphlens bake` takes, arrays inside. */
export function writeEdits(edits) {
  const records = edits.map((edit) => {
    const record = { kind: edit.kind, hook: edit.hook, [OPERANDS[edit.kind]]: plain(edit.operand) };
    if (edit.kind === "steer" && edit.coefficient !== 1) record.coefficient = edit.coefficient;
    for (const field of FIELDS) if (edit[field] !== null) record[field] = edit[field];
    if (!edit.strict) record.strict = false;
    if (edit.allow_nonfinite) record.allow_nonfinite = true;
    return `    ${JSON.stringify(record)}`;
  });
  const list = records.length ? `[\n${records.join(",\n")}\n  ]` : "[]";
  return `{\n  "format": "${FORMAT}",\n  "version": ${VERSION},\n  "interventions": ${list}\n}\n`;
}

function plain(operand) {
  if (operand.shape.length || Number.isFinite(operand.data[0])) return toLists(operand);
  return { number: { NaN: "nan", Infinity: "inf", "-Infinity": "-inf" }[String(operand.data[0])] };
}

/** What edits of one hook point come to in a run of `length` tokens: {scale, add, where, patch}, null where nothing changes. */
export function gate(edits, hook, length) {
  const sizes = hook.sizes.map((size) => (size === 0 ? length : size));
  if (length === null) {
    for (const edit of edits) check(edit, hook);
    return null;
  }
  const total = sizes.reduce((a, b) => a * b, 1);
  let [scale, add, where, patch] = [null, null, null, null];
  for (const edit of edits) {
    if (edit.kind === "scale") {
      scale ??= new Float32Array(total).fill(1);
      each(edit, hook, sizes, (at, value) => {
        scale[at] *= value;
        if (add) add[at] *= value;
        if (patch) patch[at] *= value;
      });
    } else if (edit.kind === "steer") {
      add ??= new Float32Array(total);
      each(edit, hook, sizes, (at, value) => {
        add[at] += value * edit.coefficient;
        if (patch) patch[at] += value * edit.coefficient;
      });
    } else {
      where ??= new Uint8Array(total);
      patch ??= new Float32Array(total);
      each(edit, hook, sizes, (at, value) => {
        where[at] = 1;
        patch[at] = value;
      });
    }
  }
  return { sizes, scale, add, where, patch };
}

function fieldOf(hook, axis) {
  const name = hook.axes[axis];
  if (name === "batch") return "batch";
  if (name === "pos") return "positions";
  if (name.endsWith("head_index")) return "heads";
  return axis === hook.axes.length - 1 ? "dims" : null;
}

/** How a message calls an edit. */
export function label(edit) {
  return `${edit.kind} at ${edit.hook}`;
}

/** Raises PageError for a selection along an axis that is not there, and for an operand that fits no run. */
function check(edit, hook) {
  const able = hook.axes.map((_, axis) => fieldOf(hook, axis));
  for (const field of FIELDS) {
    if (edit[field] !== null && !able.includes(field)) throw new PageError(`${label(edit)}: it has no ${field} (its axes are ${hook.axes.join(", ")}).`);
  }
  const operand = aligned(edit, hook);
  hook.sizes.forEach((size, axis) => {
    const chosen = selection(edit, hook, axis, size === 0 ? null : size);
    if (size !== 0 && chosen) fits(edit, hook, axis, operand.shape[axis], chosen.length);
  });
}

function fits(edit, hook, axis, has, selected) {
  if (has === 1 || has === selected) return;
  throw new PageError(`${label(edit)}: its array has ${has} entries along ${hook.axes[axis]}, of which ${selected} are selected.`);
}

/** The operand with an axis for each of the activation's: matched from the last one that the selection keeps. */
function aligned(edit, hook) {
  const { shape, data } = edit.operand;
  const rank = hook.axes.length;
  const taken = hook.axes.map((_, axis) => Number.isInteger(edit[fieldOf(hook, axis)]));
  const kept = [...taken.keys()].filter((axis) => !taken[axis]);
  const sizes = Array(rank).fill(1);
  if (shape.length <= kept.length) {
    shape.forEach((size, i) => { sizes[kept[kept.length - shape.length + i]] = size; });
    return { shape: sizes, data };
  }
  const last = taken.lastIndexOf(true) - (rank - shape.length); // as of a mean that keeps its axes: [1, 1, d_model] at one position
  if (shape.length <= rank && shape.slice(0, last + 1).every((size) => size === 1)) {
    return { shape: [...Array(rank - shape.length).fill(1), ...shape], data };
  }
  throw new PageError(`${label(edit)}: its array has ${shape.length} axes, and the selected part ${kept.length}.`);
}

/** The indices along an axis that an edit selects, in its order; null for one that the run does not have. */
function selection(edit, hook, axis, size) {
  const field = fieldOf(hook, axis);
  const chosen = field === null ? null : edit[field];
  const all = (count) => Array.from({ length: count }, (_, i) => i);
  const said = `${label(edit)}: ${field}=${JSON.stringify(chosen)}`;
  const fixed = !["batch", "pos"].includes(hook.axes[axis]);
  const strict = edit.strict || fixed; // what is beyond every run is wrong, whatever the edit says
  if (chosen === null || (chosen === "prompt" && field === "positions")) return size === null ? null : all(size);
  if (chosen === "generated") throw new PageError(`${said}: this page runs prompts and generates nothing.`);
  if (Object.hasOwn(Object(chosen), "slice")) {
    const [start, stop, step] = Array.isArray(chosen.slice) ? chosen.slice : [];
    if (![start, stop, step].every((part) => part === null || Number.isInteger(part)) || step === 0) throw new PageError(`${said} is no slice.`);
    if (size === null) return null;
    const found = sliced(size, start, stop, step ?? 1);
    if (!found.length && fixed) throw new PageError(`${said} selects none of the ${size} along ${hook.axes[axis]}.`);
    return found;
  }
  const list = Number.isInteger(chosen) ? [chosen] : chosen;
  if (Array.isArray(list) && list.length && list.every((entry) => typeof entry === "boolean")) {
    if (size === null) return null;
    if (list.length < size || (list.length > size && strict)) throw new PageError(`${said} is a mask of ${list.length}; ${hook.axes[axis]} has ${size}.`);
    return [...list.keys()].filter((index) => list[index]).map((index) => (index < size ? index : null));
  }
  if (!Array.isArray(list) || !list.length || !list.every(Number.isInteger)) throw new PageError(`${said}: this page takes a number, a list, a slice or a mask of one axis.`);
  if (size === null) return null;
  return list.map((index) => {
    const found = index < 0 ? index + size : index;
    if (found >= 0 && found < size) return found;
    if (strict) throw new PageError(`${said}: there is no ${index}; ${hook.axes[axis]} has ${size} (0-${size - 1}).`);
    return null;
  });
}

/** Python's slice of a range. */
function sliced(size, start, stop, step) {
  const clip = (index, low, high) => Math.min(Math.max(index < 0 ? index + size : index, low), high);
  const found = [];
  if (step > 0) {
    const end = stop === null ? size : clip(stop, 0, size);
    for (let i = start === null ? 0 : clip(start, 0, size); i < end; i += step) found.push(i);
  } else {
    const end = stop === null ? -1 : clip(stop, -1, size - 1);
    for (let i = start === null ? size - 1 : clip(start, -1, size - 1); i > end; i += step) found.push(i);
  }
  return found;
}

/** Calls `change(place in the flat activation, operand's number there)` for each selected element. */
function each(edit, hook, sizes, change) {
  const operand = aligned(edit, hook);
  const chosen = sizes.map((size, axis) => selection(edit, hook, axis, size));
  chosen.forEach((indices, axis) => fits(edit, hook, axis, operand.shape[axis], indices.length));
  if (edit.strict && chosen.some((indices) => !indices.length)) throw new PageError(`${label(edit)} selects nothing of these tokens.`);
  const strides = (shape) => shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  const [own, its] = [strides(sizes), strides(operand.shape)];
  // An index that is listed twice is one element, which changes once: its last entry counts, as in Python.
  const once = chosen.map((indices) => [...new Map(indices.map((index, place) => [index, place]))].filter(([index]) => index !== null));
  const walk = (axis, at, from) => {
    if (axis === sizes.length) return change(at, operand.data[from]);
    for (const [index, place] of once[axis]) walk(axis + 1, at + index * own[axis], from + (operand.shape[axis] === 1 ? 0 : place * its[axis]));
  };
  walk(0, 0, 0);
}

// Files with arrays

/** The array of a .npy file. */
export function readNpy(bytes, name) {
  const bad = (why) => new PageError(`${name}: ${why}.`);
  if (bytes.length < 12 || bytes[0] !== 0x93 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY") throw bad("this is no .npy file");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const [start, length] = bytes[6] === 1 ? [10, view.getUint16(8, true)] : [12, view.getUint32(8, true)];
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  const descr = /'descr':\s*'([^']*)'/.exec(header)?.[1];
  const shape = /'shape':\s*\(([^)]*)\)/.exec(header)?.[1].split(",").filter((part) => part.trim()).map(Number);
  if (!shape || !shape.every(Number.isInteger)) throw bad("its header cannot be read");
  if (/'fortran_order':\s*True/.test(header)) throw bad("its array is in Fortran's order; save numpy.ascontiguousarray of it");
  const kind = { "<f4": "F32", "<f8": "F64", "<f2": "F16" }[descr];
  if (!kind) throw bad(`it holds ${descr}; save it as float32`);
  return { shape, data: numbers(bytes.subarray(start + length), kind, shape, bad) };
}

/**
 * Which of the .safetensors files that were chosen, [name, bytes], is that of a file of edits: the one of its save, as
 * graphlens.interventions.load takes it. null where there is none.
 */
export async function besideOf(name, text, files, others) {
  let record = {};
  try {
    record = JSON.parse(text) ?? {};
  } catch { // readEdits says what is wrong with it
  }
  const wanted = record.safetensors_file ?? name.replace(/\.json$/i, ".safetensors");
  const found = files.find(([file]) => file === wanted) ?? (others === 0 && files.length === 1 ? files[0] : null);
  const digest = record.safetensors_sha256;
  if (found === null || digest === undefined || !globalThis.crypto?.subtle) return found; // not in a page of http:// from elsewhere
  const own = [...new Uint8Array(await crypto.subtle.digest("SHA-256", found[1]))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  if (own !== digest) throw new PageError(`${found[0]}: damaged, or of another save than ${name}: the digest differs.`);
  return found;
}

/** The arrays of a .safetensors file by name. */
export function readSafetensors(bytes, name) {
  const bad = (why) => new PageError(`${name}: ${why}.`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.length < 8 ? Infinity : Number(view.getBigUint64(0, true));
  if (length > bytes.length - 8) throw bad("this is no .safetensors file");
  let header;
  try {
    header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  } catch {
    throw bad("its header is no JSON");
  }
  const found = {};
  for (const [key, entry] of Object.entries(header)) {
    if (key === "__metadata__") continue;
    const [start, end] = entry.data_offsets;
    found[key] = { shape: entry.shape, data: numbers(bytes.subarray(8 + length + start, 8 + length + end), entry.dtype, entry.shape, bad) };
  }
  return found;
}

function numbers(bytes, kind, shape, bad) {
  const count = shape.reduce((a, b) => a * b, 1);
  const width = { F64: 8, F32: 4, F16: 2, BF16: 2 }[kind];
  if (!width) throw bad(`it holds ${kind}; save it as float32`);
  if (bytes.length < count * width) throw bad("it is cut short");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const word = new DataView(new ArrayBuffer(4));
  const read = {
    F64: (i) => view.getFloat64(8 * i, true),
    F32: (i) => view.getFloat32(4 * i, true),
    BF16: (i) => (word.setUint32(0, view.getUint16(2 * i, true) << 16), word.getFloat32(0)),
    F16: (i) => {
      const half = view.getUint16(2 * i, true);
      const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023];
      if (exponent === 31) return fraction ? NaN : sign * Infinity;
      return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
    },
  }[kind];
  return Array.from({ length: count }, (_, i) => read(i));
}
