// The graph of a circuit: components by layer, the strongest edges between them, width by strength.
kinds.circuit = (host, view) => {
  const { nodes, edges, name } = view; // nodes: {id, layer, row, column}; edges: [from, to, label], strongest first
  const values = decode(view.values);
  let [count, picked] = [Math.min(view.start, edges.length), null];
  const box = el("div", { class: "scroll" });
  const list = el("div", { class: "tall" });
  const WIDTH = 62, HEIGHT = 24, ROW = 74, MARGIN = 56;
  function draw() {
    const used = new Set();
    for (const [from, to] of edges.slice(0, count)) { used.add(from); used.add(to); }
    const drawn = nodes.map((node, index) => ({ ...node, index })).filter((node) => used.has(node.index));
    const rows = [...new Set(drawn.map((node) => node.row))].sort((a, b) => a - b);
    // Heads have a column each, those that are drawn at all; MLPs the one after them; the ends stand in the middle.
    const columns = [...new Set(drawn.filter((node) => node.kind === "head").map((node) => node.column))].sort((a, b) => a - b);
    const width = MARGIN + (columns.length + 1) * (WIDTH + 18) + 60;
    const height = rows.length * ROW + 10;
    const xOf = (node) => {
      const column = node.kind === "head" ? columns.indexOf(node.column) : node.kind === "mlp" ? columns.length : columns.length / 2;
      return MARGIN + (WIDTH + 18) * (column + 0.5);
    };
    const place = new Map(drawn.map((node) => [node.index, { x: xOf(node), r: rows.indexOf(node.row), y: height - ROW / 2 - rows.indexOf(node.row) * ROW }]));
    const strongest = Math.max(...Array.from(values.slice(0, count), Math.abs)) || 1;
    const lines = edges.slice(0, count).map(([from, to, label], i) => {
      const [a, b] = [place.get(from), place.get(to)];
      const [top, bottom] = [b.y + HEIGHT / 2, a.y - HEIGHT / 2];
      const bend = Math.abs(top - bottom) / 2 + 6;
      // An edge to a component right above would run behind those between them: it goes around.
      const side = Math.abs(a.x - b.x) < 8 && b.r - a.r > 1 ? 30 + 12 * (b.r - a.r) : 0;
      const path = svg("path", {
        d: `M ${a.x} ${bottom} C ${a.x + side} ${bottom - (side ? 10 : bend)} ${b.x + side} ${top + (side ? 10 : bend)} ${b.x} ${top}`,
        "stroke-width": 0.8 + (5 * Math.abs(values[i])) / strongest, class: values[i] < 0 ? "down" : "up", "data-edge": label, "data-value": values[i],
      }, svg("title", {}, `${label}: ${long(values[i])}`));
      if (picked !== null && (from === picked || to === picked)) path.classList.add("on");
      return path;
    });
    const boxes = drawn.map((node) => {
      const { x, y } = place.get(node.index);
      const group = svg("g", { class: "node", "data-node": node.id, role: "button", "aria-label": node.id, tabindex: 0 },
        svg("rect", { x: x - WIDTH / 2, y: y - HEIGHT / 2, width: WIDTH, height: HEIGHT, rx: 5 }), svg("text", { x, y }, node.id));
      const pick = (index) => { picked = picked === index ? null : index; draw(); host.querySelector(`[data-node="${CSS.escape(node.id)}"]`)?.focus(); };
      group.addEventListener("click", () => pick(node.index));
      group.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), pick(node.index)));
      if (node.index === picked) group.classList.add("on");
      return group;
    });
    const layers = rows.map((row, r) => {
      const { layer } = drawn.find((node) => node.row === row);
      return svg("text", { class: "layer", x: MARGIN - 14, y: height - ROW / 2 - r * ROW }, layer);
    });
    const graph = svg("svg", { class: picked === null ? "graph" : "graph some", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `${count} edges of ${edges.length}` }, ...lines, ...layers, ...boxes);
    box.replaceChildren(graph);
    const shownEdges = edges.slice(0, count).map((edge, i) => [edge, values[i]]).filter(([[from, to]]) => picked === null || from === picked || to === picked);
    list.replaceChildren(el("table", { class: "rows" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "edge"), el("th", { scope: "col", class: "number" }, name))),
      el("tbody", {}, ...shownEdges.map(([[, , label], value]) => el("tr", {}, el("td", {}, label), el("td", { class: "number", "data-value": value, "data-label": label }, long(value)))))));
  }
  host.replaceChildren(
    el("div", { class: "controls" }, slider("Strongest edges", 1, edges.length, count, (n) => `${n} of ${view.total}`, (n) => { count = n; picked = null; draw(); })),
    el("div", { class: "columns" }, box, list),
    el("p", { class: "axis" }, "Solid, red: the edge adds to the metric. Dashed, blue: it takes away. Width goes by size. Pick a component to see its edges alone."));
  draw();
};
