// What every view needs: data, elements, numbers, colours, keys, tips. Text of the user's only ever becomes a text node.
"use strict";
const data = JSON.parse(document.getElementById("graphlens-data").textContent);
const kinds = {}; // of view -> function (host, view)

// Data: arrays are base64 of little-endian numbers, exactly those that Python had.
function decode(packed) {
  const bytes = Uint8Array.from(atob(packed.b), (c) => c.charCodeAt(0));
  return new { f4: Float32Array, f8: Float64Array, i4: Int32Array }[packed.t](bytes.buffer);
}

// Elements
function fill(node, kids) {
  for (const kid of kids.flat()) node.append(kid); // strings become text nodes
  return node;
}
function el(tag, attributes = {}, ...kids) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  return fill(node, kids);
}
function svg(tag, attributes = {}, ...kids) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return fill(node, kids);
}
let ids = 0;
function choice(name, options, chosen, changed) {
  const select = el("select", { id: `choice-${ids++}` }, ...options.map(([value, text]) => el("option", { value }, text)));
  select.value = chosen;
  select.addEventListener("change", () => changed(select.value));
  return el("label", { for: select.id }, el("span", {}, name), select);
}
function slider(name, least, most, value, said, changed) {
  const range = el("input", { type: "range", id: `choice-${ids++}`, min: least, max: most, value, step: 1 });
  const shown = el("output", { class: "mono", for: range.id }, said(value));
  range.addEventListener("input", () => {
    shown.textContent = said(Number(range.value));
    changed(Number(range.value));
  });
  return el("label", { for: range.id }, el("span", {}, name), range, shown);
}

// Numbers and labels for people
function short(value) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e5) return String(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(1);
  return size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 0.1 ? value.toFixed(2) : value.toPrecision(2);
}
function long(value) {
  return Number.isFinite(value) ? String(Number(value.toPrecision(7))) : short(value);
}
const LONGEST = 120; // characters of a token that are shown
function shown(text) {
  const cut = text.length > LONGEST ? `${text.slice(0, LONGEST - 20)}… (${text.length} characters)` : text;
  // Controls and marks that turn the direction of writing would disturb what stands beside them.
  const plain = cut.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu, (c) =>
    c === "\n" ? "↵" : c === "\t" ? "⇥" : `\\u{${c.codePointAt(0).toString(16)}}`);
  return plain === "" ? "∅" : plain.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

// Colours: blue to red around a middle, or nothing to blue; text on them is black or white, whichever is the clearer.
const root = document.documentElement;
let palette = {};
function readPalette() {
  const style = getComputedStyle(root);
  for (const name of ["paper", "ink", "warm", "cool", "missing"]) {
    palette[name] = style.getPropertyValue(`--${name}`).trim().split(/\s+/).map(Number);
  }
}
readPalette();
const repaints = [];
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readPalette();
  for (const repaint of repaints) repaint();
});
const blend = (from, to, share) => from.map((a, i) => Math.round(a + (to[i] - a) * share));
function luminance(colour) {
  const [r, g, b] = colour.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function inkOn(colour) {
  const light = luminance(colour); // contrast with white: 1.05 / (l + 0.05); with black: (l + 0.05) / 0.05
  return 1.05 / (light + 0.05) > (light + 0.05) / 0.05 ? "#fff" : "#000";
}
const css = (colour) => `rgb(${colour.join(" ")})`;
// A scale from the data's own range: diverging around `middle` where one is given, otherwise from `least` to `most`.
function scaleOf(least, most, middle = null) {
  if (middle !== null) {
    const span = Math.max(Math.abs(most - middle), Math.abs(least - middle)) || 1;
    return {
      ends: [middle - span, middle, middle + span],
      colour(value) {
        if (Number.isNaN(value)) return palette.missing;
        const share = Math.max(-1, Math.min(1, (value - middle) / span));
        return blend(palette.paper, share < 0 ? palette.cool : palette.warm, Math.abs(share));
      },
    };
  }
  const span = most - least || 1;
  return {
    ends: [least, most],
    colour(value) {
      if (Number.isNaN(value)) return palette.missing;
      return blend(palette.paper, palette.cool, Math.max(0, Math.min(1, (value - least) / span)));
    },
  };
}
function finiteRange(values) {
  let [least, most] = [Infinity, -Infinity];
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value < least) least = value;
    if (value > most) most = value;
  }
  return least > most ? [0, 0] : [least, most];
}
function paint(node, colour) {
  node.style.background = css(colour);
  node.style.color = inkOn(colour);
}
function legend(scale, named = {}) {
  const bar = el("span", { class: "bar", role: "img", "aria-label": "colour scale" });
  const stops = scale.ends.map((end) => css(scale.colour(end)));
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const texts = scale.ends.map((end, i) => `${short(end)}${named[i] ? ` (${named[i]})` : ""}`);
  const box = el("div", { class: "legend" }, el("span", {}, texts[0]), bar, el("span", {}, texts.at(-1)));
  if (texts.length === 3) box.append(el("span", {}, `middle: ${texts[1]}`));
  if (named.missing) {
    const key = el("span", { class: "bar" });
    key.style.width = "1.2rem";
    key.style.background = css(palette.missing);
    box.append(key, el("span", {}, named.missing));
  }
  return box;
}

// Tips: the same for the mouse and the keyboard, and spoken as the element's description.
const tip = el("div", { class: "tip", role: "tooltip", id: "tip", hidden: true });
document.body.append(tip);
function tipped(node, said) {
  const show = () => {
    tip.textContent = said();
    tip.hidden = false;
    const [at, own] = [node.getBoundingClientRect(), tip.getBoundingClientRect()];
    const below = at.bottom + 6 + own.height <= innerHeight;
    tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - own.width - 4))}px`;
    tip.style.top = `${Math.max(4, below ? at.bottom + 6 : at.top - own.height - 6)}px`;
    node.setAttribute("aria-describedby", "tip");
  };
  const hide = () => {
    tip.hidden = true;
    node.removeAttribute("aria-describedby");
  };
  node.addEventListener("mouseenter", show);
  node.addEventListener("focus", show);
  node.addEventListener("mouseleave", hide);
  node.addEventListener("blur", hide);
}
document.addEventListener("keydown", (event) => event.key === "Escape" && (tip.hidden = true));

// Keys: one stop of Tab for a grid; arrows, Home and End move in it.
function roving(items, columns, start = 0) {
  items.forEach((item, i) => {
    item.tabIndex = i === start ? 0 : -1;
    item.addEventListener("focus", () => {
      for (const other of items) if (other.tabIndex === 0) other.tabIndex = -1;
      item.tabIndex = 0;
    });
    item.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
      const row = i - (i % columns);
      const to = { Home: row, End: Math.min(row + columns, items.length) - 1 }[event.key] ?? i + steps[event.key];
      if (Number.isNaN(to)) return;
      event.preventDefault();
      items[to]?.focus();
    });
  });
}

// A token as an element; `details` is what its tip says besides, `position` which one it is of the prompt.
function token(text, index, details = () => "", position = index) {
  const node = el("span", { class: "tok", "data-index": index }, el("span", {}, shown(text)));
  tipped(node, () => [`${position}: ${shown(text)}`, details()].filter(Boolean).join("\n"));
  return node;
}

// A table of numbers in colour, or a picture of it where the cells are too many for numbers.
const MOST_CELLS = 6000;
function cells(host, { rows, columns, value, colour, text = null, tell, rowAxis = "", columnAxis = "", word = false }) {
  if (rows.length * columns.length > MOST_CELLS) return picture(host, { rows, columns, value, colour, tell, rowAxis, columnAxis });
  const items = [];
  const head = el("tr", {}, el("th", { scope: "col" }, [rowAxis, columnAxis].filter(Boolean).join(" \\ ")), ...columns.map((c) => el("th", { scope: "col", title: shown(c) }, shown(c))));
  const body = rows.map((row, i) =>
    el("tr", {}, el("th", { scope: "row", title: shown(row) }, shown(row)), ...columns.map((_, j) => {
      const number = value(i, j);
      const cell = el("td", { "data-value": number, class: [Number.isNaN(number) && "missing", word && "word"].filter(Boolean).join(" ") || null }, text ? text(i, j) : short(number));
      if (!Number.isNaN(number)) paint(cell, colour(i, j));
      tipped(cell, () => tell(i, j));
      items.push(cell);
      return cell;
    })));
  roving(items, columns.length);
  host.replaceChildren(el("div", { class: "scroll" }, el("table", { class: "cells", role: "grid" }, el("thead", {}, head), el("tbody", {}, ...body))));
}

// A picture of a matrix: a pixel for each entry, a readout for the one under the mouse or the cursor of the keyboard.
function picture(host, { rows, columns, value, colour, tell, rowAxis = "", columnAxis = "", side = 460, hovered = () => {} }) {
  const canvas = el("canvas", { class: "map", tabindex: 0, role: "img", width: columns.length, height: rows.length,
    "aria-label": `${rows.length} ${rowAxis || "rows"} by ${columns.length} ${columnAxis || "columns"}; the arrow keys read entries` });
  const size = Math.max(1, Math.min(28, Math.floor(side / Math.max(rows.length, columns.length))));
  canvas.style.width = `${columns.length * size}px`;
  canvas.style.aspectRatio = `${columns.length} / ${rows.length}`;
  drawPixels(canvas, rows.length, columns.length, colour);
  const readout = el("output", { class: "readout mono" }, "hover the map, or focus it and use the arrow keys");
  let [i, j] = [0, 0];
  const read = () => {
    readout.textContent = tell(i, j);
    readout.dataset.value = value(i, j);
    hovered(i, j);
  };
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    j = Math.max(0, Math.min(columns.length - 1, Math.floor(((event.clientX - box.left) / box.width) * columns.length)));
    i = Math.max(0, Math.min(rows.length - 1, Math.floor(((event.clientY - box.top) / box.height) * rows.length)));
    read();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    i = Math.max(0, Math.min(rows.length - 1, i + step[0]));
    j = Math.max(0, Math.min(columns.length - 1, j + step[1]));
    read();
  });
  const axes = [rowAxis && `rows: ${rowAxis}`, columnAxis && `columns: ${columnAxis}`].filter(Boolean).join(", ");
  host.replaceChildren(el("div", { class: "axis" }, axes), canvas, readout);
}
function drawPixels(canvas, height, width, colour) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < height; i++) {
    for (let j = 0; j < width; j++) {
      const [r, g, b] = colour(i, j);
      image.data.set([r, g, b, 255], 4 * (i * width + j));
    }
  }
  context.putImageData(image, 0, 0);
}
