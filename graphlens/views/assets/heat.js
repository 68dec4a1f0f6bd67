// A map of any two axes of named values; an entry of each other axis is picked by a slider.
kinds.heat = (host, view) => {
  const { axes, labels } = view;
  const values = decode(view.values);
  const middles = decode(view.baseline); // one, or one for each entry of the axes in view.baselineAxes
  const sizes = axes.map((axis) => labels[axis].length);
  const strides = sizes.map((_, i) => sizes.slice(i + 1).reduce((a, b) => a * b, 1));
  const at = Object.fromEntries(axes.map((axis) => [axis, 0]));
  let [down, across, shows] = [view.rows, view.columns, "value"];
  const offset = (place) => axes.reduce((sum, axis, i) => sum + place[axis] * strides[i], 0);
  const middle = (place) => {
    let index = 0;
    for (const axis of view.baselineAxes) index = index * labels[axis].length + place[axis];
    return middles[index];
  };
  const place = (i, j) => ({ ...at, ...(down ? { [down]: i } : {}), ...(across ? { [across]: j } : {}) });
  // The least and the most value, and the largest distance from the baseline: of all entries, or of one metric's.
  const ranges = {};
  function rangeOf(metric) {
    if (ranges[metric]) return ranges[metric];
    const parts = view.baselineAxes.map((axis) => axes.indexOf(axis));
    const [from, to] = metric === "all" ? [0, values.length] : [metric * strides[0], (metric + 1) * strides[0]];
    let [least, most, distance] = [Infinity, -Infinity, 0];
    for (let i = from; i < to; i++) {
      const value = values[i];
      if (!Number.isFinite(value)) continue;
      if (value < least) least = value;
      if (value > most) most = value;
      let index = 0;
      for (const k of parts) index = index * sizes[k] + (Math.floor(i / strides[k]) % sizes[k]);
      distance = Math.max(distance, Math.abs(value - middles[index]));
    }
    return (ranges[metric] = least > most ? [0, 0, 0] : [least, most, distance]);
  }
  const box = el("div", {});
  const below = el("div", {});
  const sliders = el("div", { class: "controls" });
  function draw() {
    const rows = down ? labels[down] : [""];
    const columns = across ? labels[across] : [""];
    // One colour scale for all entries of the sliders, so that maps can be compared; metrics have scales of their own.
    const ofMetric = axes[0] === "metric" && down !== "metric" && across !== "metric";
    const [least, most, distance] = rangeOf(ofMetric ? at.metric : "all");
    const varies = view.diverges && view.baselineAxes.some((axis) => axis === down || axis === across);
    const centre = view.diverges && !varies ? middle(place(0, 0)) : 0;
    // Where the baseline differs between cells, the colour is of the distance from it.
    const scale = view.diverges ? scaleOf(centre - (distance || 1), centre + (distance || 1), centre) : scaleOf(least, most);
    const value = (i, j) => values[offset(place(i, j))];
    const tell = (i, j) => [
      ...axes.map((axis) => `${axis} ${shown(labels[axis][place(i, j)[axis]])}`),
      `${view.name}: ${long(value(i, j))}`,
      ...(view.diverges ? [`from ${view.middleName} ${long(middle(place(i, j)))}: ${long(value(i, j) - middle(place(i, j)))}`] : []),
    ].join("\n");
    const colour = (i, j) => scale.colour(varies ? value(i, j) - middle(place(i, j)) : value(i, j));
    // Values that are all near the baseline differ in digits that a cell has no room for: then their distance says more.
    const text = (i, j) => {
      const number = value(i, j);
      if (Number.isNaN(number) && view.missing) return "";
      return short(shows === "value" ? number : number - middle(place(i, j)));
    };
    cells(box, { rows, columns, value, colour, text, tell, rowAxis: down ?? "", columnAxis: across ?? "" });
    const missing = values.some(Number.isNaN) ? (view.missing ?? "not computed (NaN)") : null;
    below.replaceChildren(legend(scale, { ...(view.diverges ? { 1: varies ? `distance from ${view.middleName}` : view.middleName } : {}), missing }));
  }
  function drawSliders() {
    const rest = axes.filter((axis) => axis !== down && axis !== across);
    sliders.replaceChildren(...rest.map((axis) =>
      axis === "metric" && labels[axis].length > 1
        ? choice(axis, labels[axis].map((label, i) => [i, label]), at[axis], (i) => { at[axis] = Number(i); draw(); })
        : labels[axis].length > 1
        ? slider(axis, 0, labels[axis].length - 1, at[axis], (i) => shown(labels[axis][i]), (i) => { at[axis] = i; draw(); })
        : el("span", { class: "axis" }, `${axis} ${shown(labels[axis][0])}`)));
  }
  const pickers = el("div", { class: "controls" });
  function drawPickers() {
    const free = axes.map((axis) => [axis, axis]);
    const which = axes.length < 2 ? [] : [
      choice("Rows", free, down, (axis) => { if (axis === across) across = down; down = axis; redraw(); }),
      choice("Columns", free, across, (axis) => { if (axis === down) down = across; across = axis; redraw(); }),
    ];
    const distances = view.diverges && middles.some((number) => number !== 0)
      ? [choice("Cells show", [["value", view.name], ["distance", `distance from ${view.middleName}`]], shows, (value) => { shows = value; draw(); })]
      : [];
    pickers.replaceChildren(...which, ...distances);
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
