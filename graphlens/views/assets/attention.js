// Attention: a grid of heads to pick from, what each token looks at in the head picked, a summary of each layer.
kinds.attention = (host, view) => {
  const { tokens, places, layers, numbers, queries, offset, statistics, triangle } = view; // numbers: of the heads; places: of the tokens in the prompt
  const heads = numbers.length;
  const flat = decode(view.patterns);
  const keys = tokens.length;
  const each = triangle ? (queries * (queries + 1)) / 2 : queries * keys;
  // The entry of a head: where nothing looks ahead, only what is not above the diagonal was sent.
  const weight = (layer, head, i, j) => {
    const at = (layer * heads + head) * each;
    if (!triangle) return flat[at + i * keys + j];
    return j > i ? 0 : flat[at + (i * (i + 1)) / 2 + j];
  };
  const scale = scaleOf(0, 1);
  const names = Object.keys(statistics);
  const figures = Object.fromEntries(names.map((name) => [name, decode(statistics[name])]));
  let [layer, head, query, looked, cellsShow] = [0, 0, queries - 1, "from", layers.length * heads > 1024 ? names[0] : "pattern"];

  // The grid of heads
  const grid = el("div", { class: "heads", role: "radiogroup", "aria-label": "heads" });
  let buttons = [];
  function drawGrid() {
    const side = Math.max(20, Math.min(96, Math.floor(620 / Math.max(heads, 4)) - 6));
    const isNumber = cellsShow !== "pattern";
    const statistic = isNumber ? figures[cellsShow] : null;
    const colours = isNumber ? scaleOf(Math.min(0, finiteRange(statistic)[0]), finiteRange(statistic)[1]) : null;
    grid.style.gridTemplateColumns = `repeat(${heads + 1 + (isNumber ? 1 : 0)}, max-content)`;
    buttons = [];
    const placed = [el("span", { class: "mono" }), ...numbers.map((h) => el("span", { class: "mono" }, `H${h}`))];
    if (isNumber) placed.push(el("span", { class: "mono" }, "mean"));
    layers.forEach((number, l) => {
      placed.push(el("span", { class: "mono" }, `L${number}`));
      for (let h = 0; h < heads; h++) {
        const button = el("button", { type: "button", role: "radio", "aria-label": `layer ${number} head ${numbers[h]}`, "data-head": `${number}.${numbers[h]}` });
        if (isNumber) {
          const value = statistic[l * heads + h];
          button.classList.add("number");
          button.textContent = short(value);
          button.dataset.value = value;
          paint(button, colours.colour(value));
        } else {
          const canvas = el("canvas", { "aria-hidden": "true" });
          drawPixels(canvas, queries, keys, (i, j) => scale.colour(weight(l, h, i, j)));
          canvas.style.width = canvas.style.height = `${side}px`;
          button.append(canvas);
        }
        tipped(button, () => [`layer ${number}, head ${numbers[h]}`, ...names.map((name) => `${name}: ${long(figures[name][l * heads + h])}`)].join("\n"));
        button.addEventListener("click", () => pick(l, h));
        buttons.push(button);
        placed.push(button);
      }
      if (isNumber) {
        const row = statistic.slice(l * heads, (l + 1) * heads);
        const mean = row.reduce((a, b) => a + b, 0) / heads;
        const box = el("span", { class: "mean", "data-value": mean }, short(mean));
        paint(box, colours.colour(mean));
        placed.push(box);
      }
    });
    grid.replaceChildren(...placed);
    roving(buttons, heads, layer * heads + head);
    mark();
  }
  function mark() {
    buttons.forEach((button, i) => {
      const on = i === layer * heads + head;
      button.classList.toggle("on", on);
      button.setAttribute("aria-checked", String(on));
    });
  }

  // The head picked
  const title = el("h3", { class: "mono" });
  const strip = el("div", { class: "tokens", role: "group", "aria-label": "tokens" });
  const says = el("p", { class: "dim" });
  const big = el("div", {});
  const chips = tokens.map((text, index) => {
    const chip = token(text, index, () => `attention ${looked} token ${places[own()]}: ${long(shownWeight(index))}`, places[index]);
    chip.append(el("small", {}));
    const look = () => {
      if (looked === "from" && index < offset) return; // no query there
      query = looked === "from" ? index - offset : index;
      drawStrip();
    };
    // Before the tip, which says what the token shows then.
    chip.addEventListener("mouseenter", look, { capture: true });
    chip.addEventListener("focus", look, { capture: true });
    chip.addEventListener("click", () => { look(); tell(); });
    return chip;
  });
  strip.append(...chips);
  roving(chips, chips.length, queries - 1 + offset);
  // "from" shows where one query looks; "to" which queries look at one key.
  const shownWeight = (index) =>
    looked === "from" ? weight(layer, head, query, index) : index < offset ? NaN : weight(layer, head, index - offset, query);
  const own = () => (looked === "from" ? query + offset : query); // the token that is hovered
  function drawStrip() {
    chips.forEach((chip, index) => {
      const value = shownWeight(index);
      chip.dataset.value = value;
      chip.lastChild.textContent = Number.isNaN(value) ? "" : value < 0.005 ? "" : value.toFixed(2);
      paint(chip, scale.colour(Number.isNaN(value) ? 0 : value));
      chip.classList.toggle("on", index === own());
    });
    says.textContent = looked === "from"
      ? `What token ${places[own()]} (${shown(tokens[own()])}) looks at; hover or focus another.`
      : `Which tokens look at token ${places[own()]} (${shown(tokens[own()])}); hover or focus another.`;
  }
  function drawBig() {
    const columns = tokens;
    picture(big, {
      rows: tokens.slice(offset), columns, value: (i, j) => weight(layer, head, i, j), colour: (i, j) => scale.colour(weight(layer, head, i, j)), side: 420,
      rowAxis: "query (looks)", columnAxis: "key (is looked at)",
      tell: (i, j) => `${shown(tokens[i + offset])} (${places[i + offset]}) → ${shown(tokens[j])} (${places[j]}): ${long(weight(layer, head, i, j))}`,
      hovered: (i, j) => {
        query = looked === "from" ? i : j;
        drawStrip();
      },
    });
  }
  function pick(l, h) {
    [layer, head] = [l, h];
    title.textContent = `layer ${layers[layer]}, head ${numbers[head]}`;
    mark();
    drawStrip();
    drawBig();
    tell();
  }
  // Inside a widget (see widget.js) the page that holds this one is told what is picked, and may pick.
  function tell() {
    if (parent === window) return;
    parent.postMessage({ graphlens: "picked", layer: layers[layer], head: numbers[head], token: own() }, "*");
  }
  addEventListener("message", (event) => {
    if (event.source !== parent || event.data?.graphlens !== "pick") return;
    const [l, h] = [layers.indexOf(event.data.layer), numbers.indexOf(event.data.head)];
    if (l >= 0 && h >= 0 && (l !== layer || h !== head)) pick(l, h);
  });

  // A row for each layer: the mean over its heads, and the head that has most
  const summary = el("table", { class: "rows", "data-table": "layers" });
  summary.append(el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), ...names.map((name) => el("th", { scope: "col" }, `${name}: mean (most)`)))));
  summary.append(el("tbody", {}, ...layers.map((number, l) => el("tr", {}, el("th", { scope: "row" }, `L${number}`), ...names.map((name) => {
    const row = Array.from(figures[name].slice(l * heads, (l + 1) * heads));
    const mean = row.reduce((a, b) => a + b, 0) / heads;
    const most = row.indexOf(Math.max(...row));
    const button = el("button", { type: "button" }, `H${numbers[most]} ${short(row[most])}`);
    button.addEventListener("click", () => pick(l, most));
    return el("td", { "data-value": mean }, `${short(mean)}  `, most < 0 ? "" : button);
  })))));

  const options = [["pattern", "patterns"], ...names.map((name) => [name, name])];
  host.replaceChildren(
    el("div", { class: "controls" },
      choice("The grid shows", layers.length * heads > 1024 ? options.slice(1) : options, cellsShow, (value) => { cellsShow = value; drawGrid(); }),
      choice("Colour tokens by", [["from", "attention from the token under the mouse"], ["to", "attention to it"]], looked, (value) => {
        query = value === "to" ? query + offset : Math.max(0, query - offset);
        looked = value;
        drawStrip();
      })),
    el("div", { class: "columns" },
      el("div", {}, el("div", { class: "scroll taller" }, grid)),
      el("div", { class: "wide" }, title, says, strip, el("div", { class: "legend-here" }, legend(scale)), el("div", { class: "scroll" }, big))),
    el("details", {}, el("summary", {}, "Summary of each layer"), el("div", { class: "scroll" }, summary)),
  );
  const [first, second] = view.start ?? [0, 0];
  [layer, head] = [first, second];
  drawGrid();
  pick(first, second);
  repaints.push(() => { drawGrid(); pick(layer, head); host.querySelector(".legend-here").replaceChildren(legend(scale)); });
};
