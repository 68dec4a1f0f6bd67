// A map of any two axes of named values; an entry of each other axis is picked by a slider.
kinds.heat = (host, view) => {
  const { axes, labels } = view;
  const values = decode(view.values);
  const middles = decode(view.baseline); // one, or one for each entry of the axes in view.baselineAxes
  const sizes = axes.map((axis) => labels[axis].length);
  const strides = sizes.map((_, i) => sizes.slice(i + 1).reduce((a, b) => a * b, 1));
  const at = Object.fromEntries(axes.map((axis) => [axis, 0]));
  let [down, across] = [view.rows, view.columns];
  const own = view.ownRange ?? false; // of each metric
  const offset = (place) => axes.reduce((sum, axis, i) => sum + place[axis] * strides[i], 0);
  const middle = (place) => {
    let index = 0;
    for (const axis of view.baselineAxes) index = index * labels[axis].length + place[axis];
    return middles[index];
  };
  const place = (i, j) => ({ ...at, ...(down ? { [down]: i } : {}), ...(across ? { [across]: j } : {}) });
  const box = el("div", {});
  const below = el("div", {});
  const sliders = el("div", { class: "controls" });
  function draw() {
    const rows = down ? labels[down] : [""];
    const columns = across ? labels[across] : [""];
    // One colour scale for all entries of the sliders, so that maps can be compared; metrics have scales of their own.
    let distance = 0;
    const every = [];
    for (let i = 0; i < values.length; i++) {
      const here = {};
      axes.forEach((axis, k) => { here[axis] = Math.floor(i / strides[k]) % sizes[k]; });
      if (own && here[axes[0]] !== at[axes[0]] && axes[0] !== down && axes[0] !== across) continue;
      const value = values[i];
      if (!Number.isFinite(value)) continue;
      every.push(value);
      if (view.diverges) distance = Math.max(distance, Math.abs(value - middle(here)));
    }
    const varies = view.diverges && view.baselineAxes.some((axis) => axis === down || axis === across);
    const centre = view.diverges && !varies ? middle(place(0, 0)) : 0;
    const [least, most] = finiteRange(every);
    // Where the baseline differs between cells, the colour is of the distance from it.
    const scale = view.diverges ? scaleOf(centre - (distance || 1), centre + (distance || 1), centre) : scaleOf(Math.min(least, view.from ?? least), most);
    const shift = (i, j) => (varies ? middle(place(i, j)) : 0);
    const value = (i, j) => values[offset(place(i, j))];
    const tell = (i, j) => [
      ...axes.map((axis) => `${axis} ${shown(labels[axis][place(i, j)[axis]])}`),
      `${view.name}: ${long(value(i, j))}`,
      ...(view.diverges ? [`from ${view.middleName} ${long(middle(place(i, j)))}: ${long(value(i, j) - middle(place(i, j)))}`] : []),
    ].join("\n");
    const coloured = { ends: scale.ends, colour: scale.colour };
    const shifted = varies ? { ends: scale.ends, colour: (v) => scale.colour(v) } : coloured;
    const items = cells(box, { rows, columns, value, scale: shifted, tell, rowAxis: down ?? "", columnAxis: across ?? "" });
    if (varies) items.forEach((cell, k) => {
      const [i, j] = [Math.floor(k / columns.length), k % columns.length];
      if (!Number.isNaN(value(i, j))) paint(cell, scale.colour(value(i, j) - shift(i, j)));
    });
    const missing = values.some(Number.isNaN) ? "not computed (NaN)" : null;
    below.replaceChildren(legend(scale, { ...(view.diverges ? { 1: view.middleName } : {}), missing }));
  }
  function drawSliders() {
    const rest = axes.filter((axis) => axis !== down && axis !== across);
    sliders.replaceChildren(...rest.map((axis) =>
      labels[axis].length > 1
        ? slider(axis, 0, labels[axis].length - 1, at[axis], (i) => shown(labels[axis][i]), (i) => { at[axis] = i; draw(); })
        : el("span", { class: "axis" }, `${axis} ${shown(labels[axis][0])}`)));
  }
  const pickers = el("div", { class: "controls" });
  function drawPickers() {
    if (axes.length < 2) return;
    const free = axes.map((axis) => [axis, axis]);
    pickers.replaceChildren(
      choice("Rows", free, down, (axis) => { if (axis === across) across = down; down = axis; redraw(); }),
      choice("Columns", free, across, (axis) => { if (axis === down) down = across; across = axis; redraw(); }));
  }
  function redraw() {
    drawPickers();
    drawSliders();
    draw();
  }
  host.replaceChildren(pickers, sliders, box, below);
  redraw();
  repaints.push(draw);
};
