// Bars: a number for each label, to the right of zero and to its left.
kinds.bars = (host, view) => {
  const values = decode(view.values);
  const { labels, adds } = view; // adds: whether a sum of values means something
  const FEW = 40;
  let [order, every] = [view.order, false];
  const grid = el("div", { class: "bars" });
  const note = el("p", { class: "axis" });
  const [least, most] = finiteRange(values);
  const [from, to] = [Math.min(0, least), Math.max(0, most)];
  const span = to - from || 1;
  const percent = (value) => `${(100 * (value - from)) / span}%`;
  function draw() {
    const by = {
      given: () => 0,
      size: (a, b) => (Math.abs(values[b]) || 0) - (Math.abs(values[a]) || 0),
      value: (a, b) => (values[b] || 0) - (values[a] || 0),
    }[order];
    const sorted = labels.map((_, i) => i).sort(by);
    const drawn = every ? sorted : sorted.slice(0, FEW);
    const rows = drawn.map((i) => {
      const value = values[i];
      const track = el("span", { class: "track" });
      if (Number.isFinite(value)) {
        const bar = el("i");
        bar.style.left = percent(Math.min(0, value));
        bar.style.width = `${(100 * Math.abs(value)) / span}%`;
        bar.style.background = css(value < 0 ? palette.cool : palette.warm);
        track.append(bar);
      }
      const zero = el("b");
      zero.style.left = percent(0);
      track.append(zero);
      const name = el("span", { class: "name mono", title: shown(labels[i]) }, shown(labels[i]));
      const number = el("span", { class: "mono", "data-value": value, "data-label": labels[i] }, value > 0 ? `+${short(value)}` : short(value));
      tipped(number, () => `${shown(labels[i])}: ${long(value)}`);
      return [name, track, number];
    });
    grid.replaceChildren(...rows.flat());
    roving([...grid.querySelectorAll("[data-value]")], 1);
    const rest = sorted.slice(drawn.length).reduce((sum, i) => sum + (Number.isFinite(values[i]) ? values[i] : 0), 0);
    note.textContent = drawn.length < labels.length
      ? `${drawn.length} of ${labels.length} are shown${adds ? `; the others sum to ${short(rest)}` : ""}.` : "";
    more.hidden = labels.length <= FEW;
    more.textContent = every ? `Show the first ${FEW}` : `Show all ${labels.length}`;
  }
  const more = el("button", { type: "button" });
  more.addEventListener("click", () => { every = !every; draw(); });
  host.replaceChildren(
    el("div", { class: "controls" }, choice("Order", [["size", "by size"], ["value", "by value"], ["given", "as given"]], order, (value) => { order = value; draw(); }), more),
    grid, note);
  draw();
  repaints.push(draw);
};
