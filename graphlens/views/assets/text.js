// Text coloured by a number for each token.
kinds.text = (host, view) => {
  const rows = Object.fromEntries(Object.entries(view.values).map(([name, packed]) => [name, decode(packed)]));
  const names = Object.keys(rows);
  let by = names[0];
  const strip = el("div", { class: "tokens", role: "group", "aria-label": "tokens" });
  const below = el("div", {});
  const chips = view.tokens.map((text, index) => {
    const chip = token(text, index, () => names.map((name) => `${name}: ${long(rows[name][index])}`).join("\n"));
    chip.append(el("small", {}));
    return chip;
  });
  strip.append(...chips);
  roving(chips, chips.length);
  function draw() {
    const values = rows[by];
    const [least, most] = finiteRange(values);
    const scale = least < 0 ? scaleOf(least, most, 0) : scaleOf(0, most);
    chips.forEach((chip, index) => {
      chip.dataset.value = values[index];
      chip.lastChild.textContent = Number.isNaN(values[index]) ? "" : short(values[index]);
      paint(chip, scale.colour(values[index]));
    });
    below.replaceChildren(legend(scale, values.some(Number.isNaN) ? { missing: "no value" } : {}));
  }
  const controls = names.length > 1
    ? [el("div", { class: "controls" }, choice("Colour by", names.map((name) => [name, name]), by, (value) => { by = value; draw(); }))]
    : [el("p", { class: "axis" }, by)];
  host.replaceChildren(...controls, strip, below);
  draw();
  repaints.push(draw);
};
