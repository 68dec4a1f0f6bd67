// An attribution graph: a column for each token, a row for each layer; the edges of the node that is picked, and its lists.
kinds.attribution = (host, view) => {
  const [values, influence, sources, targets, weights] = [view.values, view.influence, view.sources, view.targets, view.weights].map(decode);
  const nodes = view.nodes.map(([kind, layer, position, label], index) => ({ kind, layer, position, label, index }));
  const ends = nodes.filter((node) => node.kind === "token" || node.kind === "logit");
  const inner = nodes.filter((node) => node.kind === "feature" || node.kind === "error").sort((a, b) => influence[b.index] - influence[a.index]);
  const [into, outOf] = [nodes.map(() => []), nodes.map(() => [])];
  for (let i = 0; i < weights.length; i++) { into[targets[i]].push(i); outOf[sources[i]].push(i); }
  let count = Math.min(view.start, inner.length);
  let picked = ends.filter((node) => node.kind === "logit").sort((a, b) => values[b.index] - values[a.index])[0]?.index ?? null;
  const box = el("div", { class: "scroll" });
  const list = el("div", { class: "tall" });
  const STEP = 15, ACROSS = 5, LEFT = 46, FOOT = 34, MOST = 40; // MOST: edges of a node that are drawn and listed, on either side
  const byWeight = (edges) => edges.sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a])).slice(0, MOST);
  const what = { feature: "activation", error: "norm", token: "norm", logit: "probability" };
  function draw() {
    const drawn = [...ends, ...inner.slice(0, count)].sort((a, b) => a.index - b.index);
    const shows = new Set(drawn.map((node) => node.index));
    const rows = [...new Set(drawn.map((node) => node.layer))].sort((a, b) => a - b);
    const cells = new Map();
    for (const node of drawn) {
      const key = `${node.position} ${node.layer}`;
      cells.set(key, [...(cells.get(key) ?? []), node]);
    }
    const widths = view.tokens.map((text, p) => Math.max(2, Math.min(7, shown(text).length * 0.5), ...rows.map((row) => Math.min(ACROSS, (cells.get(`${p} ${row}`) ?? []).length))) * STEP + 12);
    const starts = widths.map((_, p) => LEFT + widths.slice(0, p).reduce((a, b) => a + b, 0));
    const lines = rows.map((row) => Math.max(...view.tokens.map((_, p) => Math.ceil((cells.get(`${p} ${row}`) ?? []).length / ACROSS)), 1));
    const heights = lines.map((count) => count * STEP + 34);
    const [width, height] = [LEFT + widths.reduce((a, b) => a + b, 0) + 10, heights.reduce((a, b) => a + b, FOOT)];
    const middles = rows.map((_, r) => height - FOOT - heights.slice(0, r).reduce((a, b) => a + b, 0) - heights[r] / 2);
    const place = new Map();
    for (const cell of cells.values()) {
      cell.forEach((node, i) => {
        const [line, deep] = [Math.floor(i / ACROSS), Math.ceil(cell.length / ACROSS)];
        const many = Math.min(ACROSS, cell.length - line * ACROSS);
        place.set(node.index, {
          x: starts[node.position] + widths[node.position] / 2 + ((i % ACROSS) - (many - 1) / 2) * STEP,
          y: middles[rows.indexOf(node.layer)] + (line - (deep - 1) / 2) * STEP,
        });
      });
    }
    const near = (edges) => byWeight(edges.filter((i) => shows.has(sources[i]) && shows.has(targets[i])));
    const edges = picked === null ? [] : [...near(into[picked]), ...near(outOf[picked])];
    const strongest = Math.max(...edges.map((i) => Math.abs(weights[i])), 0) || 1;
    const name = (i) => `${nodes[sources[i]].label} → ${nodes[targets[i]].label}`;
    const paths = edges.map((i) => {
      const [a, b] = [place.get(sources[i]), place.get(targets[i])];
      const bend = (a.y - b.y) / 2;
      return svg("path", {
        d: `M ${a.x} ${a.y} C ${a.x} ${a.y - bend} ${b.x} ${b.y + bend} ${b.x} ${b.y}`,
        "stroke-width": 0.7 + (4 * Math.abs(weights[i])) / strongest, class: weights[i] < 0 ? "down" : "up", "data-edge": name(i), "data-value": weights[i],
      }, svg("title", {}, `${name(i)}: ${long(weights[i])}`));
    });
    const marks = drawn.map((node) => {
      const { x, y } = place.get(node.index);
      const said = `${shown(node.label)}: ${what[node.kind]} ${short(values[node.index])}${node.kind === "logit" ? "" : `, influence ${short(influence[node.index])}`}`;
      const mark = svg("g", { class: `mark ${node.kind}`, "data-node": node.label, role: "button", "aria-label": said, tabindex: 0 },
        node.kind === "feature" ? svg("circle", { cx: x, cy: y, r: 5 })
          : node.kind === "error" ? svg("path", { d: `M ${x} ${y - 6} l 6 6 l -6 6 l -6 -6 z` }) : svg("rect", { x: x - 5, y: y - 5, width: 10, height: 10 }),
        svg("title", {}, said));
      const pick = () => { picked = picked === node.index ? null : node.index; draw(); host.querySelector(`[data-node="${CSS.escape(node.label)}"]`)?.focus(); };
      mark.addEventListener("click", pick);
      mark.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), pick()));
      if (node.index === picked) mark.classList.add("on");
      return mark;
    });
    const blocks = nodes.reduce((most, node) => Math.max(most, node.layer), 0);
    const layers = rows.map((row, r) => svg("text", { class: "layer", x: LEFT - 8, y: middles[r] }, row < 0 ? "token" : row === blocks ? "logit" : `L${row}`));
    const texts = view.tokens.map((text, p) => svg("text", { class: "word", x: starts[p] + widths[p] / 2, y: height - 14 }, shown(text).slice(0, 14)));
    box.replaceChildren(svg("svg", { class: "graph attribution", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `${drawn.length} nodes of ${nodes.length}` }, ...paths, ...layers, ...texts, ...marks));
    const rowsOf = (head, some, other) => some.length === 0 ? [] : [el("table", { class: "rows" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, head), el("th", { scope: "col", class: "number" }, "effect"))),
      el("tbody", {}, ...some.map((i) => el("tr", {}, el("td", {}, shown(nodes[other[i]].label)), el("td", { class: "number", "data-value": weights[i], "data-label": name(i) }, long(weights[i]))))))];
    list.replaceChildren(...(picked === null ? [el("p", { class: "dim" }, "Pick a node to see what acts on it, and on what it acts.")]
      : [el("p", {}, shown(nodes[picked].label)), ...rowsOf("from", byWeight([...into[picked]]), sources), ...rowsOf("to", byWeight([...outOf[picked]]), targets)]));
  }
  host.replaceChildren(
    ...(inner.length > 1 ? [el("div", { class: "controls" }, slider("Nodes of most influence", 1, inner.length, count, (n) => `${n} of ${inner.length}`, (n) => { count = n; draw(); }))] : []),
    el("div", { class: "columns" }, box, list),
    el("p", { class: "axis" }, "Circles: features. Diamonds: what transcoders leave out. Squares: tokens and logits. Solid, red: the effect adds. Dashed, blue: it takes away. Pick a node for its edges."));
  draw();
};
